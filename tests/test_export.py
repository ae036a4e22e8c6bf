"""Exports: block formats to the bit, packed checkpoints, GGUF files, refusals."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import limbeck, save_model, tiny_model
from limbeck.config import TernaryConfig
from limbeck.errors import LimbeckError
from limbeck.export.blocks import BLOCK_TYPES, decode_blocks, encode_blocks
from limbeck.export.disk import DiskTensors
from limbeck.export.gguf import GGUFExport
from limbeck.export.inspect import inspect_gguf
from limbeck.export.packed import export_packed, verify_packed
from limbeck.export.source import ExportSource, model_folder
from limbeck.export.verify import weights_equal
from limbeck.export.vocabulary import splitting_rule
from limbeck.students.build import make_ternary
from limbeck.students.ternary import TernaryTensor

BASE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MOE = {
    **BASE, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "norm_topk_prob": True, "decoder_sparse_step": 1,
}  # fmt: skip
SHAPES = {
    "llama": {**BASE, "model_type": "llama"},
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 64},
    "qwen3moe": {**MOE, "model_type": "qwen3_moe"},
    "qwen3next": {
        **MOE, "model_type": "qwen3_next", "num_hidden_layers": 4, "shared_expert_intermediate_size": 256,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
}  # fmt: skip


def ternary_folder(folder, shape="llama", group=256, **changes):
    """A random ternary student on disk, with the shipped tokenizer."""
    model = tiny_model(**{**SHAPES[shape], **changes})
    make_ternary(model, TernaryConfig(group_size=group))
    return save_model(model, folder / "final")


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 2), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=15, deadline=None)
def test_blocks_hold_codes_and_scales_exactly(kind, rows, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = 256 * blocks
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0, :256] = 0  # an empty group keeps its scale in the bytes
    scales = torch.rand(rows, blocks, generator=generator).half()
    tensor = TernaryTensor(codes, scales)
    data = encode_blocks(tensor, kind)
    assert data.shape == (rows, columns // kind.columns * kind.bytes)
    assert np.array_equal(decode_blocks(data, kind, columns), tensor.dequantise().numpy())
    d = data.reshape(rows, -1, kind.bytes)
    halves = d[..., -2:] if kind.name.startswith("tq") else d[..., :2]
    stored = torch.from_numpy(halves.copy().view(np.float16)[..., 0])
    assert torch.equal(stored, scales.repeat_interleave(256 // kind.columns, dim=-1))


def test_bytes_of_a_block_are_as_documented():
    codes = torch.zeros(1, 64, dtype=torch.int8)
    codes[0, 1], codes[0, 6] = 1, -1
    data = encode_blocks(TernaryTensor(codes, torch.tensor([[2.0]]).half()), BLOCK_TYPES["q2_0"])
    assert data[0, :2].tobytes() == np.float16(2.0).tobytes()
    assert data[0, 2] == 0b01_01_10_01
    assert data[0, 3] == 0b01_00_01_01
    with pytest.raises(LimbeckError, match="groups of 64 are no multiple of tq2_0's block of 256"):
        encode_blocks(
            TernaryTensor(torch.zeros(1, 256, dtype=torch.int8), torch.ones(1, 4).half()), BLOCK_TYPES["tq2_0"]
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gguf_file_is_exactly_the_student(tmp_path, shape):
    folder = ternary_folder(tmp_path, shape)
    for kind in ("tq2_0", "tq1_0", "q2_0", "q4_0", "f16"):
        export = GGUFExport(folder, kind)
        path = tmp_path / f"{kind}.gguf"
        assert export.write(path)["type"] == kind
        assert weights_equal(export, path) == []
        assert not list(tmp_path.glob(".*.tmp"))
    found = inspect_gguf(tmp_path / "tq2_0.gguf")
    assert found["architecture"] == shape
    kinds = {tensor["name"]: tensor["type"] for tensor in found["tensors"]}
    assert kinds["token_embd.weight"] == "q8_0"
    assert kinds["output_norm.weight"] == "f32"
    assert "output.weight" not in kinds  # tied
    assert "tq2_0" in kinds.values()
    if "moe" in shape or "next" in shape:
        assert kinds["blk.0.ffn_gate_exps.weight"] == "tq2_0"
        assert kinds["blk.0.ffn_gate_inp.weight"] == "f32"


def test_a_changed_weight_is_noticed(tmp_path):
    folder = ternary_folder(tmp_path)
    export, path = GGUFExport(folder, "tq2_0"), tmp_path / "m.gguf"
    export.write(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert len(weights_equal(export, path)) == 1


def test_auto_takes_the_smallest_exact_type(tmp_path):
    assert GGUFExport(ternary_folder(tmp_path / "a", group=256)).write(tmp_path / "a.gguf")["type"] == "tq2_0"
    assert GGUFExport(ternary_folder(tmp_path / "b", group=128)).write(tmp_path / "b.gguf")["type"] == "q2_0"
    assert GGUFExport(ternary_folder(tmp_path / "c", group=32)).write(tmp_path / "c.gguf")["type"] == "q4_0"
    dense = save_model(tiny_model(**SHAPES["llama"]), tmp_path / "d")
    assert GGUFExport(dense).write(tmp_path / "d.gguf")["type"] == "f16"


@pytest.mark.parametrize(("changes", "kind", "message"), [
    ({"group": 128}, "tq2_0", "groups of 128 are no multiple of tq2_0's block of 256"),
    ({"group": 16}, "auto", "no type holds every ternary weight exactly"),
    ({"hidden_act": "gelu"}, "tq2_0", "hidden_act is gelu"),
    ({"attention_bias": True}, "tq2_0", "attention_bias is True"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}, "tq2_0", "RoPE of type llama3"),
])  # fmt: skip
def test_what_gguf_cannot_express_is_refused_with_a_reason(tmp_path, changes, kind, message):
    group = changes.pop("group", 256)
    folder = ternary_folder(tmp_path, "llama", group, **changes)
    with pytest.raises(LimbeckError, match=message):
        GGUFExport(folder, kind).write(tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


def test_other_architectures_and_dense_models_are_refused(tmp_path):
    other = save_model(tiny_model(model_type="gpt2", n_embd=32, n_layer=1, n_head=2), tmp_path / "gpt2")
    with pytest.raises(LimbeckError, match="model_type gpt2 can not be exported to GGUF"):
        GGUFExport(other, "f16").write(tmp_path / "m.gguf")
    dense = save_model(tiny_model(), tmp_path / "dense")
    with pytest.raises(LimbeckError, match=r"has no ternary weights and --type is tq2_0"):
        GGUFExport(dense, "tq2_0").write(tmp_path / "m.gguf")
    with pytest.raises(LimbeckError, match="holds no finished model"):
        model_folder(tmp_path)


def test_tensors_are_read_one_at_a_time_by_runtime_names(tmp_path):
    folder = ternary_folder(tmp_path, "qwen3moe")
    disk = DiskTensors(folder)
    from limbeck.models import load_causal_lm

    state = load_causal_lm(str(folder), dtype="float32").state_dict()
    state.pop("lm_head.weight", None)
    assert set(disk.names()) - {"lm_head.weight"} == set(state)
    for name, value in state.items():
        assert disk.shape(name) == tuple(value.shape)
        assert torch.equal(disk.get(name), value), name


def test_splitting_rules():
    gpt2 = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    assert splitting_rule(gpt2) == "gpt-2"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    parts = [split, {"type": "ByteLevel", "use_regex": False}]
    qwen = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    assert splitting_rule(qwen) == "qwen2"
    split["pattern"]["Regex"] = pattern.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
    assert splitting_rule(qwen) == "dbrx"
    qwen["model"]["ignore_merges"] = True
    assert splitting_rule(qwen) == "llama-bpe"
    parts[1]["use_regex"] = True
    with pytest.raises(LimbeckError, match="no llama.cpp name for"):
        splitting_rule(qwen)
    parts[1]["use_regex"] = False
    split["behavior"] = "Removed"
    with pytest.raises(LimbeckError, match="no llama.cpp name for"):
        splitting_rule(qwen)
    split["behavior"] = "Isolated"
    split["pattern"]["Regex"] = "."
    with pytest.raises(LimbeckError, match="no llama.cpp name for"):
        splitting_rule(qwen)
    parts[:] = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]
    with pytest.raises(LimbeckError, match="ignore_merges: true, a rule that GGUF export has no llama.cpp name for"):
        splitting_rule(qwen)
    qwen["model"]["ignore_merges"] = False
    assert splitting_rule(qwen) == "refact"
    with pytest.raises(LimbeckError, match="ignore_merges: true"):
        splitting_rule({**gpt2, "model": {"type": "BPE", "ignore_merges": True}})
    with pytest.raises(LimbeckError, match="knows byte-level BPE, and"):
        splitting_rule({"model": {"type": "Unigram"}})
    with pytest.raises(LimbeckError, match="adds a space"):
        splitting_rule({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}})


@pytest.mark.parametrize("shape", ["llama", "qwen3moe", "qwen3next"])
def test_a_packed_checkpoint_loads_with_training_codes(tmp_path, shape):
    folder = ternary_folder(tmp_path, shape, group=128)
    source = ExportSource.open(folder)
    found = export_packed(source, tmp_path / "packed", "f32")
    assert found["bits_per_ternary_weight"] == pytest.approx(2.125)
    assert verify_packed(source, tmp_path / "packed")
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        found, wanted = packed(input_ids=ids).logits, source.model(input_ids=ids).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(LimbeckError, match="is packed already"):
        ExportSource.open(tmp_path / "packed")


@pytest.mark.parametrize(("shape", "tied"), [("llama", True), ("llama", False), ("qwen3moe", True)])
def test_the_rest_may_be_float8(tmp_path, shape, tied):
    folder = ternary_folder(tmp_path, shape, group=128, tie_word_embeddings=tied)
    source = ExportSource.open(folder)
    half = export_packed(source, tmp_path / "half", "bf16")
    small = export_packed(source, tmp_path / "small", "fp8")
    assert small["bytes"] < 0.7 * half["bytes"]
    assert verify_packed(source, tmp_path / "small")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(model, "float8")
    found, wanted = dict(model.named_parameters()), dict(source.model.named_parameters())
    for name in set(found) & set(wanted):
        limit = 2**-4 if found[name].ndim == 2 else 2**-8
        largest = wanted[name].abs().amax(dim=-1, keepdim=True) * 2**-9 + wanted[name].abs() * limit
        assert bool(((found[name].float() - wanted[name]).abs() <= largest + 1e-8).all()), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits.float(), source.model(input_ids=ids).logits
    assert float((ours.softmax(-1) - theirs.softmax(-1)).abs().sum(-1).mean()) < 0.2


def test_the_command_line_exports_inspects_and_checks(tmp_path):
    ternary_folder(tmp_path / "student", "llama", 128)
    done = limbeck("export", tmp_path, "--format", "gguf", "--group-size", "128", "--verify", "--json")
    found = json.loads(done.stdout)
    assert found["weights_equal"] is True
    assert found["type"] == "q2_0"
    assert found["gguf_mb"] < found["checkpoint_mb"] / 2
    listed = json.loads(limbeck("inspect", found["output"], "--json").stdout)
    assert listed["architecture"] == "llama"
    assert "bits/weight" in limbeck("inspect", found["output"]).stdout
    packed = limbeck(
        "export", "--input", tmp_path, "--output", tmp_path / "p", "--format", "packed", "--verify", "--json"
    )
    assert json.loads(packed.stdout)["weights_equal"] is True
    for arguments, message in (
        (
            ["export", tmp_path, "--group-size", "256"],
            "--group-size is 256 and the student was trained with groups of 128",
        ),
        (["export", tmp_path / "nowhere"], "holds no finished model"),
        (["inspect", tmp_path / "p" / "config.json"], "is no GGUF file"),
        (["inspect"], "needs a file"),
    ):
        refused = limbeck(*arguments, check=False)
        assert refused.returncode in (1, 2)
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
