"""Ternary weights in training: the quantiser, linears and fused experts, checkpoints, warm-up, resuming."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import save_model, stopped_after, tiny_model
from limbeck import DistillationTrainer
from limbeck.config import TernaryConfig
from limbeck.errors import ConfigError
from limbeck.models import load_causal_lm
from limbeck.students.build import choose_ternary, make_ternary
from limbeck.students.quantizer import pack_codes, unpack_codes
from limbeck.students.ternary import TernaryState, quantise, round_activations, ternarise
from limbeck.training.phases import train_recipe
from test_optim import EXPERTS
from test_trainer import arguments, weights, with_changes


def by_hand(weight, group, scale):
    """The formula, one group after the other, in float64; a scale has eight bits and lies where float16 is normal."""
    out = torch.zeros_like(weight, dtype=torch.float64)
    codes = torch.zeros_like(weight, dtype=torch.int8)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group].double()
            s = float(part.abs().mean() if scale == "absmean" else part.abs().max())
            exponent = math.floor(math.log2(s)) - 7 if s else 0
            s = min(max(round(s / 2.0**exponent) * 2.0**exponent, 2.0**-14), 65280.0)
            codes[row, start : start + group] = (part / s).round().clamp(-1, 1).to(torch.int8)
            out[row, start : start + group] = codes[row, start : start + group] * s
    return codes, out


@given(
    st.integers(1, 4), st.sampled_from([(8, 4), (16, 8), (16, 16)]), st.sampled_from(["absmean", "absmax"]),
    st.sampled_from([0, -10, -23, 12]), st.integers(0, 2**31 - 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_codes_and_scales_are_the_formula(rows, shape, scale, exponent, seed):
    """Weights of few bits in groups of a power of two: every mean is exact, so no rounding depends on luck."""
    columns, group = shape
    whole = torch.randint(-500, 501, (rows, columns), generator=torch.Generator().manual_seed(seed))
    weight = (whole.double() * 2.0 ** (exponent - 8)).float()
    codes, dense = by_hand(weight, group, scale)
    found = quantise(weight, group, scale)
    assert found.scales.dtype == torch.float16
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.dequantise().double(), dense)
    state = TernaryState(group, scale)
    assert torch.equal(ternarise(weight, state), found.dequantise())  # what training uses is what is exported


def test_a_scale_is_the_same_in_every_precision_that_computes():
    """Seven of eight float16 scales are no bfloat16; a packed student in bfloat16 would be another than was trained."""
    found = quantise(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), 32, "absmean")
    assert torch.equal(found.scales.bfloat16().half(), found.scales)
    assert torch.equal(found.dequantise().bfloat16().float(), found.dequantise())
    assert torch.equal(found.dequantise().half().float(), found.dequantise())


def test_scales_of_rows_and_tensors():
    weight = torch.randn(3, 5, 8)
    row = quantise(weight, "row", "absmean")
    assert row.scales.shape == (3, 5, 1)
    whole = quantise(weight, "tensor", "absmax")
    assert torch.equal(whole.scales.float()[1], weight[1].abs().max().bfloat16().float().expand(5, 1))
    mean = quantise(weight, "tensor", "absmean")
    torch.testing.assert_close(mean.scales[2, 0, 0].float(), weight[2].abs().mean(), atol=0, rtol=2**-8)
    with pytest.raises(ConfigError, match="group_size is 3 and a ternary weight has rows of 8"):
        quantise(weight, 3, "absmean")


def test_gradients_pass_straight_through():
    weight = torch.randn(4, 8, requires_grad=True)
    coefficient = torch.randn(4, 8)
    (ternarise(weight, TernaryState(4)) * coefficient).sum().backward()
    assert torch.equal(weight.grad, coefficient)
    x = torch.randn(3, 8, requires_grad=True)
    (round_activations(x, 8) * coefficient[:3]).sum().backward()
    assert torch.equal(x.grad, coefficient[:3])


def test_activations_have_255_levels_a_token():
    x = torch.randn(5, 64)
    step = x.abs().amax(-1, keepdim=True) / 127
    levels = round_activations(x, 8) / step
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert float((round_activations(x, 8) - x).abs().max()) <= float(step.max()) / 2 * 1.001
    assert round_activations(x, None) is x


def test_the_mixture_goes_from_shadow_to_ternary():
    weight = torch.randn(4, 8)
    state = TernaryState(4)
    ternary = ternarise(weight, state)
    for mix in (0.0, 0.25, 1.0):
        state.mix = mix
        torch.testing.assert_close(ternarise(weight, state), (1 - mix) * weight + mix * ternary)


@pytest.mark.parametrize("shape", [{}, EXPERTS, {**EXPERTS, "moe_intermediate_size": 12}], ids=["llama", "moe", "odd"])
def test_a_ternary_model_is_its_dense_twin(shape):
    """Without activation rounding the forward pass is exactly that of the exported weights, experts included."""
    plain = tiny_model(**shape)
    group = 4
    ids = torch.randint(0, 4096, (2, 9))
    model = tiny_model(**shape)
    make_ternary(model, TernaryConfig(group_size=group, activation_bits=None))
    twin = tiny_model(**shape)
    for name in model.config.quantization_config["weights"]:
        parameter = twin.get_parameter(name)
        parameter.data = quantise(parameter.data, group, "absmean").dequantise()
    with torch.no_grad():
        found = model(input_ids=ids).logits
        torch.testing.assert_close(found, twin(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        assert float((found - plain(input_ids=ids).logits).abs().max()) > 1e-4
    assert set(model.state_dict()) == set(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


def test_every_shadow_weight_of_an_moe_learns():
    model = tiny_model(**EXPERTS).train()
    make_ternary(model, TernaryConfig(preset="experts", group_size=8))
    model(input_ids=torch.randint(0, 4096, (4, 32))).logits.square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())


def test_presets_patterns_and_exclusions():
    model = tiny_model(**EXPERTS)
    experts = choose_ternary(model, TernaryConfig(preset="experts"))
    layer = "model.layers.0."
    assert experts == [f"{layer}mlp.experts.gate_up_proj", f"{layer}mlp.experts.down_proj"]
    assert len(choose_ternary(model, TernaryConfig())) == 6
    assert f"{layer}mlp.gate.weight" not in choose_ternary(model, TernaryConfig())
    chosen = choose_ternary(model, TernaryConfig(preset="experts", patterns=["q_proj"], exclude=["down_proj"]))
    assert chosen == [f"{layer}self_attn.q_proj.weight", f"{layer}mlp.experts.gate_up_proj"]
    for changes, message in (
        ({"patterns": ["nothing"]}, "matches no parameter"),
        ({"exclude": ["nothing"]}, "matches none of the weights"),
        ({"preset": "none"}, "chooses no weight"),
        ({"patterns": ["("]}, "is not a regular expression"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_ternary(model, TernaryConfig.model_validate(changes))
    with pytest.raises(ConfigError, match="can not be made ternary"):
        make_ternary(model, TernaryConfig(preset="none", patterns=["embed_tokens"], group_size=8))


@pytest.mark.parametrize("order", ["limbeck, transformers", "transformers, limbeck"])
def test_checkpoints_load_with_limbeck_imported_in_either_order(tmp_path, order):
    model = tiny_model(**EXPERTS)
    make_ternary(model, TernaryConfig(group_size=8))
    save_model(model, tmp_path / "m")
    ids = torch.arange(7).unsqueeze(0)
    torch.save(model(input_ids=ids).logits.detach(), tmp_path / "logits.pt")
    script = (
        f"import {order}, torch, sys\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/m')\n"
        "expected = torch.load(sys.argv[1] + '/logits.pt', weights_only=True)\n"
        "assert torch.equal(model(input_ids=torch.arange(7).unsqueeze(0)).logits, expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_limbeck_stays_light():
    script = "import limbeck, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_warm_up_zeros_and_flips_are_logged(packed, tmp_path):
    model = tiny_model()
    make_ternary(model, TernaryConfig(group_size=16))
    trainer = DistillationTrainer(
        model, arguments(tmp_path, max_steps=6, ternary_warmup_steps=4, learning_rate=1e-2), train_dataset=packed,
        eval_dataset=packed,
    )  # fmt: skip
    trainer.train()
    lines = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["ternary_mix"] for e in lines] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(0.05 < e["ternary_zeros"] < 0.8 for e in lines)
    assert all(0.0 < e["ternary_flips"] < 0.5 for e in lines)
    assert 0 < lines[0]["ternary_zeros/model.layers.0.mlp.up_proj"] < 1
    model.ternary_state.mix = 0.3
    trainer.evaluate()
    assert model.ternary_state.mix == 1.0
    late = DistillationTrainer(model, arguments(tmp_path, ternary_warmup_steps=9), train_dataset=packed)
    with pytest.raises(ConfigError, match="warmup_steps is 9 and the run has 2 steps"):
        late.train()


@pytest.mark.parametrize("shape", [{}, {"student": EXPERTS}], ids=["llama", "moe"])
def test_a_recipe_trains_ternary_and_resumes_to_the_bit(recipe_tree, packed, tmp_path, shape):
    config = {**recipe_tree["student"]["config"], **shape.get("student", {})}
    student = {"config": config, "ternary": {"group_size": 8, "warmup_steps": 3}}
    training = {**recipe_tree["training"], "max_steps": 6, "save_steps": 2, "eval_steps": 2}
    recipe = with_changes(recipe_tree, student=student, training=training, teacher={"use_cached_logits": False},
                          optimizer={"name": "muon_lion"})  # fmt: skip
    train_recipe(recipe, tmp_path / "whole")
    with stopped_after(saves=1):
        train_recipe(recipe, tmp_path / "cut")
    train_recipe(recipe, tmp_path / "cut")
    for name in ("final/ternary.safetensors", "best/ternary.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    saved = json.loads((tmp_path / "whole" / "final" / "config.json").read_text())["quantization_config"]
    assert saved["format"] == "shadow"
    found = load_causal_lm(str(tmp_path / "whole" / "final"), dtype="float32")
    assert found.ternary_state.group_size == 8
    shadow = load_file(tmp_path / "whole" / "final" / "ternary.safetensors")
    assert all(value.dtype == torch.float32 for value in shadow.values())
    assert weights(found).keys() >= {name for name in shadow if "experts" not in name}


@given(st.integers(1, 5), st.integers(1, 23), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_codes_pack_four_to_a_byte(rows, columns, seed):
    codes = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_codes(codes)
    assert packed.shape == (rows, -(-columns // 4))
    assert torch.equal(unpack_codes(packed, columns), codes)
    for row in range(rows):
        for byte in range(packed.shape[1]):
            fields = [
                (int(codes[row, c]) + 1 if c < columns else 1) << (2 * (c % 4)) for c in range(4 * byte, 4 * byte + 4)
            ]
            assert int(packed[row, byte]) == sum(fields)


def test_a_student_with_odd_widths_packs(tmp_path):
    """Rows of 42 inputs are no whole bytes; their packed form is the trained one all the same."""
    from limbeck.export.packed import export_packed, verify_packed
    from limbeck.export.source import ExportSource

    model = tiny_model(intermediate_size=42)
    make_ternary(model, TernaryConfig(group_size="row"))
    source = ExportSource.open(save_model(model, tmp_path / "final"))
    export_packed(source, tmp_path / "packed", "f32")
    assert verify_packed(source, tmp_path / "packed")
    packed = load_causal_lm(str(tmp_path / "packed"), dtype="float32").eval()
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(
            packed(input_ids=ids).logits, source.model(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
