"""Optimizers, schedules and ternary weights beside their definitions.

Updates and roundings are written out in float64; the defaults are those of docs and papers, said again here.
"""

import math

import numpy as np
import pytest
import torch

from conftest import rules, tiny_model
from limbeck.config import OptimizerConfig
from limbeck.errors import ConfigError
from limbeck.models import MatrixLayout, hidden_matrices
from limbeck.optim.groups import build_groups
from limbeck.optim.hybrid import HybridOptimizer
from limbeck.optim.schedules import Ramp
from limbeck.students.quantizer import to_float8
from limbeck.students.ternary import TernaryLinear, TernaryState, apply_ternary, quantise, round_activations
from test_optim import EXPERTS, rates


def close(found, expected, rtol=1e-5, atol=1e-6):
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# -- optimizers -------------------------------------------------------------------------------------------


def polar_ish(g, steps):
    """Newton–Schulz with Jordan's quintic, from a matrix of Frobenius norm 1."""
    x = g / np.linalg.norm(g)
    if x.shape[0] > x.shape[1]:
        return polar_ish(g.T, steps).T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon_by_hand(w, grads, *, split, lr, decay=0.0, momentum=0.95, nesterov=True, steps=5, adjust="original"):
    """Muon on float64 arrays; `split` cuts a parameter into its matrices (views) with outputs as rows."""
    w, buffer = w.copy(), np.zeros_like(w)
    for g in grads:
        buffer = momentum * buffer + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * buffer if nesterov else buffer
        w *= 1 - lr * decay
        for matrix, u in zip(split(w), split(update), strict=True):
            rows, columns = matrix.shape
            factor = (
                math.sqrt(max(1.0, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(rows, columns))
            )
            matrix -= lr * factor * polar_ish(u, steps)
    return w


def run_steps(p, grads, **group):
    p = torch.tensor(p, dtype=torch.float32, requires_grad=True)
    optimizer = HybridOptimizer([{"params": [p], **group}])
    for g in grads:
        p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
    return p.detach().double()


SPLITS = {
    (6, 15): ((0, False), lambda w: [w]),
    (15, 6): ((0, False), lambda w: [w]),
    (12, 5): ((4, False), lambda w: [w[:4], w[4:8], w[8:]]),
    (5, 36): ((18, True), lambda w: [w[:, :18].T, w[:, 18:].T]),
    (3, 8, 5): ((4, False), lambda w: [half for e in w for half in (e[:4], e[4:])]),
    (2, 4, 9): ((0, True), lambda w: [e.T for e in w]),
}


@pytest.mark.parametrize("shape", SPLITS)
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.7, "nesterov": False, "ns_steps": 3, "adjust_lr": "match_rms_adamw"}]
)
def test_muon_is_its_formula(shape, settings, monkeypatch):
    """With nothing said: momentum 0.95, Nesterov, five steps, √max(1, rows/columns) of one matrix, no decay."""
    monkeypatch.setattr("limbeck.optim.muon.bfloat16_is_fast", lambda device: False)
    generator = np.random.default_rng(0)
    w, grads = generator.normal(size=shape), generator.normal(size=(4, *shape))
    layout, split = SPLITS[shape]
    names = {"ns_steps": "steps", "adjust_lr": "adjust"}
    own = {names.get(key, key): value for key, value in settings.items()}
    decay = 0.3 if settings else 0.0
    wanted = muon_by_hand(w, grads, split=split, lr=0.1, decay=decay, **own)
    more = {"weight_decay": decay} if settings else {}
    found = run_steps(w, grads, algorithm="muon", lr=0.1, layouts=[layout], **settings, **more)
    close(found, wanted, rtol=0, atol=2e-5)


def test_lion_and_adamw_are_their_formulas():
    generator = np.random.default_rng(0)
    w0, grads = generator.normal(size=(4, 3)), generator.normal(size=(5, 4, 3))
    for given, (b1, b2) in (({}, (0.9, 0.99)), ({"betas": (0.6, 0.8)}, (0.6, 0.8))):
        w, m = w0.copy(), 0.0
        for g in grads:
            w = w * (1 - 0.1 * 0.2) - 0.1 * np.sign(b1 * m + (1 - b1) * g)
            m = b2 * m + (1 - b2) * g
        close(run_steps(w0, grads, algorithm="lion", lr=0.1, weight_decay=0.2, **given), w)
    for given, (b1, b2), eps in (({}, (0.9, 0.95), 1e-8), ({"betas": (0.6, 0.8), "eps": 0.5}, (0.6, 0.8), 0.5)):
        w, m, v = w0.copy(), 0.0, 0.0
        for t, g in enumerate(grads, 1):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            w = w * (1 - 0.1 * 0.2) - 0.1 * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        close(run_steps(w0, grads, algorithm="adamw", lr=0.1, weight_decay=0.2, **given), w)


