"""The C++ kernels at every level of instructions: against exact integers, the gguf package and NumPy."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.kernels import native, reference

_native = native()
pytestmark = pytest.mark.skipif(_native is None, reason="the extension is not built here")
TYPES = ("tq2_0", "tq1_0", "q2_0", "q4_0", "q8_0")
LEVELS = ("scalar", "avx2", "avx512")


def random_blocks(name: str, rows: int, columns: int, seed: int = 0, ternary: bool = False):
    """Codes, scales (as float16's bits) and what they stand for in float64."""
    kind, rng = reference.BLOCKS[name], np.random.default_rng(seed)
    low, high = (-1, 1) if ternary else (-kind.offset, kind.most - kind.offset)
    codes = rng.integers(low, high + 1, (rows, columns)).astype(np.int16)
    scales = np.abs(rng.normal(0.0, 0.02, (rows, columns // kind.columns))).astype(np.float16)
    return codes, scales, codes * scales.astype(np.float64).repeat(kind.columns, axis=1)


def int8_per(x: np.ndarray, width: int) -> np.ndarray:
    """Activations as int8 stands for them, one scale for `width` columns, in float64."""
    parts = x.astype(np.float64).reshape(len(x), -1, width)
    step = np.abs(parts).max(axis=-1, keepdims=True) / 127.0
    return (np.rint(parts / step) * step).reshape(x.shape)


@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_those_of_the_gguf_package(name):
    codes, scales, weights = random_blocks(name, 7, 512)
    packed = _native.pack_blocks(name, codes, scales.view(np.uint16))
    assert np.array_equal(packed, reference.pack_blocks(name, codes, scales.view(np.uint16)))
    assert np.array_equal(_native.unpack_blocks(name, packed), weights.astype(np.float32))
    assert np.array_equal(reference.unpack_blocks(name, packed), weights.astype(np.float32))
    if name != "q2_0":  # the package does not know it yet
        theirs = gguf.quants.dequantize(packed, getattr(gguf.GGMLQuantizationType, name.upper()))
        assert np.array_equal(theirs, weights.astype(np.float32))


_SCRIPT = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from test_kernels import check_products
check_products()
"""


def check_products() -> None:
    """Products of every type at the level of this process; run in processes of their own, one for each level."""
    assert _native.level() == os.environ["LIMBECK_KERNELS"]
    for threads in (1, 3):
        pool = _native.Pool(threads)
        for name in TYPES:
            for rows, columns in ((1, 256), (33, 768), (100, 512)):
                for ternary in (False, True):
                    _check_product(pool, name, rows, columns, ternary)
    _check_largest(_native.Pool(2))


def _check_product(pool, name: str, rows: int, columns: int, ternary: bool) -> None:
    codes, scales, weights = random_blocks(name, rows, columns, ternary=ternary)
    if name in ("q2_0", "q4_0"):  # a group of 128 in blocks of one scale: tiles of 128
        share = 128 // reference.BLOCKS[name].columns
        scales = scales[:, ::share].repeat(share, axis=1) if ternary else scales
        weights = codes * scales.astype(np.float64).repeat(reference.BLOCKS[name].columns, axis=1)
    packed = _native.pack_blocks(name, codes, scales.view(np.uint16))
    held = _native.Weights(name, packed[None], pool)
    two_bits = name not in ("q8_0", "q4_0") or (name == "q4_0" and ternary)
    assert held.kind.startswith("two_bits") == two_bits
    assert np.array_equal(held.row(0, rows - 1), weights[-1].astype(np.float32))
    for tokens in (1, 2, 5, 8, 17):
        x = np.random.default_rng(tokens).normal(0.0, 1.0, (tokens, columns)).astype(np.float32)
        exact = int8_per(x, columns if two_bits else 32) @ weights.T
        got = held.multiply(x, pool)
        tolerance = 1e-5 * np.abs(weights).sum(axis=1).max() * np.abs(x).max()
        # A tie in rounding an activation may fall the other way in float32: one code of one column.
        assert np.abs(got - exact).max() < tolerance + np.abs(weights).max() * np.abs(x).max() / 127.0 * 1.01, (
            name,
            rows,
            tokens,
        )
        assert np.median(np.abs(got - exact)) < tolerance


def _check_largest(pool) -> None:
    """All weights +1 (and 2) with activations of 127: the sums that overflow 16 bits where a kernel is careless."""
    columns = 14336
    for name, code in (
        ("tq2_0", 1),
        ("tq2_0", -1),
        ("q2_0", 2),
        ("q4_0", 7),
        ("q4_0", -8),
        ("q8_0", 127),
        ("q8_0", -128),
    ):
        kind = reference.BLOCKS[name]
        codes = np.full((40, columns), code, np.int16)
        scales = np.ones((40, columns // kind.columns), np.float16)
        held = _native.Weights(name, _native.pack_blocks(name, codes, scales.view(np.uint16))[None], pool)
        for sign in (1.0, -1.0):
            for tokens in (1, 9):
                x = np.full((tokens, columns), 127.0 * sign, np.float32)
                assert np.array_equal(
                    held.multiply(x, pool), np.full((tokens, 40), code * 127.0 * sign * columns, np.float32)
                ), (name, code)


@pytest.mark.parametrize("level", LEVELS)
def test_products_are_exact_at_every_level(level):
    if LEVELS.index(level) > LEVELS.index(_native.level()):
        pytest.skip(f"this processor runs {_native.level()} at most")
    words = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parent)]
    subprocess.run(words, check=True, env={**os.environ, "LIMBECK_KERNELS": level})


def test_a_level_that_is_unknown_is_refused():
    words = [sys.executable, "-c", "from limbeck.kernels import native; native().Pool(2)"]
    env = {**os.environ, "LIMBECK_KERNELS": "sse9"}
    found = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert found.returncode != 0
    assert "there are scalar, neon, avx2 and avx512" in found.stderr


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.sampled_from(TYPES), st.integers(0, 2**31),
    st.booleans(), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_native_and_numpy_agree(rows, blocks, tokens, name, seed, ternary, share):
    columns = blocks * reference.BLOCKS[name].columns
    codes, scales, _ = random_blocks(name, rows, columns, seed, ternary)
    scales = np.ascontiguousarray(scales[:, ::share].repeat(share, axis=1)[:, : scales.shape[1]])
    packed = _native.pack_blocks(name, codes, scales.view(np.uint16))[None]
    x = np.random.default_rng(seed).normal(0.0, 1.0, (tokens, columns)).astype(np.float32)
    pool = _native.Pool(1)
    ours = _native.Weights(name, packed, pool).multiply(x, pool)
    theirs = reference.Weights(name, packed, reference.Pool()).multiply(x, reference.Pool())
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5 * np.abs(ours).max() + 1e-6)


def test_quantise_rounds_as_training_does():
    import torch

    from limbeck.students.ternary import round_activations

    x = np.random.default_rng(0).normal(0.0, 3.0, (50, 200)).astype(np.float32)
    codes, scales, sums = _native.quantise_activations(x, 128, True)
    trained = round_activations(torch.from_numpy(x), 8).numpy()
    np.testing.assert_allclose(codes * scales[:, :1], trained, rtol=1e-6, atol=1e-6)
    assert np.array_equal(sums[:, 0], codes[:, :128].sum(axis=1))
    assert np.array_equal(sums[:, 1], codes[:, 128:].sum(axis=1))
    theirs = reference.quantise_activations(x, 128, True)
    for ours, numpys in zip((codes, scales, sums), theirs, strict=True):
        np.testing.assert_array_equal(ours, numpys)


def test_experts_are_each_their_own_matrix():
    rng = np.random.default_rng(1)
    parts = [random_blocks("tq2_0", 45, 256, seed) for seed in range(5)]
    packed = np.stack([_native.pack_blocks("tq2_0", codes, scales.view(np.uint16)) for codes, scales, _ in parts])
    pool = _native.Pool(2)
    held = _native.Weights("tq2_0", packed, pool)
    x = rng.normal(0.0, 1.0, (20, 256)).astype(np.float32)
    chosen = np.stack([rng.permutation(5)[:2] for _ in range(20)]).astype(np.int32)
    got = held.multiply_experts(x, chosen, pool)
    exact = int8_per(x, 256)
    for token in range(20):
        for place in range(2):
            wanted = parts[chosen[token, place]][2] @ exact[token]
            np.testing.assert_allclose(got[token, place], wanted, atol=1e-4)


def zeros(pool):
    return _native.Weights("q8_0", np.zeros((1, 2, 34), np.uint8), pool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: _native.pack_blocks("tq9", np.zeros((1, 256), np.int16), np.zeros((1, 1), np.uint16)), "tq9"),
        (lambda p: _native.pack_blocks("tq2_0", np.zeros((1, 100), np.int16), np.zeros((1, 1), np.uint16)), "100"),
        (lambda p: _native.pack_blocks("tq2_0", np.full((1, 256), 2, np.int16), np.zeros((1, 1), np.uint16)), "is 2"),
        (lambda p: _native.Weights("q8_0", np.zeros((1, 2, 33), np.uint8), p), "33"),
        (lambda p: zeros(p).multiply(np.zeros((1, 64), np.float32), p), "64.*32"),
        (lambda p: zeros(p).multiply_experts(np.zeros((1, 32), np.float32), np.full((1, 1), 7, np.int32), p), "rt 7"),
        (lambda p: _native.Pool(-1), "threads is -1"),
        (lambda p: _native.quantise_activations(np.ones((1, 200), np.float32), 2**64 - 1, True), "block is"),
        (lambda p: reference.Weights("q8_0", np.zeros((1, 2, 34), np.uint8), p).multiply_experts(
            np.zeros((1, 32), np.float32), np.full((1, 1), -1, np.int32), p), "expert -1"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(_native.Pool(1))


def test_without_the_extension_numpy_works_and_says_so_once():
    script = (
        "import sys; sys.modules['limbeck.kernels._native'] = None\n"
        "import numpy as np; from limbeck import kernels\n"
        "p = kernels.Pool(); w = kernels.Weights('q8_0', np.zeros((1, 2, 34), np.uint8), p)\n"
        "print(w.multiply(np.zeros((1, 32), np.float32), p).shape, kernels.level())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "(1, 2) numpy"
    assert found.stderr.count("not built") == 1
