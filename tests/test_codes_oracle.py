"""Stored, sent, sampled and estimated targets beside their definitions.

Bytes are made from docs/formats.md with Python's integers, values from the formulas in float64; nothing here asks
limbeck's own inverse whether a number is right.
"""

import math
import struct
import zlib

import numpy as np
import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.targets.codec import CodecSpec, decode, encode, measure
from limbeck.targets.elias_fano import IdLayout, decode_ids, encode_ids
from limbeck.targets.sampling import sample_targets
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.tail import estimate_log_z
from limbeck.targets.wire import decode_targets, encode_targets, largest_reply

TAUS = (2.0, 1.0)


def close(found, expected, rtol=1e-5, atol=1e-6):
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def like_an_lm(positions, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(positions, vocab, generator=generator) - 1.2 * torch.arange(1, vocab + 1).log()


# -- sorted ids -------------------------------------------------------------------------------------------


def elias_fano(ids, vocab):
    """The three sections of one position as bytes, from the table in docs/formats.md."""
    k, low = len(ids), (vocab // len(ids)).bit_length() - 1
    whole = b"".join(bytes((i >> 8 * n) & 255 for i in ids) for n in range(low // 8))
    planes = b""
    for bit in range(low // 8 * 8, low):
        planes += sum(((i >> bit) & 1) << place for place, i in enumerate(ids)).to_bytes(-(-k // 8), "little")
    high = sum(1 << ((i >> low) + place) for place, i in enumerate(ids))
    return whole, planes, high.to_bytes(-(-(k + ((vocab - 1) >> low) + 1) // 8), "little")


@pytest.mark.parametrize(
    ("k", "vocab"),
    [(1, 1), (1, 2), (5, 5), (4, 7), (4, 8), (7, 1000), (8, 4096), (64, 151936), (3, 1 << 24), (1, 65536), (9, 40000)],
)
def test_ids_are_coded_as_the_table_says(k, vocab):
    generator = np.random.default_rng(k)
    rows = [sorted(generator.choice(vocab, k, replace=False).tolist()) for _ in range(5)]
    rows += [list(range(k)), list(range(vocab - k, vocab)), [vocab - 1] * k, [0] * k]
    layout = IdLayout(k, vocab)
    sections = encode_ids(np.array(rows, dtype=np.uint32), layout)
    assert layout.widths == {name: len(part) for name, part in zip(sections, elias_fano(rows[0], vocab), strict=True)}
    for place, row in enumerate(rows):
        expected = elias_fano(row, vocab)
        assert tuple(sections[name][place].tobytes() for name in ("low", "bits", "high")) == expected
    out = np.full((len(rows), k), -7, dtype=np.int32)
    decode_ids(sections, layout, out)
    assert np.array_equal(out, rows)


# -- the codec --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "vocab", "varies"), [(6, 400, False), (6, 400, True), (9, 9, False), (1, 5, False)])
def test_coded_sections_are_the_formulas(k, vocab, varies):
    logits = like_an_lm(30, vocab).double()
    logits[0, :] = 0.0  # all alike: no distance at all
    logits[1, 1:] -= 50.0  # farther than 32 nats
    targets = SparseTargets.from_logits(logits, k, TAUS)
    used = torch.arange(30) % k + 1 if varies else torch.full((30,), k)
    if varies:
        unused = torch.arange(k) >= used[:, None]
        ids, logprobs = targets.token_ids.masked_fill(unused, -1), targets.logprobs.masked_fill(unused, -math.inf)
        targets = targets.with_tensors({"token_ids": ids, "logprobs": logprobs})
    spec = CodecSpec(k, vocab, TAUS)
    sections = encode(targets, spec)
    decoded = decode(sections, spec)
    assert ("used" in sections) == varies
    for i in range(30):
        ids = targets.token_ids[i, : used[i]].tolist()
        order = sorted(range(len(ids)), key=ids.__getitem__)
        filled = [ids[j] for j in order] + [vocab - 1] * (k - len(ids))
        assert tuple(sections[n][i].tobytes() for n in ("low", "bits", "high")) == elias_fano(filled, vocab)
        log_p = targets.logprobs[i].double().numpy()[order]
        d = np.minimum(log_p.max() - log_p, 32.0)
        span = float(sections["range"][i])
        assert span >= np.float32(d.max())
        assert np.float32(np.nextafter(np.float16(span), np.float16(0))) < max(d.max(), 1e-9)
        levels = sections["levels"][i, : len(ids)].astype(float)
        assert np.abs(levels - 255 * np.sqrt(d / max(span, 1e-9))).max() < 0.5 + 1e-3
        for n, tau in enumerate(TAUS):
            stored, outside = (
                float(sections["tails"][i, n]),
                (logits[i] / tau).softmax(-1).index_fill(0, torch.tensor(ids), 0),
            )
            tail = float(outside.sum())
            if tail < 1e-9:
                assert stored < (-20 if k < vocab else -1e9)
            else:
                assert stored == pytest.approx(math.log(tail / (1 - tail)), rel=1e-3)
        # Back again, from what is stored.
        d = span * (levels / 255) ** 2
        kept = [-math.log1p(math.exp(float(x))) for x in sections["tails"][i]]  # log(1 − tail)
        expected = -d - np.log(np.exp(-d).sum()) + kept[TAUS.index(1.0)]
        close(decoded.logprobs[i, : len(ids)], expected)
        for n, tau in enumerate(TAUS):
            close(decoded.log_z[i, n], 0.0 if tau == 1.0 else np.log(np.exp(expected / tau).sum()) - kept[n])
        assert decoded.token_ids[i].tolist() == [ids[j] for j in order] + [-1] * (k - len(ids))


def test_coded_draws_stand_for_their_share_of_the_tail():
    """A head of two, then 40, 8 and 12 draws of 60: weights p, p, and count · tail / 60 at the draws' τ."""
    log_p = torch.tensor([[0.4, 0.2, 0.1, 0.1, 0.05]]).log()
    log_z = torch.stack([torch.tensor([0.9]), torch.zeros(1)], dim=-1)
    p = (log_p / 2.0 - 0.9).exp()
    tail = 1.0 - p[0, :2].sum()
    weights = torch.cat([p[:, :2], torch.tensor([[40.0, 8.0, 12.0]]) * tail / 60], dim=-1)
    ids = torch.tensor([[7, 3, 9, 1, 5]], dtype=torch.int32)
    targets = SparseTargets(ids, log_p, log_z, TAUS, 40, weights=weights, sampling_temperature=2.0)
    spec = CodecSpec(5, 40, TAUS, head=2, num_draws=60, sampling_temperature=2.0)
    sections = encode(targets, spec)
    assert sections["draws"].tolist() == [[8, 0, 12, 0, 40]]  # in the order of the ids 1 3 5 7 9
    decoded = decode(sections, spec)
    assert decoded.token_ids.tolist() == [[1, 3, 5, 7, 9]]
    close(decoded.weights, weights[:, [3, 1, 4, 0, 2]], rtol=5e-3)


def test_the_round_trip_is_measured_by_the_kl_of_the_partition():
    logits = like_an_lm(12, 60).double()
    original = SparseTargets.from_logits(logits, 5, TAUS)
    order = original.token_ids.argsort(-1)
    noise = 0.2 * torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).double()
    changed = original.with_tensors({
        "token_ids": original.token_ids.gather(-1, order), "logprobs": original.logprobs.gather(-1, order) + noise,
        "log_z": original.log_z + 0.3,
    })  # fmt: skip
    found = measure(original, changed)
    before, after = original.logprobs.gather(-1, order), changed.logprobs
    assert found.mean_abs_error == pytest.approx(float((before - after).abs().mean()))
    for n, tau in enumerate(TAUS):
        p, q = (before / tau - original.log_z[:, [n]]).exp(), (after / tau - changed.log_z[:, [n]]).exp()
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=-1) for x in (p, q))
        assert found.kl[tau] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
    assert found.worst_kl == max(found.kl.values()) > min(found.kl.values())


def test_the_codecs_limits():
    assert CodecSpec(64, 1 << 24, TAUS).ids.low_bits == 18
    assert CodecSpec(64, 64, TAUS).ids.low_bits == 0
    with pytest.raises(ConfigError, match="at most 16777216"):
        CodecSpec(64, (1 << 24) + 1, TAUS)


# -- sparse targets and samples ---------------------------------------------------------------------------


def test_dense_probabilities_spread_the_tail_evenly():
    ids = torch.tensor([[3, 0, -1], [5, 2, 4], [-1, -1, -1]], dtype=torch.int32)
    p = torch.tensor([[0.5, 0.2, 0.0], [0.1, 0.6, 0.3], [0.0, 0.0, 0.0]])
    targets = SparseTargets(ids, p.log(), torch.zeros(3, 1), (1.0,), 6)
    rest = 0.3 / 4
    expected = [[0.2, rest, rest, 0.5, rest, rest, 0, 0], [0, 0, 0.6, 0, 0.3, 0.1, 0, 0], [1 / 6] * 6 + [0, 0]]
    close(targets.to_dense(8), expected)
    close(targets.to_dense(), [row[:6] for row in expected])


def test_samples_are_an_exact_head_and_counted_draws():
    vocab, head, draws, tau = 30, 3, 10, 2.0
    logits = like_an_lm(200, vocab).double()
    found = sample_targets(logits, head, draws, TAUS, tau, torch.Generator().manual_seed(0))
    log_p, p = logits.log_softmax(-1), (logits / tau).softmax(-1)
    assert (found.temperatures, found.sampling_temperature, found.vocab_size) == (TAUS, tau, vocab)
    for n, each in enumerate(TAUS):
        close(found.log_z[:, n], (log_p / each).logsumexp(-1))
    most = 0.0
    for i in range(200):
        ids = found.token_ids[i][found.token_ids[i] >= 0].long()
        assert ids[:head].tolist() == p[i].argsort(descending=True)[:head].tolist()
        assert len(set(ids.tolist())) == len(ids)
        assert bool((found.token_ids[i, len(ids) :] == -1).all())
        close(found.logprobs[i, : len(ids)], log_p[i, ids])
        close(found.weights[i, :head], p[i, ids[:head]])
        tail = 1 - p[i, ids[:head]].sum()
        counts = found.weights[i, head : len(ids)] * draws / tail
        close(counts, counts.round(), atol=1e-4)
        assert float(counts.sum()) == pytest.approx(draws)
        assert bool((found.weights[i, len(ids) :] == 0).all())
        most = max(most, float(counts.max()))
    assert most > 1
    assert sample_targets(logits, 20, 10, TAUS, tau, torch.Generator()).top_k == vocab
    with pytest.raises(ConfigError, match="head 21"):
        sample_targets(logits, 21, 10, TAUS, tau, torch.Generator())


def test_draws_fall_in_proportion_to_the_tail_at_their_temperature():
    logits = torch.arange(6, 0, -1).double()
    found = sample_targets(logits.expand(4000, 6), 1, 5, TAUS, 2.0, torch.Generator().manual_seed(0))
    counts = torch.zeros(6).double()
    drawn = found.token_ids >= 0
    counts.index_add_(0, found.token_ids[drawn].long(), found.weights[drawn])
    p = (logits / 2).softmax(-1)
    close(counts / 4000, p, rtol=0, atol=5 * float((1 - p[0]) / 2) / math.sqrt(20000))  # five deviations of a coin


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("steepness", [0.3, 0.9, 1.0, 1.5, 3.0])
def test_the_tail_estimate_is_the_integral_of_its_power_law(steepness, tau):
    """p_r = p_K (r/K)^−s from r = K to V holds the tail's mass; its tempered integral is what is added."""
    k, vocab = 4, 1000
    x = np.exp(np.linspace(0.0, math.log(vocab / k), 200001))
    area = np.trapezoid(x**-steepness, x)
    head = np.array([3.0, 2.0, 1.5, 1.0])
    last = 1.0 / (head.sum() + k * area)  # p_K, so that head and tail are 1 together
    rest = last ** (1 / tau) * k * np.trapezoid(x ** (-steepness / tau), x)
    expected = math.log(((head * last) ** (1 / tau)).sum() + rest)
    logprobs = torch.tensor(np.log([*(head * last), 1.0])).unsqueeze(0)
    logprobs[0, 4] = -math.inf
    valid = torch.tensor([[True] * 4 + [False]])
    close(estimate_log_z(logprobs, valid, vocab, tau), [expected], atol=1e-4)


def test_the_tail_estimate_where_there_is_no_tail_or_nothing_at_all():
    p = torch.tensor([[0.6, 0.3, 0.1]]).double()
    held = torch.ones(1, 3, dtype=torch.bool)
    close(estimate_log_z(p.log(), held, 3, 2.0), p.sqrt().sum(-1).log())
    close(estimate_log_z(p.log(), held, 50, 2.0), p.sqrt().sum(-1).log(), atol=1e-3)
    assert float(estimate_log_z(torch.full((1, 3), -math.inf), ~held, 50, 2.0)) == 0.0
    # More mass than V − K ids of p_K could hold: the flattest tail there is, V − K of them.
    few = torch.tensor([[0.1, 0.1]]).double().log()
    close(estimate_log_z(few, held[:, :2], 6, 2.0), [math.log(6 * 0.1**0.5)], atol=1e-4)


# -- the wire ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("varies", [True, False])
def test_a_reply_is_the_layout_of_the_docs_to_the_byte(full, weighted, varies):
    rows, length, k, vocab = 2, 3, 3, 700
    ids = torch.tensor([[500, 3, 699], [2, 1, 0], [9, 400, 77]] * rows, dtype=torch.int32)
    logprobs = torch.log(torch.arange(1.0, 19.0).flip(0) / 60).view(6, 3)
    weights = torch.arange(18.0).view(6, 3) / 20
    if varies:
        ids[1, 2], logprobs[1, 2], weights[1, 2] = -1, -math.inf, 0.0
    more = {"weights": weights.view(rows, length, k), "sampling_temperature": 2.0} if weighted else {}
    log_z = torch.arange(12.0).view(rows, length, 2) / 7
    targets = SparseTargets(ids.view(rows, length, k), logprobs.view(rows, length, k), log_z, TAUS, vocab, **more)
    name = "0123456789abcdef" * 4
    asked = "fedcba9876543210" * 4
    data = encode_targets(targets, full=full, fingerprint=name, request=asked)

    sorted_ids, sorted_logprobs, sorted_weights = [], [], []
    for i in range(6):
        held = sorted(
            (int(t), float(x), float(w)) for t, x, w in zip(ids[i], logprobs[i], weights[i], strict=True) if t >= 0
        )
        held += [(vocab - 1, 0.0, 0.0)] * (k - len(held))
        sorted_ids.append([t for t, _, _ in held])
        sorted_logprobs += [x for _, x, _ in held]
        sorted_weights += [w for _, _, w in held]
    kind = "<f4" if full else "<f2"

    def planes(values, of):
        raw = np.array(values, dtype=of).tobytes()
        width = np.dtype(of).itemsize
        return b"".join(raw[start::width] for start in range(width))

    coded = [elias_fano(row, vocab) for row in sorted_ids]
    payload = struct.pack("<2d", *TAUS)
    payload += struct.pack("<6H", 3, 2 if varies else 3, 3, 3, 3, 3) if varies else b""
    payload += b"".join(b"".join(part) for part in zip(*coded, strict=True)) + planes(sorted_logprobs, kind)
    tails = 1 - torch.stack([(logprobs.double() / t - log_z.view(6, 2)[:, i : i + 1]).exp().sum(-1)
                             for i, t in enumerate(TAUS)], dim=-1)  # fmt: skip
    logits = torch.where(tails > 0, torch.logit(tails.clamp(1e-12, 1 - 1e-7)), -math.inf).numpy()
    payload += log_z.numpy().astype("<f4").tobytes() if full else logits.astype("<f2").tobytes()
    payload += planes(sorted_weights, "<f4") if weighted else b""
    flags = 1 * full + 2 * varies + 4 * weighted
    header = b"LIMBECK\0" + struct.pack("<4H4I", 2, flags, 2, 0, rows, length, k, vocab)
    header += struct.pack("<f", 2.0 if weighted else math.nan) + bytes.fromhex(name[:32] + asked[:32])
    header += struct.pack("<Q", len(payload))
    checksum = zlib.crc32(header + bytes(4) + payload)
    assert data == header + struct.pack("<I", checksum) + payload
    limit = largest_reply(6, k, vocab, 2)
    assert limit == len(data) if full and varies and weighted else limit > len(data)

    held = decode_targets(data).targets
    for i in range(6):
        order = [j for j in logprobs[i].argsort(descending=True).tolist() if ids[i, j] >= 0]
        n = len(order)
        assert held.token_ids.view(6, k)[i].tolist() == ids[i, order].tolist() + [-1] * (k - n)
        wanted = logprobs[i, order].double()
        if not full:  # the head gets the mass that the tail leaves it
            rounded = torch.from_numpy(wanted.numpy().astype(np.float16).astype(np.float64))
            tail = 1 / (1 + math.exp(-float(np.float16(logits[i, TAUS.index(1.0)]))))
            wanted = rounded - rounded.logsumexp(-1) + math.log1p(-tail)
        close(held.logprobs.view(6, k)[i, :n], wanted, rtol=0 if full else 1e-5, atol=0 if full else 1e-6)
        if weighted:
            close(held.weights.view(6, k)[i, :n], weights[i, order], rtol=0, atol=0)
    assert held.sampling_temperature == (2.0 if weighted else None)
