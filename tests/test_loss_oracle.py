"""The losses beside their definitions, written out here over the whole vocabulary in float64.

The oracle knows nothing of limbeck's functions: softmax of the dense logits, the support picked out of them, the
divergence as it stands in its paper, one position after the other, and autograd of that for the gradient.

Shapes: N positions, D width, V vocabulary, K support.
"""

import math

import pytest
import torch

from limbeck import SparseTargets, fused_distillation_loss
from limbeck.errors import ConfigError, MismatchError
from limbeck.losses import fused
from limbeck.losses.dense import dense_distillation_loss
from limbeck.losses.divergences import same_width, whole_kl
from limbeck.losses.router import Routing, router_losses
from limbeck.registry import DIVERGENCES, Choice
from limbeck.targets.sampling import sample_targets

N, D, V = 7, 3, 11
TAUS = (1.0, 2.0, 0.5)
ALPHA, BETA, SKEW, SCALE, CAP = 0.3, 0.3, 0.2, 0.7, 5.0
LABELS = torch.tensor([3, 0, -100, 10, 3, 7, -100])
TAILS = ("bucket", "renormalise", "ignore")

# -- the oracle -------------------------------------------------------------------------------------------


def kl(a, b):
    return (a * (a / b).log()).sum()


FORMULAS = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: BETA * kl(p, BETA * p + (1 - BETA) * q) + (1 - BETA) * kl(q, BETA * p + (1 - BETA) * q),
    "skewed_kl": lambda p, q: kl(p, SKEW * p + (1 - SKEW) * q),
    "tvd": lambda p, q: 0.5 * (p - q).abs().sum(),
}
OPTIONS = {"alpha": ALPHA}


def chosen(name):
    """The divergence of that name with this file's parameters."""
    return DIVERGENCES.build(
        {"jsd": Choice(name="jsd", beta=BETA), "skewed_kl": Choice(name="skewed_kl", skew=SKEW)}.get(name, name)
    )


def capped(hidden, weight, bias):
    """Head with its bias, then the scale, then the soft cap."""
    return CAP * torch.tanh(SCALE * (hidden @ weight.T + bias) / CAP)


def divergence_of(name, p, q, support, tail):
    """One position's divergence of p and q `[V]`, over the ids of `support` and the rest as `tail` says."""
    inside = torch.zeros(len(p), dtype=torch.bool)
    inside[support] = True
    if not inside.any():
        return 0.0 * q.sum()
    a, b = p[inside], q[inside]
    if tail == "renormalise":
        a, b = a / a.sum(), b / b.sum()
    if tail == "bucket" and not inside.all():
        a, b = torch.cat([a, p[~inside].sum()[None]]), torch.cat([b, q[~inside].sum()[None]])
    return FORMULAS[name](a, b)


def oracle(z, labels, teacher, supports, *, tau, name, tail="bucket", draws=None, alpha=ALPHA):
    """The sum of the loss over labelled positions, and what is reported beside it, from logits z `[N, V]`."""
    z, teacher = z.double(), teacher.double()
    sums = dict.fromkeys(("loss", "ce", "divergence", "teacher_mass", "student_mass"), torch.zeros(()).double())
    for i, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        p, q, support = (teacher[i] / tau).softmax(-1), (z[i] / tau).softmax(-1), supports[i]
        if draws is None:
            divergence = divergence_of(name, p, q, support, tail)
        else:
            divergence = (draws[i].double() * (p[support].log() - q[support].log())).sum()
        ce = -z[i].softmax(-1)[label].log()
        parts = (
            (1 - alpha) * ce + alpha * tau**2 * divergence, ce, divergence, p[support].sum(), q[support].sum()
        )  # fmt: skip
        sums = {key: sums[key] + part for key, part in zip(sums, parts, strict=True)}
    return sums


