"""The fused loss against autograd, against the dense formula, and against its own chunks."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from limbeck import SparseTargets, fused_distillation_loss
from limbeck.errors import ConfigError

N, D, V, K = 5, 3, 13, 4
TAUS = (1.0, 2.0)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "tvd")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    make = {"dtype": torch.float64, "requires_grad": True}
    hidden, weight, bias = torch.randn(N, D, **make), torch.randn(V, D, **make), torch.randn(V, **make)
    labels = torch.randint(0, V, (N,))
    labels[2] = -100
    return hidden, weight, bias, labels, torch.randn(N, V, dtype=torch.float64) * 2


@pytest.mark.parametrize(("divergence", "tail"), itertools.product(DIVERGENCES, ("bucket", "renormalise", "ignore")))
def test_gradcheck_in_float64(problem, divergence, tail):
    hidden, weight, bias, labels, teacher = problem
    for tau, k in itertools.product(TAUS, (K, V)):
        targets = SparseTargets.from_logits(teacher, k, TAUS)

        def loss(h, w, b, tau=tau, targets=targets):
            return fused_distillation_loss(
                h, w, labels, targets, bias=b, alpha=0.7, temperature=tau, divergence=divergence, tail=tail,
                logit_softcap=3.0, logit_scale=0.8, chunk_size=3,
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(loss, (hidden, weight, bias), atol=1e-6)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_equals_the_dense_formula_when_k_is_v(problem, tau, alpha):
    hidden, weight, bias, labels, teacher = problem
    ours = fused_distillation_loss(
        hidden, weight, labels, SparseTargets.from_logits(teacher, V, TAUS), bias=bias, alpha=alpha, temperature=tau
    ).loss
    keep = labels >= 0
    logits = (hidden @ weight.T + bias)[keep]
    kl = kl_div((logits / tau).log_softmax(-1), (teacher[keep] / tau).softmax(-1), reduction="batchmean")
    dense = (1 - alpha) * cross_entropy(logits, labels[keep]) + alpha * tau**2 * kl
    torch.testing.assert_close(ours, dense)
    inputs = (hidden, weight, bias)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(dense, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_sparse_forward_kl_is_the_kl_of_the_partition(problem):
    hidden, weight, _, labels, teacher = problem
    targets = SparseTargets.from_logits(teacher, K, TAUS)
    out = fused_distillation_loss(hidden, weight, labels, targets, alpha=1.0, temperature=2.0)
    p, q = (teacher / 2).softmax(-1), (hidden @ weight.T / 2).softmax(-1).detach()
    expected, full = 0.0, 0.0
    for i in range(N):
        if labels[i] < 0:
            continue
        ids = targets.token_ids[i].long()
        ps, qs = torch.cat([p[i, ids], 1 - p[i, ids].sum()[None]]), torch.cat([q[i, ids], 1 - q[i, ids].sum()[None]])
        expected += float((ps * (ps / qs).log()).sum())
        full += float((p[i] * (p[i] / q[i]).log()).sum())
    assert float(out.divergence_sum) == pytest.approx(expected)
    assert float(out.divergence_sum) < full  # a lower bound of the full KL


def test_temperature_squared_reaches_the_gradient(problem):
    """At large τ, τ²·KL tends to a variance independent of τ; without τ² its gradient would vanish."""
    hidden, weight, _, labels, teacher = problem
    targets = SparseTargets.from_logits(teacher, V, (1.0, 50.0, 100.0))
    norms = []
    for tau in (50.0, 100.0):
        loss = fused_distillation_loss(hidden, weight, labels, targets, alpha=1.0, temperature=tau).loss
        norms.append(float(torch.autograd.grad(loss, hidden)[0].norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_chunks_and_shapes_do_not_matter(problem):
    hidden, weight, bias, labels, teacher = (t.detach() for t in problem)
    targets = SparseTargets.from_logits(teacher, K, TAUS)
    whole = fused_distillation_loss(hidden, weight, labels, targets, bias=bias)
    for chunk in (1, 2, 5, 100):
        part = fused_distillation_loss(hidden, weight, labels, targets, bias=bias, chunk_size=chunk)
        for name, value in vars(whole).items():
            torch.testing.assert_close(getattr(part, name), value)
    batch = fused_distillation_loss(
        hidden.view(1, N, D), weight, labels.view(1, N),
        targets.with_tensors({n: t.view(1, N, -1) for n, t in targets.tensors().items()}), bias=bias,
    )  # fmt: skip
    torch.testing.assert_close(batch.loss, whole.loss)


def test_frozen_head_gets_no_gradient(problem):
    hidden, weight, _, labels, _ = problem
    frozen = weight.detach()
    fused_distillation_loss(hidden, frozen, labels).loss.backward()
    assert frozen.grad is None
    assert hidden.grad is not None


def test_positions_without_label_change_nothing(problem):
    hidden, weight, _, labels, teacher = problem
    targets = SparseTargets.from_logits(teacher, K, TAUS)
    loss = fused_distillation_loss(hidden, weight, labels, targets).loss
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert bool((gradient[2] == 0).all())
    none_left = fused_distillation_loss(hidden, weight, torch.full_like(labels, -100), targets)
    assert float(none_left.loss) == 0.0


def test_bfloat16_accumulates_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 32), torch.randn(300, 32)
    labels, teacher = torch.randint(0, 300, (512,)), torch.randn(512, 300) * 2
    targets = SparseTargets.from_logits(teacher, 20, TAUS)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        w = weight.detach().clone().to(dtype).requires_grad_()
        fused_distillation_loss(hidden.to(dtype), w, labels, targets, chunk_size=16).loss.backward()
        grads[dtype] = w.grad.float()
    error = (grads[torch.bfloat16] - grads[torch.float32]).norm() / grads[torch.float32].norm()
    assert float(error) < 0.02


def test_a_scale_of_two_is_a_weight_twice_as_large(problem):
    hidden, weight, _, labels, teacher = problem
    targets = SparseTargets.from_logits(teacher, K, TAUS)
    found = fused_distillation_loss(hidden, weight, labels, targets, logit_scale=2.0).loss
    wanted = fused_distillation_loss(2.0 * hidden, weight, labels, targets).loss
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_are_given_once():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    loss = fused_distillation_loss(hidden, weight, torch.tensor([1, 2, 3])).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_vanishing_tails_stay_finite():
    """A student and a teacher that are certain of different ids: everything finite, in float32."""
    teacher = torch.full((4, 50), -60.0)
    teacher[:, 3] = 60.0
    hidden = torch.zeros(4, 8)
    hidden[:, 0] = 1.0
    weight = torch.zeros(50, 8)
    weight[7, 0] = 200.0
    weight.requires_grad_()
    targets = SparseTargets.from_logits(teacher, 5, TAUS)
    for divergence, tau in itertools.product(DIVERGENCES, TAUS):
        loss = fused_distillation_loss(
            hidden, weight, torch.tensor([7, 7, 3, 3]), targets, divergence=divergence, temperature=tau
        ).loss
        (gradient,) = torch.autograd.grad(loss, weight)
        assert torch.isfinite(loss)
        assert bool(torch.isfinite(gradient).all())


def test_padded_vocabularies():
    """Ids that only one side has get probability 0 on the other, whichever side is narrower."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(6, 8), torch.randint(0, 20, (6,))
    teacher = torch.randn(6, 20)
    for student_vocab, teacher_vocab in ((24, 20), (20, 24)):
        weight = torch.randn(student_vocab, 8)
        padded = torch.full((6, teacher_vocab), -torch.inf)
        padded[:, :20] = teacher
        targets = SparseTargets.from_logits(padded, 20, TAUS)
        out = fused_distillation_loss(hidden, weight, labels, targets, alpha=1.0, temperature=1.0)
        log_q = (hidden @ weight.T).log_softmax(-1)[:, :20]
        p = teacher.softmax(-1)
        expected = (p * (p.log() - log_q)).sum(-1).mean()
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)


def test_refusals(problem):
    hidden, weight, _, labels, teacher = problem
    targets = SparseTargets.from_logits(teacher, K, TAUS)
    with pytest.raises(ConfigError, match=r"3.0 is not declared.*1.0, 2.0"):
        fused_distillation_loss(hidden, weight, labels, targets, temperature=3.0)
    with pytest.raises(ConfigError, match="unknown divergence 'kld'"):
        fused_distillation_loss(hidden, weight, labels, targets, divergence="kld")
    with pytest.raises(ConfigError, match="alpha is 2"):
        fused_distillation_loss(hidden, weight, labels, targets, alpha=2)
    with pytest.raises(ConfigError, match="K is 30 and the vocabulary has 13"):
        SparseTargets.from_logits(teacher, 30, TAUS)
