"""SparseTargets, sampling and the codec."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from limbeck import SparseTargets, fused_distillation_loss
from limbeck.errors import ConfigError, LimbeckError, MismatchError
from limbeck.targets.codec import CodecSpec, decode, encode, measure
from limbeck.targets.sampling import sample_targets
from limbeck.targets.sparse import concatenate

TAUS = (1.0, 2.0)


def logits_like_an_lm(positions: int, vocab: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocab + 1).log()
    return 2.0 * torch.randn(positions, vocab, generator=generator) - 1.2 * ranks


def test_tempered_probabilities_and_tail_are_exact():
    logits = logits_like_an_lm(5, 200).double()
    targets = SparseTargets.from_logits(logits, 10, TAUS)
    for tau in TAUS:
        log_p, log_tail = targets.at_temperature(tau)
        p = (logits / tau).softmax(-1)
        expected = p.gather(-1, targets.token_ids.long())
        torch.testing.assert_close(log_p.exp(), expected)
        torch.testing.assert_close(log_tail.exp(), 1 - expected.sum(-1))


def test_a_tail_below_rounding_is_as_large_as_the_rounding_of_what_is_known():
    """Ids that hold everything: each logarithm is known to half a rounding of float32, a share 2**-24 of itself."""
    ids = torch.tensor([[0, 1, -1, -1], [0, 1, 2, 3]])
    shares = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25] * 4])
    targets = SparseTargets(ids, shares.log(), torch.zeros(2, 1), (1.0,), vocab_size=9)
    log_p, log_tail = targets.at_temperature(1.0)
    torch.testing.assert_close(log_p, shares.log())
    assert log_tail.tolist() == pytest.approx([math.log(math.log(n)) - 24 * math.log(2.0) for n in (2, 4)], abs=1e-5)


def test_to_dense_sums_to_one_and_keeps_the_support():
    targets = SparseTargets.from_logits(logits_like_an_lm(4, 50).view(2, 2, 50), 7, TAUS)
    for tau in TAUS:
        dense = targets.to_dense(temperature=tau)
        assert dense.shape == (2, 2, 50)
        torch.testing.assert_close(dense.sum(-1), torch.ones(2, 2))
        log_p, _ = targets.at_temperature(tau)
        torch.testing.assert_close(dense.gather(-1, targets.token_ids.long()), log_p.exp())


def test_restrict_vocabulary_drops_padding_and_refuses_tokens():
    logits = logits_like_an_lm(4, 50)
    logits[:, 45:] = -30.0
    targets = SparseTargets.from_logits(logits, 50, TAUS).restrict_vocabulary(45)
    assert targets.top_k == 45
    kept = (logits[:, :45] / 2).softmax(-1)
    dense = targets.to_dense(45, temperature=2.0)
    torch.testing.assert_close(dense, kept, rtol=1e-4, atol=1e-6)
    with pytest.raises(MismatchError, match="does not have"):
        SparseTargets.from_logits(logits, 50, TAUS).restrict_vocabulary(1)


def test_up_to_a_hundredth_of_the_mass_may_be_padding():
    for lost, refused in ((0.008, False), (0.013, True)):
        p = torch.tensor([[0.7, 0.3 - lost, lost]])
        targets = SparseTargets.from_logits(p.log(), 3, (1.0,))
        with pytest.raises(MismatchError, match="of its probability") if refused else nullcontext():
            assert targets.restrict_vocabulary(2).vocab_size == 2


@pytest.mark.parametrize(("vocab", "k"), [(4096, 64), (151936, 64), (300, 300), (50, 7), (1000, 1), (70000, 33)])
def test_codec_round_trip(vocab, k):
    targets = SparseTargets.from_logits(logits_like_an_lm(40, vocab), k, TAUS)
    spec = CodecSpec(k, vocab, TAUS)
    decoded = decode(encode(targets, spec), spec)
    loss = measure(targets, decoded)  # raises if an id is lost
    assert loss.worst_kl < 1e-4
    assert bool((decoded.token_ids[:, 1:] > decoded.token_ids[:, :-1]).all())
    for tau in TAUS:  # the tail is stored, not derived from the coded head
        _, before = targets.at_temperature(tau)
        _, after = decoded.at_temperature(tau)
        torch.testing.assert_close(before.exp(), after.exp(), rtol=2e-2, atol=2e-3)


def test_codec_keeps_supports_of_varying_size():
    targets = SparseTargets.from_logits(logits_like_an_lm(30, 500), 12, TAUS)
    used = torch.arange(30) % 12 + 1
    unused = torch.arange(12) >= used[:, None]
    targets = targets.with_tensors(
        {
            "token_ids": torch.where(unused, -1, targets.token_ids),
            "logprobs": torch.where(unused, -math.inf, targets.logprobs),
        }
    )
    spec = CodecSpec(12, 500, TAUS)
    decoded = decode(encode(targets, spec), spec)
    assert torch.equal(decoded.valid.sum(-1), used)
    assert measure(targets, decoded).worst_kl < 1e-4


def test_codec_is_deterministic_and_stores_what_it_says():
    targets = SparseTargets.from_logits(logits_like_an_lm(64, 151936), 64, TAUS)
    spec = CodecSpec(64, 151936, TAUS)
    first, second = encode(targets, spec), encode(targets, spec)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert sum(value.nbytes for value in first.values()) / 64 == 176.0
    assert spec.ids.low_bits == 11


def test_codec_refuses_k_above_v_and_notices_damage():
    with pytest.raises(ConfigError, match="K is 65 and the vocabulary has 64"):
        CodecSpec(65, 64, TAUS)
    spec = CodecSpec(8, 500, TAUS)
    sections = encode(SparseTargets.from_logits(logits_like_an_lm(4, 500), 8, TAUS), spec)
    sections["high"][0, 0] ^= 0xFF
    with pytest.raises(LimbeckError, match="do not decode"):
        decode(sections, spec)


def test_the_codec_holds_any_finite_values_and_refuses_others():
    """Masked ids at −1e9, and teachers that overflowed."""
    logits = logits_like_an_lm(6, 40)
    logits[:, 30:] = -1e9
    targets = SparseTargets.from_logits(logits, 40, TAUS)
    spec = CodecSpec(40, 40, TAUS)
    decoded = decode(encode(targets, spec), spec)
    assert measure(targets, decoded).worst_kl < 1e-4
    logits[0, 0] = torch.nan
    with pytest.raises(LimbeckError, match="teacher.dtype"):
        encode(SparseTargets.from_logits(logits, 40, TAUS), spec)


def test_sampled_targets_are_unbiased():
    """Over many draws, the weights average to p and the gradient to the dense one."""
    vocab, draws, repeats = 40, 8, 4000
    logits = logits_like_an_lm(1, vocab, seed=3)
    p = (logits / 2.0).softmax(-1)[0]
    targets = sample_targets(logits.expand(repeats, vocab), 4, draws, TAUS, 2.0, torch.Generator().manual_seed(0))
    dense = torch.zeros(repeats, vocab + 1)
    index = torch.where(targets.valid, targets.token_ids, vocab).long()
    dense.scatter_add_(1, index, targets.weights)
    mean = dense[:, :vocab].mean(0)
    assert float((mean - p).abs().max()) < 4 * float(p[p < p.topk(4).values.min()].max() / repeats) ** 0.5
    torch.testing.assert_close(dense[:, :vocab].sum(-1), torch.ones(repeats), rtol=1e-4, atol=1e-4)

    hidden = torch.randn(1, 6).expand(repeats, 6)
    weight = torch.randn(vocab, 6, requires_grad=True)
    labels = torch.zeros(repeats, dtype=torch.long)
    sampled = fused_distillation_loss(hidden, weight, labels, targets, alpha=1.0, temperature=2.0).loss
    whole = SparseTargets.from_logits(logits.expand(repeats, vocab), vocab, TAUS)
    full = fused_distillation_loss(hidden, weight, labels, whole, alpha=1.0, temperature=2.0).loss
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (sampled, full))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_sampled_targets_survive_the_codec_and_refuse_other_uses():
    logits = logits_like_an_lm(20, 300)
    targets = sample_targets(logits, 4, 8, TAUS, 2.0, torch.Generator().manual_seed(0))
    spec = CodecSpec(12, 300, TAUS, head=4, num_draws=8, sampling_temperature=2.0)
    decoded = decode(encode(targets, spec), spec)
    order = torch.where(targets.valid, targets.token_ids, 1 << 20).argsort(-1)
    torch.testing.assert_close(
        targets.weights.gather(-1, order), decoded.weights[:, : order.shape[1]], rtol=0.05, atol=5e-3
    )
    with pytest.raises(ConfigError, match="sampled at 2.0"):
        decoded.at_temperature(1.0)
    with pytest.raises(ConfigError, match="forward_kl"):
        fused_distillation_loss(
            torch.randn(20, 3), torch.randn(300, 3), torch.zeros(20, dtype=torch.long), targets,
            temperature=2.0, divergence="jsd",
        )  # fmt: skip


def test_concatenate_pads_to_the_widest():
    parts = [SparseTargets.from_logits(logits_like_an_lm(2, 50), k, TAUS) for k in (3, 5)]
    joined = concatenate(parts)
    assert joined.token_ids.shape == (4, 5)
    assert joined.valid.sum(-1).tolist() == [3, 3, 5, 5]