@pytest.fixture
def problem():
    """Logits whose cap, scale and bias all matter, and a teacher far from them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,)}
    inputs = [2.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values()]
    teacher = 2.0 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in inputs], teacher


def likeliest(teacher, counts):
    """The `counts[i]` likeliest ids of each position, in an order that tells nothing."""
    return [row.argsort(descending=True)[:k].roll(1) for row, k in zip(teacher, counts, strict=True)]


def by_hand(teacher, supports, draws=None, dtype=torch.float64):
    """SparseTargets of the given supports, from the definition; unused places hold -1, at the end."""
    width = max(len(ids) for ids in supports)
    ids = torch.full((len(supports), width), -1, dtype=torch.int32)
    logprobs = torch.full((len(supports), width), -math.inf, dtype=torch.float64)
    weights = torch.zeros(len(supports), width, dtype=torch.float64)
    log_p = teacher.double().log_softmax(-1)
    for i, support in enumerate(supports):
        ids[i, : len(support)], logprobs[i, : len(support)] = support.int(), log_p[i, support]
        if draws is not None:
            weights[i, : len(support)] = draws[i]
    log_z = torch.stack([(log_p / tau).logsumexp(-1) for tau in TAUS], dim=-1)
    sampled = {} if draws is None else {"weights": weights.to(dtype), "sampling_temperature": 2.0}
    return SparseTargets(ids, logprobs.to(dtype), log_z.to(dtype), TAUS, teacher.shape[-1], **sampled)


def close(found, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(found).double(), expected.detach().double(), rtol=rtol, atol=atol)


def same_gradients(mine, theirs, inputs):
    pairs = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (mine, theirs)]
    for a, b in zip(*pairs, strict=True):
        close(a, b)


# -- the fused loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [1, 4, V])
def test_value_and_gradients_are_the_definitions(problem, name, tail, tau, k):
    inputs, teacher = problem
    targets = SparseTargets.from_logits(teacher, k, TAUS)
    found = fused_distillation_loss(
        *inputs[:2], LABELS, targets, bias=inputs[2], temperature=tau, divergence=chosen(name), tail=tail,
        logit_scale=SCALE, logit_softcap=CAP, num_items=13.0, chunk_size=3, **OPTIONS,
    )  # fmt: skip
    wanted = oracle(capped(*inputs), LABELS, teacher, likeliest(teacher, [k] * N), tau=tau, name=name, tail=tail)
    close(found.loss, wanted["loss"] / 13.0)
    close(found.ce_sum, wanted["ce"])
    close(found.divergence_sum, wanted["divergence"])
    assert int(found.num_valid) == 5
    same_gradients(found.loss, wanted["loss"] / 13.0, inputs)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_blocks_of_a_chunk_are_the_chunk(problem, monkeypatch, rows):
    """Labels and targets follow their positions where one product is worked on in several blocks."""
    monkeypatch.setitem(fused._BLOCK_BYTES, "cpu", 4 * V * rows)
    inputs, teacher = problem
    targets = SparseTargets.from_logits(teacher, 4, TAUS)
    found = fused_distillation_loss(
        *inputs[:2], LABELS, targets, bias=inputs[2], temperature=2.0, logit_scale=SCALE, logit_softcap=CAP,
        chunk_size=5, **OPTIONS,
    )  # fmt: skip
    wanted = oracle(capped(*inputs), LABELS, teacher, likeliest(teacher, [4] * N), tau=2.0, name="forward_kl")
    close(found.loss, wanted["loss"] / 5)
    same_gradients(found.loss, wanted["loss"] / 5, inputs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("tau", TAUS)
def test_supports_of_any_size_and_none_at_all(problem, name, tail, tau):
    """Positions of 1 to V ids, in any order, beside one where the teacher said nothing: divergence 0 there."""
    inputs, teacher = problem
    supports = likeliest(teacher, [1, 4, 2, 0, 7, V, 3])
    found = fused_distillation_loss(
        *inputs[:2], LABELS, by_hand(teacher, supports), bias=inputs[2], temperature=tau, divergence=chosen(name),
        tail=tail, logit_scale=SCALE, logit_softcap=CAP, **OPTIONS,
    )  # fmt: skip
    wanted = oracle(capped(*inputs), LABELS, teacher, supports, tau=tau, name=name, tail=tail)
    close(found.loss, wanted["loss"] / 5)  # five positions have a label
    close(found.divergence_sum, wanted["divergence"])
    same_gradients(found.loss, wanted["loss"] / 5, inputs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", FORMULAS)
def test_float32_is_the_float64_truth(problem, name, tail):
    inputs, teacher = problem
    supports = likeliest(teacher, [4] * N)
    single = [x.detach().float().requires_grad_() for x in inputs]
    found = fused_distillation_loss(
        *single[:2], LABELS, by_hand(teacher, supports, dtype=torch.float32), bias=single[2], temperature=2.0,
        divergence=chosen(name), tail=tail, logit_scale=SCALE, logit_softcap=CAP, **OPTIONS,
    )  # fmt: skip
    wanted = oracle(capped(*inputs), LABELS, teacher, supports, tau=2.0, name=name, tail=tail)["loss"] / 5
    close(found.loss, wanted, rtol=1e-5)
    theirs = torch.autograd.grad(wanted, inputs)
    for mine, their in zip(torch.autograd.grad(found.loss, single), theirs, strict=True):
        close(mine, their, rtol=1e-4, atol=3e-6)


def test_what_is_not_said_has_its_documented_value(problem):
    """α ½, τ 2, forward KL, the tail one bucket; β ½ of the JSD and λ 0.1 of the skewed KL."""
    (hidden, weight, _), teacher = problem
    supports = likeliest(teacher, [4] * N)
    formulas = {
        "forward_kl": kl,
        "jsd": lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "skewed_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    }
    for name, formula in formulas.items():
        chosen = {} if name == "forward_kl" else {"divergence": name}
        found = fused_distillation_loss(hidden, weight, LABELS, by_hand(teacher, supports), **chosen)
        z, total = (hidden @ weight.T).detach(), 0.0
        for i in (0, 1, 3, 4, 5):
            p, q, ids = (teacher[i] / 2).softmax(-1), (z[i] / 2).softmax(-1), supports[i]
            a, b = (torch.cat([x[ids], 1 - x[ids].sum()[None]]) for x in (p, q))
            total = total + 0.5 * -z[i].log_softmax(-1)[LABELS[i]] + 0.5 * 4 * formula(a, b)
        close(found.loss, total / 5, rtol=1e-6)
    dense = dense_distillation_loss(z, LABELS, by_hand(teacher, supports), divergence="skewed_kl")
    close(dense, total / 5, rtol=1e-5)


def test_cross_entropy_alone(problem):
    """Without a teacher there is no α: the loss is the cross-entropy, of capped logits too."""
    inputs, _ = problem
    found = fused_distillation_loss(
        *inputs[:2], LABELS, bias=inputs[2], logit_scale=SCALE, logit_softcap=CAP, num_items=4, **OPTIONS
    )
    keep = LABELS >= 0
    wanted = torch.nn.functional.cross_entropy(capped(*inputs)[keep], LABELS[keep], reduction="sum")
    close(found.loss, wanted / 4)
    close(found.ce_sum, wanted)
    same_gradients(found.loss, wanted / 4, inputs)


def test_sampled_targets_are_the_sum_of_weighted_log_ratios(problem):
    """Σ w (log p − log q) with the weights as given: q over the whole vocabulary, whatever the tail's policy."""
    inputs, teacher = problem
    supports = likeliest(teacher, [4, 2, 5, 0, 3, 6, 1])
    generator = torch.Generator().manual_seed(1)
    draws = [torch.rand(len(ids), generator=generator, dtype=torch.float64) for ids in supports]
    targets = by_hand(teacher, supports, draws)
    wanted = oracle(capped(*inputs), LABELS, teacher, supports, tau=2.0, name="forward_kl", draws=draws)
    for tail in ("bucket", "ignore"):  # conditioning draws on their support has no definition
        found = fused_distillation_loss(
            *inputs[:2], LABELS, targets, bias=inputs[2], temperature=2.0, tail=tail,
            logit_scale=SCALE, logit_softcap=CAP, **OPTIONS,
        )  # fmt: skip
        close(found.loss, wanted["loss"] / 5)
        same_gradients(found.loss, wanted["loss"] / 5, inputs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tau", TAUS)
def test_masses_are_the_probabilities_on_the_support(problem, tail, tau):
    """What either gives the support at τ, before any conditioning: the tail's policy changes the loss alone."""
    inputs, teacher = problem
    supports = likeliest(teacher, [1, 4, 2, 0, 7, V, 3])
    found = fused_distillation_loss(
        *inputs[:2], LABELS, by_hand(teacher, supports), bias=inputs[2], temperature=tau, tail=tail,
        logit_scale=SCALE, logit_softcap=CAP, **OPTIONS,
    )  # fmt: skip
    wanted = oracle(capped(*inputs), LABELS, teacher, supports, tau=tau, name="forward_kl", tail=tail)
    close(found.student_mass, wanted["student_mass"])
    close(found.teacher_mass, wanted["teacher_mass"])


def matches_of(best_ids, supports, teacher):
    """top1_matches of students whose likeliest ids are given, at positions that all have a label."""
    hidden = torch.nn.functional.one_hot(torch.tensor(best_ids), V).double()
    labels = torch.ones(len(best_ids), dtype=torch.long)
    found = fused_distillation_loss(hidden, 9.0 * torch.eye(V).double(), labels, by_hand(teacher, supports))
    return int(found.top1_matches)


def test_top1_matches_compare_the_likeliest_ids(problem):
    _, teacher = problem
    best, second = teacher.argmax(-1).tolist(), teacher.argsort(-1)[:, -2].tolist()
    supports = likeliest(teacher, [1, 4, 2, 6, 7, V, 3])
    assert matches_of(best, supports, teacher) == N
    assert matches_of(second, supports, teacher) == 0
    assert matches_of(best[:3] + second[3:], supports, teacher) == 3


def test_a_teacher_that_says_nothing_matches_nothing(problem):
    _, teacher = problem
    supports = likeliest(teacher, [0] + [2] * (N - 1))
    best = teacher.argmax(-1).tolist()
    assert matches_of([0, *best[1:]], supports, teacher) == N - 1  # id 0 stands in for no id in the first row


def test_of_equal_logits_the_lowest_id_is_the_students(problem):
    """Matches are those of argmax, which takes the first of equals, wherever it stands in the support or outside."""
    _, teacher = problem
    supports = likeliest(teacher, [4, 1, 2, 6, 7, V, 3])
    targets = by_hand(teacher, supports)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        hidden = torch.randint(0, 2, (N, V), generator=generator).double()
        found = fused_distillation_loss(hidden, torch.eye(V).double(), torch.ones(N, dtype=torch.long), targets)
        assert int(found.top1_matches) == int((hidden.argmax(-1) == teacher.argmax(-1)).sum())


# -- tails of any size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("peak", [22.3, 40.0, 80.0, 150.0, 300.0])
def test_a_student_sure_of_the_support_still_learns_its_tail(peak, name, tau):
    """q_tail far below one rounding of float32: the tail is still pulled up by what it lacks."""
    width = 50
    hidden = torch.zeros(1, 4)
    hidden[0, 0] = peak * tau
    weight = torch.zeros(width, 4)
    weight[7, 0] = 1.0
    bias = torch.zeros(width, requires_grad=True)
    teacher = torch.zeros(1, width, dtype=torch.float64)
    p_tail = 0.1 if tau == 1.0 else 0.3
    teacher[0, 7] = tau * math.log((1 - p_tail) / p_tail * (width - 1))
    supports = [torch.tensor([7])]
    targets = by_hand(teacher, supports, dtype=torch.float32)
    found = fused_distillation_loss(
        hidden, weight, torch.tensor([7]), targets, bias=bias, temperature=tau, divergence=chosen(name),
        **{**OPTIONS, "alpha": 1.0},
    )  # fmt: skip
    z = (hidden @ weight.T).double().requires_grad_()
    wanted = oracle(z, torch.tensor([7]), teacher, supports, tau=tau, name=name, alpha=1.0)
    (truth,) = torch.autograd.grad(wanted["loss"], z)
    (gradient,) = torch.autograd.grad(found.loss, bias)
    close(found.divergence_sum, wanted["divergence"], rtol=1e-5, atol=1e-6)
    close(gradient, truth[0], rtol=2e-5, atol=1e-6)
    if name == "forward_kl":
        tail = torch.arange(width) != 7
        q_tail = float((z[0] / tau).softmax(-1)[tail].sum())
        assert float(gradient[tail].sum()) == pytest.approx(tau * (q_tail - p_tail), rel=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("p_tail", [1e-6, 1e-9, 1e-12])
def test_a_teacher_that_leaves_next_to_nothing(problem, name, p_tail):
    """The divergence of a teacher's tail of 1e-9 in float64; reverse KL is the one that feels log p_tail."""
    inputs, _ = problem
    teacher = torch.zeros(N, V, dtype=torch.float64)
    teacher[:, 5] = math.log((1 - p_tail) / p_tail * (V - 1))
    supports = [torch.tensor([5])] * N
    found = fused_distillation_loss(
        *inputs[:2], LABELS, by_hand(teacher, supports), bias=inputs[2], temperature=1.0, divergence=chosen(name),
        logit_scale=SCALE, logit_softcap=CAP, **OPTIONS,
    )  # fmt: skip
    wanted = oracle(capped(*inputs), LABELS, teacher, supports, tau=1.0, name=name)
    # At 1e-12 the float64 log-probabilities hold the tail to 1e-4 of itself.
    rtol = 1e-4 if p_tail < 1e-9 else 1e-6
    close(found.divergence_sum, wanted["divergence"], rtol=rtol)
    theirs = torch.autograd.grad(wanted["loss"] / 5, inputs)
    for mine, their in zip(torch.autograd.grad(found.loss, inputs), theirs, strict=True):
        close(mine, their, rtol=rtol, atol=1e-9)


# -- what the teacher's logits become ---------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize("k", [8, None])
def test_logits_far_from_zero_lose_nothing(offset, k):
    """Multiples of 1/64: adding the offset is exact in float32, so the probabilities are the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-512, 512, (40, 300), generator=generator).float() / 64
    truth, taus = logits.double().log_softmax(-1), (1.0, 4.0, 0.5)  # half of the one before it, and not
    targets = SparseTargets.from_logits(logits + offset, k, taus)
    ids = targets.token_ids.long()
    assert torch.equal(truth.gather(-1, ids), truth.topk(k or 300).values)
    close(targets.logprobs, truth.gather(-1, ids), rtol=0, atol=2e-6)
    for index, tau in enumerate(taus):
        close(targets.log_z[:, index], (truth / tau).logsumexp(-1), rtol=0, atol=3e-6)
        log_p, log_tail = targets.at_temperature(tau)
        p = (truth / tau).softmax(-1).gather(-1, ids)
        close(log_p.exp(), p, rtol=2e-5, atol=1e-8)
        close(log_tail.exp(), 1 - p.sum(-1), rtol=0, atol=1e-5)


# -- the dense loss and the router's ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("counts", [[1] * N, [4] * N, [V] * N, [1, 4, 2, 0, 7, V, 3]])
def test_the_dense_loss_is_the_definition_twice_over(problem, name, tau, counts):
    """Value, gradient and, as curvature needs it, the gradient's own derivative along a direction."""
    inputs, teacher = problem
    z = capped(*inputs).detach().requires_grad_()
    supports = likeliest(teacher, counts)
    found = dense_distillation_loss(
        z, LABELS, by_hand(teacher, supports), temperature=tau, divergence=chosen(name), **OPTIONS
    )
    wanted = oracle(z, LABELS, teacher, supports, tau=tau, name=name)["loss"] / 5
    close(found, wanted, rtol=1e-5)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).double()
    derivatives = []
    for loss in (found, wanted):
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), z)
        derivatives.append((gradient, second))
    for mine, their in zip(*derivatives, strict=True):
        close(mine, their, rtol=1e-4, atol=2e-5)


