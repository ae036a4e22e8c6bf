"""The engine's logits against transformers' own, for every architecture; prefill, sequences, caches, bad files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import save_model, tiny_model
from limbeck.config import TernaryConfig
from limbeck.export.gguf import GGUFExport
from limbeck.kernels import native
from limbeck.models import load_causal_lm
from limbeck.students.build import make_ternary
from test_gguf_oracle import CASES, TERNARY_CASES, lively_model

_native = native()
pytestmark = pytest.mark.skipif(_native is None, reason="the extension is not built here")
IDS = torch.randint(5, 4000, (45,), generator=torch.Generator().manual_seed(1))


def exported(root, case, kind, more=None):
    """A model's GGUF file with its embedding in F16, and the model's logits `[T, V]` in transformers."""
    ternary = kind != "f16"
    model = lively_model(3, **{**(TERNARY_CASES if ternary else CASES), **(more or {})}[case])
    if ternary:
        make_ternary(model, TernaryConfig(group_size=256, activation_bits=8))
    folder = save_model(model, root / "final")
    GGUFExport(folder, kind, "f16").write(root / "m.gguf")
    with torch.no_grad():
        loaded = load_causal_lm(str(folder), dtype="float32").eval()
        logits = loaded(input_ids=IDS[None], use_cache=False).logits[0]
    return str(root / "m.gguf"), logits.float().numpy()


def away(found, wanted):
    """Distance of logits at each position, as a share of the wanted ones' size."""
    return np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def prefill(engine, ids=IDS):
    line = engine.create()
    return line, engine.forward([(line, ids.tolist(), True)])


@pytest.mark.parametrize("case", CASES)
def test_a_dense_models_logits_are_transformers(tmp_path, case):
    """Float weights, so only float16 in the file and the cache stands between the two."""
    path, wanted = exported(tmp_path, case, "f16")
    engine = _native.Engine(path, 2, cache="f32")
    _, found = prefill(engine)
    routed = "moe" in case or "next" in case  # where a router all but draws, the last bit decides on the expert
    assert np.quantile(away(found, wanted), 0.8 if routed else 1.0) < 1e-2
    assert np.mean(found.argmax(axis=1) == wanted.argmax(axis=1)) >= (0.9 if routed else 0.99)
    line = engine.create()
    singly = np.concatenate([engine.forward([(line, [token], False)]) for token in IDS.tolist()])
    np.testing.assert_array_equal(singly, found)


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "tq2_0") for case in TERNARY_CASES), ("llama", "q2_0"), ("qwen3moe", "q4_0")]
)
def test_a_ternary_models_logits_are_the_students(tmp_path, case, kind):
    """The student rounds activations to int8 a token, and so does the engine."""
    path, wanted = exported(tmp_path, case, kind)
    engine = _native.Engine(path, 2, cache="f32")
    _, found = prefill(engine)
    assert away(found, wanted)[0] < 1e-5
    # Where float32 sums differ in their last bit, an activation now and then falls to the other code.
    assert np.median(away(found, wanted)) < 2e-2
    line = engine.create()
    singly = np.concatenate([engine.forward([(line, [token], False)]) for token in IDS.tolist()])
    np.testing.assert_array_equal(singly, found)