def test_a_groups_settings_are_the_recipes():
    model = tiny_model()
    assert [OptimizerConfig(name=n).default_learning_rate for n in ("muon_lion", "lion", "adamw")] == [0.02, 1e-4, 5e-4]

    def of(learning_rate, multipliers=(), **changes):
        config = OptimizerConfig.model_validate(changes)
        adam = {"betas": (0.8, 0.9), "eps": 1e-5}
        groups = build_groups(model, config, learning_rate, 0.1, rules(*multipliers), adam)
        return groups, {group["name"]: group for group in groups}

    _, plain = of(0.3, name="muon_adamw")
    muon, adamw, vectors = plain["all · muon"], plain["all · adamw"], plain["all · adamw · no decay"]
    wanted = {
        "lr": 0.3,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": True,
        "ns_steps": 5,
        "adjust_lr": "original",
    }
    assert {key: muon[key] for key in wanted} == wanted
    assert (adamw["lr"], adamw["weight_decay"], adamw["betas"], adamw["eps"]) == (3e-4, 0.1, (0.8, 0.9), 1e-5)
    assert (vectors["lr"], vectors["weight_decay"]) == (3e-4, 0.0)
    _, plain = of(0.3, name="muon_lion")
    assert (plain["all · lion"]["lr"], plain["all · lion"]["betas"]) == (1e-4, (0.9, 0.99))
    _, plain = of(0.3, name="adamw")
    assert {group["lr"] for group in plain.values()} == {0.3}

    own = {"momentum": 0.5, "nesterov": False, "ns_steps": 7, "adjust_lr": "match_rms_adamw"}
    groups, found = of(
        0.3, [("q_proj", 0.5), ("proj", 2.0), ("norm", 0.0)], name="muon_lion",
        muon={"learning_rate": 0.7, "weight_decay": 0.0, **own}, lion={"weight_decay": 0.6, "beta1": 0.2, "beta2": 0.3},
    )  # fmt: skip
    assert {key: found["q_proj · muon"][key] for key in own} == own
    assert (found["q_proj · muon"]["lr"], len(found["q_proj · muon"]["params"])) == (0.35, 1)  # the first match wins
    assert (found["proj · muon"]["lr"], len(found["proj · muon"]["params"])) == (1.4, 6)
    assert {group["weight_decay"] for group in groups if group["algorithm"] == "muon"} == {0.0}
    rest = found["all others · lion"]
    assert (rest["lr"], rest["weight_decay"], rest["betas"]) == (1e-4, 0.6, (0.2, 0.3))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "norm" in name)


def test_matrices_inside_fused_projections():
    fused = hidden_matrices(tiny_model(model_type="phi3", pad_token_id=0, eos_token_id=0))
    layer = "model.layers.0."
    assert fused[f"{layer}self_attn.qkv_proj.weight"] == MatrixLayout(16)
    assert fused[f"{layer}mlp.gate_up_proj.weight"] == MatrixLayout(64)
    assert fused[f"{layer}self_attn.o_proj.weight"] == fused[f"{layer}mlp.down_proj.weight"] == MatrixLayout(0)
    whole = hidden_matrices(tiny_model(), split_heads=False)
    assert len(whole) == 7
    assert set(whole.values()) == {MatrixLayout(0)}