def test_the_dense_loss_of_sampled_targets_and_of_labels_alone(problem):
    inputs, teacher = problem
    z = capped(*inputs).detach()
    supports = likeliest(teacher, [4, 2, 5, 0, 3, 6, 1])
    draws = [torch.linspace(0.1, 0.7, len(ids), dtype=torch.float64) for ids in supports]
    wanted = oracle(z, LABELS, teacher, supports, tau=2.0, name="forward_kl", draws=draws)
    close(dense_distillation_loss(z, LABELS, by_hand(teacher, supports, draws), temperature=2.0, **OPTIONS),
          wanted["loss"] / 5, rtol=1e-5)  # fmt: skip
    close(dense_distillation_loss(z, LABELS), wanted["ce"] / 5, rtol=1e-5)
    close(dense_distillation_loss(z, LABELS, by_hand(teacher, supports), alpha=0.0), wanted["ce"] / 5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["z", "entropy"])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_router_losses_are_the_definitions(kind, top_k, masked):
    """Switch's load balance E Σ f P, mean (logsumexp z)² or entropy, averaged over layers; no gradient through f."""
    tokens, experts = 24, 5
    generator = torch.Generator().manual_seed(0)
    layers = [2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64) for _ in range(3)]
    for layer in layers:
        layer.requires_grad_()
    mask = torch.rand(4, 6, generator=generator) < 0.6 if masked else None
    kept = [i for i in range(tokens) if mask is None or bool(mask.flatten()[i])]
    balance, aux, load, entropy = 0.0, 0.0, torch.zeros(3, experts, dtype=torch.float64), torch.zeros(3).double()
    for number, layer in enumerate(layers):
        share, mean = torch.zeros(experts, dtype=torch.float64), 0.0
        for i in kept:
            p = layer[i].exp() / layer[i].exp().sum()
            for expert in p.argsort(descending=True)[:top_k]:
                share[expert] += 1 / (top_k * len(kept))
            mean = mean + p / len(kept)
            term = layer[i].exp().sum().log() ** 2 if kind == "z" else -(p * p.log()).sum()
            aux = aux + term / len(kept) / len(layers)
            entropy[number] -= float((p * p.log()).sum()) / len(kept)
        balance = balance + experts * (share * mean).sum() / len(layers)
        load[number] = share
    routings = [Routing(layer, layer.topk(top_k, dim=-1).indices) for layer in layers]
    found = router_losses(routings, mask, kind)
    close(found.load_balance, balance, rtol=1e-5)
    close(found.aux, aux, rtol=1e-5)
    close(found.load, load, rtol=1e-5)
    close(found.entropy, entropy, rtol=1e-5)
    for mine, their in ((found.load_balance, balance), (found.aux, aux)):
        both = [torch.autograd.grad(loss, layers, retain_graph=True) for loss in (mine, their)]
        for a, b in zip(*both, strict=True):
            close(a, b, rtol=1e-4, atol=1e-6)