def test_norms_over_all_heads_of_one_key_value_head(tmp_path):
    """One head for keys: a norm over all heads is as wide as one over a head, and still no second one."""
    one = {"olmo2-one": {**CASES["olmo2"], "num_key_value_heads": 1}}
    path, wanted = exported(tmp_path, "olmo2-one", "f16", one)
    _, found = prefill(_native.Engine(path, 1, cache="f32"))
    assert away(found, wanted).max() < 1e-2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file with attention alone, one with recurrent layers and experts, both ternary."""
    return {case: exported(tmp_path_factory.mktemp(case), case, "tq2_0")[0] for case in ("llama", "qwen3next")}


@pytest.fixture(scope="module")
def hostile(files, tmp_path_factory):
    """Those and one of our own, to be mutated."""
    folder = tmp_path_factory.mktemp("own")
    save_model(lively_model(4, **OWN_CASES["retnet-hrm"]), folder / "final")
    GGUFExport(folder / "final", "f16").write(folder / "m.gguf")
    return {**files, "retnet": str(folder / "m.gguf")}


@pytest.mark.parametrize("case", ["llama", "qwen3next"])
@pytest.mark.parametrize("cache", ["f16", "f32", "int8"])
def test_company_and_chunks_change_nothing(files, case, cache):
    """Several sequences in one step, long texts in parts: each sequence's logits are those it has alone."""
    engine = _native.Engine(files[case], 2, cache=cache, tokens_at_once=16)
    alone = [prefill(engine, IDS[start:])[1] for start in (0, 10, 30)]
    lines = [engine.create() for _ in range(3)]
    first = engine.forward(
        [(line, IDS[start : start + 7].tolist(), True) for line, start in zip(lines, (0, 10, 30), strict=True)]
    )
    np.testing.assert_array_equal(first, np.concatenate([logits[:7] for logits in alone]))
    rest = engine.forward(
        [
            (lines[2], IDS[37:].tolist(), False),
            (lines[0], IDS[7:].tolist(), True),
            (lines[1], IDS[17:18].tolist(), False),
        ]
    )
    np.testing.assert_array_equal(rest[0], alone[2][-1])
    np.testing.assert_array_equal(rest[1:-1], alone[0][7:])
    np.testing.assert_array_equal(rest[-1], alone[1][7])
    assert [engine.length(line) for line in lines] == [45, 8, 15]


def test_one_thread_and_three_agree(files):
    alone = prefill(_native.Engine(files["qwen3next"], 1))[1]
    np.testing.assert_array_equal(alone, prefill(_native.Engine(files["qwen3next"], 3, pin=True))[1])
    np.testing.assert_array_equal(alone, prefill(_native.Engine(files["qwen3next"], 2, numa_aware=True))[1])


@pytest.mark.parametrize("case", ["llama", "qwen3next"])
def test_a_fork_goes_on_from_where_it_was(files, case):
    engine = _native.Engine(files[case], 1)
    _, whole = prefill(engine, IDS)
    short, _ = prefill(engine, IDS[:20])
    other = engine.fork(short)
    engine.forward([(short, [7, 8, 9], False)])  # what one goes on with is not seen by the other
    found = engine.forward([(other, IDS[20:].tolist(), True)])
    np.testing.assert_array_equal(found, whole[20:])
    assert engine.length(other) == 45
    assert engine.bytes(other) > 0


def test_a_sequence_is_cut_where_the_model_can_forget(files):
    engine = _native.Engine(files["llama"], 1)
    line, whole = prefill(engine, IDS)
    assert engine.truncate(line, 12)
    np.testing.assert_array_equal(engine.forward([(line, IDS[12:].tolist(), True)]), whole[12:])
    recurrent = _native.Engine(files["qwen3next"], 1)
    line, whole = prefill(recurrent, IDS)
    assert not recurrent.truncate(line, 12)
    assert recurrent.length(line) == 45
    assert recurrent.truncate(line, 0)
    np.testing.assert_array_equal(recurrent.forward([(line, IDS.tolist(), True)]), whole)


def test_a_cache_of_int8_is_near_that_of_floats(tmp_path):
    path, wanted = exported(tmp_path, "qwen2", "f16")
    found = prefill(_native.Engine(path, 1, cache="int8"))[1]
    assert 1e-6 < np.median(away(found, wanted)) < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, s: e.forward([(s + 9, [1], False)]), "no sequence"),
        (lambda e, s: e.forward([(s, [], False)]), "no tokens"),
        (lambda e, s: e.forward([(s, [1], False), (s, [2], False)]), "two requests"),
        (lambda e, s: e.forward([(s, [4096], False)]), "token 4096 .* 4096"),
        (lambda e, s: e.forward([(s, [-1], False)]), "token -1"),
        (lambda e, s: e.forward([(s, [1] * 321, False)]), "321 .* 320"),
        (lambda e, s: e.drop(s + 1), "no sequence"),
    ],
)
def test_wrong_requests_change_nothing(files, call, message):
    engine = _native.Engine(files["llama"], 1)
    line = engine.create()
    with pytest.raises(ValueError, match=message):
        call(engine, line)
    assert engine.length(line) == 0