def test_schedules_end_where_they_are_told_to():
    done = [max(0, step - 4) / 16 for step in range(4, 20)]
    for least in (0.0, 0.2):
        cosine = rates("cosine", 20, 4, min_lr_ratio=least)
        assert cosine[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
        assert cosine[4:] == pytest.approx([least + (1 - least) * (1 + math.cos(math.pi * x)) / 2 for x in done])
        assert rates("linear", 20, 4, min_lr_ratio=least)[4:] == pytest.approx([1 - (1 - least) * x for x in done])
    stable = rates("warmup_stable_decay", 20, 4, min_lr_ratio=0.2, decay_ratio=0.5, decay_type="cosine")
    assert stable[4:10] == [1.0] * 6
    falling = [0.2 + 0.8 * (1 + math.cos(math.pi * x / 10)) / 2 for x in range(10)]
    assert stable[10:] == pytest.approx(falling)
    assert rates("warmup_stable_decay", 20, 0, decay_ratio=0.001)[-2:] == [1.0, 1.0]  # one step at least: the last
    assert len(rates("warmup_stable_decay", 20, 15)) == 20  # warm-up and decay that just fit
    with pytest.raises(ConfigError, match="decay of 5 steps"):
        rates("warmup_stable_decay", 20, 16)


def test_ramps_at_their_edges():
    assert Ramp(1.0, 3.0, 0).at(0) == 3.0
    assert [Ramp(3.0, 1.0, 2).at(step) for step in (0, 1, 2, 99)] == [3.0, 2.0, 1.0, 1.0]
    halfway = Ramp(1.0, 3.0, 4, (1.0, 2.0, 3.0))
    assert [halfway.at(step) for step in range(5)] == [1.0, 1.0, 2.0, 2.0, 3.0]  # the lower of two as near


# -- ternary weights --------------------------------------------------------------------------------------


def ternary_by_hand(w, group):
    w = w.detach().double()
    parts = w.reshape(*w.shape[:-1], -1, group)
    s = parts.abs().mean(-1, keepdim=True).float().bfloat16().double().clamp(2.0**-14, 65280.0)
    return ((parts / s).round().clamp(-1, 1) * s).reshape(w.shape)


def int8_by_hand(x):
    step = x.double().abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
    return (x.double() / step).round() * step


def test_scales_stay_between_float16s_normal_ends():
    weight = torch.tensor([[1e-6, -4e-5, 9e-5, 0.0], [2e5, -1e5, 3e4, 9e4]])
    for scale in ("absmean", "absmax"):
        found = quantise(weight, 4, scale)
        assert found.scales[:, 0].tolist() == [
            2.0**-14 if scale == "absmean" else float(torch.tensor(9e-5).bfloat16()),
            65280.0,
        ]
        assert found.codes.tolist() == [[0, -1 if scale == "absmean" else 0, 1, 0], [1, -1, 0, 1]]


def test_activations_are_rounded_to_127_steps_of_the_largest():
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1, 10, 1e-3, 1e-4, 1e-6, 0]
    ).view(6, 1)
    close(round_activations(x, 8), int8_by_hand(x), rtol=1e-5, atol=0)
    assert len((round_activations(torch.linspace(-1, 1, 9999), 8) * 127).round().unique()) == 255


def test_a_ternary_linear_layer_is_rounded_on_both_sides():
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 5)
    model = torch.nn.ModuleDict({"layer": layer})
    apply_ternary(model, ["layer.weight"], TernaryState(group_size=8))
    assert isinstance(layer, TernaryLinear)
    x = torch.randn(7, 24)
    close(layer(x), int8_by_hand(x) @ ternary_by_hand(layer.weight, 8).T + layer.bias.double(), rtol=1e-4, atol=1e-5)


def test_ternary_experts_round_what_goes_into_either_product():
    model = tiny_model(**EXPERTS)
    experts = model.model.layers[0].mlp.experts
    names = [f"model.layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    apply_ternary(model, names, TernaryState(group_size=8))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 32, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(6)])
    share = torch.rand(6, 2, generator=generator)
    gate_up, down = (ternary_by_hand(w, 8) for w in (experts.gate_up_proj, experts.down_proj))
    expected = torch.zeros(6, 32).double()
    for token in range(6):
        for place in range(2):
            e = int(chosen[token, place])
            gate, up = (int8_by_hand(x[token]) @ gate_up[e].T).chunk(2)
            inner = int8_by_hand(torch.nn.functional.silu(gate) * up)
            expected[token] += float(share[token, place]) * (inner @ down[e].T)
    with torch.no_grad():
        close(experts(x, chosen, share), expected, rtol=1e-3, atol=1e-6)


def test_float8_spends_its_range_on_each_row():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e3, 1e-4, 0.0]).view(
        4, 1
    )
    values, scales = to_float8(weight)
    assert values.float().abs().amax(-1).tolist() == [448.0, 448.0, 448.0, 0.0]
    close(scales[:3, 0], weight[:3].abs().amax(-1) / 448, rtol=1e-6, atol=0)
    close(values.float() * scales, weight, rtol=2**-4, atol=0)