def test_positions_without_loss_do_not_decide_about_the_vocabulary():
    """A row that carries no loss may give all its mass to ids that the student lacks; one that does may not."""
    logits = torch.zeros(2, 12)
    logits[0, 11], logits[1, 11] = -9.0, 20.0
    hidden, weight = torch.randn(2, 3), torch.randn(11, 3)
    targets = SparseTargets.from_logits(logits, 12, (1.0,))
    out = fused_distillation_loss(hidden, weight, torch.tensor([4, -100]), targets, alpha=1.0, temperature=1.0)
    assert int(out.num_valid) == 1
    assert torch.isfinite(dense_distillation_loss(hidden @ weight.T, torch.tensor([4, -100]), targets, temperature=1.0))
    with pytest.raises(MismatchError, match="1.000 of its probability"):
        fused_distillation_loss(hidden, weight, torch.tensor([4, 5]), targets, temperature=1.0)


@pytest.mark.parametrize("tail", ["renormalise"])
def test_sampled_targets_are_not_conditioned_on_their_draws(tail):
    targets = sample_targets(torch.randn(4, 30), 2, 5, (1.0,), 1.0, torch.Generator().manual_seed(0))
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ConfigError, match="loss.tail is renormalise"):
        fused_distillation_loss(torch.randn(4, 3), torch.randn(30, 3), labels, targets, temperature=1.0, tail=tail)