def test_metadata_come_back_as_they_were_written(files):
    import gguf

    reader = gguf.GGUFReader(files["llama"])
    found = _native.Engine(files["llama"], 1).metadata()
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        wanted, got = field.contents(), found[key]
        got = got.tolist() if isinstance(got, np.ndarray) else got
        assert got == (pytest.approx(wanted, rel=1e-6) if isinstance(wanted, float) else wanted), key
    tensors = {name: (kind, shape) for name, kind, shape, _ in _native.GgufFile(files["llama"]).tensors()}
    assert tensors == {t.name: (t.tensor_type.name.lower(), [int(n) for n in t.shape]) for t in reader.tensors}


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_files_are_refused_or_run(hostile, tmp_path, seed):
    """In a process of its own, which a crash would end; `make sanitize` does it 2,000 times under sanitizers."""
    copies = []
    for case, path in hostile.items():
        copies.append(tmp_path / f"{case}.gguf")
        copies[-1].write_bytes(Path(path).read_bytes())
    script = Path(__file__).parent / "mutated_files.py"
    words = [sys.executable, str(script), *map(str, copies), "--count", "150", "--seed", str(seed)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, (found.returncode, found.stderr[-2000:])
    loaded, refused = (int(word) for word in found.stdout.replace(":", " ").split() if word.isdigit() and word != "150")
    assert loaded > 5
    assert refused > 50


# Students of our own, whose GGUF architectures only this engine knows.

OWN_CASES = {
    "mhc_llama": {**CASES["llama"], "model_type": "mhc_llama", "mhc_streams": 3, "mhc_form": "dynamic"},
    "mhc_qwen3": {**CASES["qwen3"], "model_type": "mhc_qwen3", "mhc_streams": 2, "mhc_form": "static"},
    "mhc_qwen3_moe": {**CASES["qwen3moe"], "model_type": "mhc_qwen3_moe", "mhc_streams": 4, "mhc_form": "dynamic"},
    "latent": {
        **CASES["qwen3moe"], "model_type": "compressed_qwen3_moe",
        "expert_layers": [{"method": "latent", "rank": 24}] * 2,
    },
    "mixed": {
        **CASES["qwen3moe"], "model_type": "compressed_qwen3_moe",
        "expert_layers": [{"method": "shared_core", "rank": 8}, {"method": "prune", "experts": 3}],
    },
    "core_delta": {
        **CASES["qwen3next"], "model_type": "compressed_qwen3_next",
        "expert_layers": [{"method": "core_delta", "rank": 16}, {"method": "latent", "rank": 32}] * 2,
    },
    "retnet": {
        "model_type": "retnet_hrm", "hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2,
        "num_attention_heads": 6, "value_expansion": 2, "rms_norm_eps": 0.03,
    },
    "retnet-hrm": {
        "model_type": "retnet_hrm", "hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 4,
        "num_attention_heads": 4, "value_expansion": 1, "H_cycles": 2, "L_cycles": 2, "segments": 2,
        "rms_norm_eps": 0.03, "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", OWN_CASES)
def test_our_own_architectures_logits_are_transformers(tmp_path, case):
    model = lively_model(4, **OWN_CASES[case])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mhc_" in name:  # which begin as no mixing at all
                p.copy_(
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
                    * (0.5 if p.ndim == 1 else 0.05)
                )
    folder = save_model(model, tmp_path / "final")
    GGUFExport(folder, "f16", "f16").write(tmp_path / "m.gguf")
    with torch.no_grad():
        loaded = load_causal_lm(str(folder), dtype="float32").eval()
        wanted = loaded(input_ids=IDS[None], use_cache=False).logits[0].float().numpy()
    engine = _native.Engine(str(tmp_path / "m.gguf"), 2, cache="f32")
    assert engine.architecture.startswith("limbeck-")
    line, found = prefill(engine)
    assert np.quantile(away(found, wanted), 0.8) < 1e-2
    other = engine.create()
    singly = np.concatenate([engine.forward([(other, [token], False)]) for token in IDS.tolist()])
    np.testing.assert_array_equal(singly, found)
    if case.startswith("retnet"):
        assert engine.bytes(line) == engine.bytes(engine.create())
        assert not engine.can_truncate


@pytest.mark.parametrize("case", ["mhc", "cores", "retnet"])
def test_our_own_ternary_students_run(tmp_path, case):
    """Ternary matrices of cores, latent experts and retention: int8 activations as in training."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    settings = {
        "mhc": {**OWN_CASES["mhc_llama"], **wide},
        "cores": {**OWN_CASES["mixed"], **wide, "moe_intermediate_size": 256, "num_key_value_heads": 2},
        "retnet": {**OWN_CASES["retnet-hrm"], **wide, "segments": 1},
    }[case]
    model = lively_model(5, **{key: value for key, value in settings.items() if case != "retnet" or key != "head_dim"})
    make_ternary(model, TernaryConfig(group_size=256, activation_bits=8))
    folder = save_model(model, tmp_path / "final")
    assert GGUFExport(folder, "auto", "f16").write(tmp_path / "m.gguf")["type"] == "tq2_0"
    with torch.no_grad():
        loaded = load_causal_lm(str(folder), dtype="float32").eval()
        wanted = loaded(input_ids=IDS[None], use_cache=False).logits[0].float().numpy()
    _, found = prefill(_native.Engine(str(tmp_path / "m.gguf"), 2, cache="f32"))
    assert away(found, wanted)[:8].min() < 1e-5
    assert np.median(away(found, wanted)) < 5e-2  # a state carries an activation's other code on


def ordinary_cases():
    """Every architecture with widths that ternary groups of 256 divide."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    experts = {**wide, "moe_intermediate_size": 256, "num_key_value_heads": 2}
    narrow = {key: value for key, value in wide.items() if key != "head_dim"}
    latent = [{"method": "latent", "rank": 256}] * 2
    return {
        **TERNARY_CASES,
        "mhc_llama": {**OWN_CASES["mhc_llama"], **wide},
        "mixed": {**OWN_CASES["mixed"], **experts},
        "latent": {**OWN_CASES["latent"], **experts, "expert_layers": latent},
        "retnet": {**OWN_CASES["retnet"], **narrow},
        "retnet-hrm": {**OWN_CASES["retnet-hrm"], **narrow, "segments": 1},
    }


@pytest.mark.parametrize("case", ordinary_cases())
def test_ordinary_weights_with_int8_activations(tmp_path, case):
    """As a model begins its training: logits within a hundredth and first choices, with the cache that is served."""
    ids = torch.randint(5, 4000, (200,), generator=torch.Generator().manual_seed(1))
    model = tiny_model(seed=3, **ordinary_cases()[case])
    make_ternary(model, TernaryConfig(group_size=256, activation_bits=8))
    folder = save_model(model, tmp_path / "final")
    GGUFExport(folder, "tq2_0", "f16").write(tmp_path / "m.gguf")
    with torch.no_grad():
        loaded = load_causal_lm(str(folder), dtype="float32").eval()
        wanted = loaded(input_ids=ids[None], use_cache=False).logits[0].float().numpy()
    _, found = prefill(_native.Engine(str(tmp_path / "m.gguf"), 1), ids)
    assert np.mean(away(found, wanted)) < 1e-2
    assert np.mean(found.argmax(axis=1) == wanted.argmax(axis=1)) >= 0.99