def test_a_wider_teacher_and_no_label_at_all():
    targets = SparseTargets.from_logits(torch.randn(2, 40), None, (1.0,))
    labels = torch.full((2,), -100)
    found = fused_distillation_loss(torch.randn(2, 3), torch.randn(30, 3), labels, targets, temperature=1.0)
    assert float(found.loss) == 0.0
    assert int(found.num_valid) == 0


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_router_that_is_sure_has_an_entropy_and_its_gradient(sigmoid):
    z = torch.tensor([[0.0, -200.0, 1.0, 2.0], [-300.0, -310.0, -305.0, -301.0]], requires_grad=True)
    routing = Routing(z, torch.tensor([[3, 2], [0, 3]]), sigmoid)
    found = router_losses([routing], None, "entropy")
    scores = (z.double().sigmoid() if sigmoid else z.double().exp()).double()
    p = scores / scores.sum(-1, keepdim=True)
    entropy = -torch.where(p > 0, p * p.clamp_min(1e-300).log(), 0.0).sum(-1).mean()
    close(found.aux, entropy, rtol=1e-5)
    (theirs,) = torch.autograd.grad(entropy, z)
    (mine,) = torch.autograd.grad(found.aux + 0.0 * found.load_balance, z)
    close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("ours", "theirs"), [(7, 7), (7, 9), (9, 7)])
def test_whole_distributions_of_two_widths(ours, theirs):
    """Ids that one side lacks have probability 0 there: nothing where the teacher lacks them, much otherwise."""
    generator = torch.Generator().manual_seed(0)
    log_q = torch.randn(3, ours, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_p = torch.randn(3, theirs, generator=generator, dtype=torch.float64).log_softmax(-1)
    shared = min(ours, theirs)
    expected = (log_p[:, :shared].exp() * (log_p[:, :shared] - log_q[:, :shared])).sum()
    found = whole_kl(*same_width(log_p, log_q))
    if theirs > ours:
        assert float(found - expected) > 100.0
    else:
        close(found, expected)
