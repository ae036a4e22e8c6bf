"""Compressed experts against the matrices they stand for, and their closed forms against theory and optimisation."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from limbeck.compression.factors import FACTORISATIONS, core_delta, latent, rank_for, shared_core
from limbeck.compression.layers import candidates
from limbeck.compression.pruning import evenly_spaced, kept_experts, kept_layers, prune_channels, with_attention
from limbeck.compression.refit import refit_latent
from limbeck.compression.statistics import ExpertStatistics, whitening
from limbeck.config.compress import CompressConfig
from limbeck.errors import ConfigError
from limbeck.students.compressed.experts import PROJECTIONS, compressed_experts

E, H, I, N, K = 4, 16, 8, 40, 2  # noqa: E741
CONFIG = AutoConfig.for_model(
    "qwen3_moe", hidden_size=H, num_experts=E, moe_intermediate_size=I, num_experts_per_tok=K, vocab_size=32,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
)  # fmt: skip
CONFIG._experts_implementation = "eager"


def fused(seed=0):
    torch.manual_seed(seed)
    made = Qwen3MoeExperts(CONFIG).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def routed(seed=1):
    torch.manual_seed(seed)
    scores, chosen = torch.rand(N, E, dtype=torch.float64).topk(K)
    return torch.randn(N, H, dtype=torch.float64), chosen, scores / scores.sum(-1, keepdim=True)


def dense_of(experts, tensors, layer):
    """Each expert's three matrices written out from a compressed layer's tensors: what the formulas say."""
    found = {}
    for name in PROJECTIONS:
        core = tensors[f"shared_core.{name}.weight"].double()
        for e in range(E):
            get = lambda part, name=name, e=e: tensors[f"wrapper.{name}_{part}"][e].double()  # noqa: E731
            if layer["method"] == "core_delta":
                found[name, e] = core + get("u") @ get("v")
            else:
                out, into = core.shape
                left = torch.eye(out, dtype=torch.float64) + get("out_u") @ get("out_v")
                found[name, e] = left @ core @ (torch.eye(into, dtype=torch.float64) + get("in_u") @ get("in_v"))
    return found


def by_hand(x, chosen, weights, matrices):
    """The experts' sum, a token and an expert at a time."""
    out = torch.zeros_like(x)
    for n in range(len(x)):
        for k in range(K):
            e = int(chosen[n, k])
            gate, up, down = (matrices[name, e] for name in PROJECTIONS)
            out[n] += weights[n, k] * (down @ (torch.nn.functional.silu(gate @ x[n]) * (up @ x[n])))
    return out


def statistics_of(experts, seed=1):
    found = ExpertStatistics.empty(E, H, I)
    x, chosen, weights = routed(seed)
    found.observe(experts, x, chosen, weights, torch.ones(N, dtype=torch.bool))
    return found.finish()


@pytest.mark.parametrize("method", ["shared_core", "core_delta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shared_experts_compute_what_their_matrices_do(method, dtype):
    """float64 goes expert by expert, float32 by grouped products; both are the formula."""
    layer = {"method": method, "rank": 8}
    made = compressed_experts(fused(), CONFIG, layer).to(dtype)
    torch.manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, chosen, weights = routed()
    found = made(x.to(dtype), chosen, weights.to(dtype))
    wanted = by_hand(x, chosen, weights, dense_of(None, made.state_dict(), layer))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)
    (found * torch.randn_like(found)).sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in made.parameters())


def test_latent_experts_compute_what_their_matrices_do():
    made = compressed_experts(fused(), CONFIG, {"method": "latent", "rank": 8}).double()
    torch.manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, chosen, weights = routed()
    matrices = {}
    for e in range(E):
        gate, up = made.gate_up_proj[e].chunk(2)
        into, out = made.encoder.weight, made.decoder.weight
        matrices |= {
            ("gate_proj", e): gate @ into,
            ("up_proj", e): up @ into,
            ("down_proj", e): out @ made.down_proj[e],
        }
    torch.testing.assert_close(made(x, chosen, weights), by_hand(x, chosen, weights, matrices), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("method", "rank"), [("latent", H), ("core_delta", I), ("shared_core", I)])
def test_the_full_rank_loses_nothing(method, rank):
    experts = fused()
    tensors = FACTORISATIONS[method](experts, statistics_of(experts), rank)
    made = compressed_experts(experts, CONFIG, {"method": method, "rank": rank}).double()
    made.load_state_dict({name: value.double() for name, value in tensors.items()})
    x, chosen, weights = routed(5)
    error = (made(x, chosen, weights) - experts(x, chosen, weights)).norm() / experts(x, chosen, weights).norm()
    assert float(error) < 1e-4  # the factors are kept in float32


def test_what_a_layer_is_measured_by():
    """Each sum written out token by token; tokens that do not count are left out, the output has them."""
    experts = fused()
    x, chosen, weights = routed()
    counted = torch.rand(N) < 0.7
    found = ExpertStatistics.empty(E, H, I)
    out = found.observe(experts, x, chosen, weights, counted)
    torch.testing.assert_close(out, experts(x, chosen, weights))
    inputs, inside, outputs = (torch.zeros(n, n, dtype=torch.float64) for n in (H, I, H))
    mass, norms, counts = (torch.zeros(E, dtype=torch.float64) for _ in range(3))
    for n in counted.nonzero().flatten():
        inputs += torch.outer(x[n], x[n])
        for k in range(K):
            e, g = int(chosen[n, k]), weights[n, k]
            gate, up = (experts.gate_up_proj[e] @ x[n]).chunk(2)
            a = torch.nn.functional.silu(gate) * up
            y = experts.down_proj[e] @ a
            mass[e] += g * g
            inside += g * g * torch.outer(a, a)
            outputs += g * g * torch.outer(y, y)
            norms[e] += g * y.norm()
            counts[e] += 1
    for mine, theirs in ((found.inputs, inputs), (found.inside, inside), (found.outputs, outputs)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    found.finish()
    torch.testing.assert_close(found.mass, mass / mass.sum(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.scores, norms / counts, rtol=1e-5, atol=1e-8)
    order = sorted(range(E), key=lambda e: -float(norms[e] / counts[e]))
    assert kept_experts(found, 2).tolist() == sorted(order[:2])


def test_latent_errs_by_the_eigenvalues_that_it_leaves_out():
    """Eckart and Young: Σ p ‖(W − A V) S‖² is the sum of the discarded eigenvalues, and no other space errs less."""
    experts = fused()
    statistics = statistics_of(experts)
    tensors = latent(experts, statistics, 6)
    root, _ = whitening(statistics.inputs, experts.gate_up_proj)
    into = tensors["encoder.weight"].double()
    weights = experts.gate_up_proj.detach()
    gram = sum(p * root @ w.mT @ w @ root for p, w in zip(statistics.mass, weights, strict=True))

    def error(encoder):
        """With the best A of each expert for this space, by least squares."""
        total = 0.0
        for p, w in zip(statistics.mass, weights, strict=True):
            a = torch.linalg.lstsq((encoder @ root).mT, (w @ root).mT).solution.mT
            total += float(p * ((w - a @ encoder) @ root).square().sum())
        return total

    wanted = float(torch.linalg.eigvalsh(gram)[:-6].sum())
    own = sum(
        float(p * ((w - a.double() @ into) @ root).square().sum())
        for p, w, a in zip(statistics.mass, weights, tensors["gate_up_proj"], strict=True)
    )
    assert own == pytest.approx(wanted, rel=1e-3)
    torch.manual_seed(0)
    assert all(error(into + 0.05 * torch.randn_like(into)) > own for _ in range(20))
    # The down projection: what is left out of the outputs, as measured.
    values = torch.linalg.eigvalsh(statistics.outputs)
    decoder = tensors["decoder.weight"].double()
    lost = statistics.outputs.trace() - (decoder.mT @ statistics.outputs @ decoder).trace()
    assert float(lost) == pytest.approx(float(values[:-6].sum()), rel=1e-4)


def test_refitted_experts_are_least_squares_around_what_they_were():
    """Against NumPy's least squares with the prior as rows of its own, expert by expert; an unseen one stays."""
    experts = fused()
    gate = torch.nn.Module()
    gate.weight = torch.zeros(1, dtype=torch.float64)
    x, chosen, weights = routed()
    chosen = chosen.clamp(max=E - 2)  # the last expert sees nothing
    gate.forward = lambda part: (None, weights, chosen)
    tensors = {name: value.double() for name, value in latent(experts, statistics_of(experts), 6).items()}
    before = {name: value.clone() for name, value in tensors.items()}
    refit_latent(experts, gate, x, tensors)
    assert torch.equal(tensors["gate_up_proj"][E - 1], before["gate_up_proj"][E - 1])

    def fitted(inputs, outputs, prior):
        size = inputs.shape[1]
        weight = 0.1 * size / len(inputs) * np.mean(np.sum(inputs**2, axis=0))
        rows = np.concatenate([inputs, np.sqrt(weight) * np.eye(size)])
        return np.linalg.lstsq(rows, np.concatenate([outputs, np.sqrt(weight) * prior.T]), rcond=None)[0].T

    for e in range(E - 1):
        tokens, place = torch.where(chosen == e)
        g = weights[tokens, place].unsqueeze(-1)
        z = x[tokens] @ before["encoder.weight"].mT
        gate_up = x[tokens] @ experts.gate_up_proj[e].mT
        small = fitted((z * g).numpy(), (gate_up * g).numpy(), before["gate_up_proj"][e].numpy())
        np.testing.assert_allclose(tensors["gate_up_proj"][e].numpy(), small, atol=1e-4)
        halves = gate_up.chunk(2, dim=-1), (z @ torch.from_numpy(small).mT).chunk(2, dim=-1)
        inside, narrow = (torch.nn.functional.silu(a) * b * g for a, b in halves)
        wanted = inside @ experts.down_proj[e].mT @ before["decoder.weight"]
        down = fitted(narrow.numpy(), wanted.numpy(), before["down_proj"][e].numpy())
        np.testing.assert_allclose(tensors["down_proj"][e].numpy(), down, atol=1e-4)


def weighted_error(experts, statistics, tensors, layer, name):
    root, _ = whitening(statistics.inside if name == "down_proj" else statistics.inputs,
                        experts.down_proj if name == "down_proj" else experts.gate_up_proj)  # fmt: skip
    matrices = dense_of(experts, tensors, layer)
    total = 0.0
    for e in range(E):
        gate, up = experts.gate_up_proj[e].chunk(2)
        whole = {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj[e]}[name]
        total += float(((whole - matrices[name, e]) @ root).square().sum())
    return total


@pytest.mark.parametrize("name", PROJECTIONS)
def test_core_delta_is_the_truncated_singular_value_decomposition(name):
    experts = fused()
    statistics = statistics_of(experts)
    found = weighted_error(experts, statistics, core_delta(experts, statistics, 3), {"method": "core_delta"}, name)
    root, _ = whitening(statistics.inside if name == "down_proj" else statistics.inputs,
                        experts.down_proj if name == "down_proj" else experts.gate_up_proj)  # fmt: skip
    wanted = 0.0
    half = {"gate_proj": slice(0, I), "up_proj": slice(I, 2 * I)}.get(name)
    weights = experts.down_proj if half is None else experts.gate_up_proj[:, half]
    mean = sum(p * w for p, w in zip(statistics.mass, weights, strict=True))
    for weight in weights:
        values = np.linalg.svd(((weight - mean) @ root).detach().numpy(), compute_uv=False)
        wanted += float((values[3:] ** 2).sum())
    assert found == pytest.approx(wanted, rel=1e-3)


def test_wrappers_are_at_a_minimum_of_what_they_minimise():
    """Gradient steps from the closed form's wrappers of one side find nothing better; a random start ends higher."""
    experts = fused()
    statistics = statistics_of(experts)
    layer = {"method": "shared_core", "rank": 2}
    tensors = shared_core(experts, statistics, 2)
    found = weighted_error(experts, statistics, tensors, layer, "gate_proj")
    mean_alone = {name: torch.zeros_like(value) if "wrapper" in name else value for name, value in tensors.items()}
    assert found < 0.8 * weighted_error(experts, statistics, mean_alone, layer, "gate_proj")
    root, _ = whitening(statistics.inputs, experts.gate_up_proj)
    weight, core = experts.gate_up_proj[0, :I].detach(), tensors["shared_core.gate_proj.weight"].double()
    parts = {part: tensors[f"wrapper.gate_proj_{part}"][0].double() for part in ("out_u", "out_v", "in_u", "in_v")}

    def error(in_u, in_v):
        outer = core + parts["out_u"] @ (parts["out_v"] @ core)
        return ((weight - outer - (outer @ in_u) @ in_v) @ root).square().sum()

    own = float(error(parts["in_u"], parts["in_v"]))
    for start in ("closed form", "random"):
        torch.manual_seed(1)
        first = [parts["in_u"], parts["in_v"]] if start == "closed form" else [torch.randn(H, 2), torch.randn(2, H)]
        u, v = (value.clone().double().requires_grad_() for value in first)
        optimizer = torch.optim.LBFGS([u, v], max_iter=300, line_search_fn="strong_wolfe")

        def closure(u=u, v=v, optimizer=optimizer):
            optimizer.zero_grad()
            loss = error(u, v)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert float(error(u, v)) == pytest.approx(own, rel=1e-3)


def test_channels_are_refitted_by_least_squares():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=H, intermediate_size=24, num_attention_heads=2,
                                  num_hidden_layers=1, vocab_size=32)  # fmt: skip
    mlp = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.double().requires_grad_(False)
    x = torch.randn(200, H, dtype=torch.float64)
    a = (torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).detach()
    found = prune_channels(mlp, a.mT @ a, 10)
    worth = a.square().sum(0) * mlp.down_proj.weight.square().sum(0)
    kept = worth.topk(10).indices.sort().values
    torch.testing.assert_close(found["gate_proj.weight"], mlp.gate_proj.weight[kept].detach().float())
    solution = np.linalg.lstsq(a[:, kept].numpy(), (a @ mlp.down_proj.weight.mT).detach().numpy(), rcond=None)[0]
    np.testing.assert_allclose(found["down_proj.weight"].numpy(), solution.T, atol=1e-4)
    without = prune_channels(mlp, None, 10)
    assert without["down_proj.weight"].shape == (H, 10)


def test_which_layers_stay():
    assert evenly_spaced(8, 4) == [0, 2, 5, 7]
    assert evenly_spaced(5, 1) == [0]
    assert kept_layers([0.5, 0.1, 0.4, 0.1], 3) == [0, 1, 2]


@pytest.mark.parametrize("method", list(FACTORISATIONS))
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("experts", [4, 32])
def test_ranks_keep_at_most_the_share_that_is_asked_for(method, keep, experts):
    """And the next larger rank would be more; with few experts what they share counts for much."""
    rank = rank_for(method, keep, experts, 256, 128)
    config = AutoConfig.for_model("qwen3_moe", hidden_size=256, num_experts=experts, moe_intermediate_size=128)
    with torch.device("meta"):
        whole = Qwen3MoeExperts(config)
        sizes = [
            sum(p.numel() for p in compressed_experts(whole, config, {"method": method, "rank": r}).parameters())
            for r in (rank, rank + 8)
            if r or method != "latent"
        ]
    most = keep * sum(p.numel() for p in whole.parameters())
    assert rank % 8 == 0
    assert rank == 0 or sizes[0] <= most
    assert most < sizes[-1] or rank == 128


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"method": "tucker"}, "'tucker'; choose one of latent"),
        ({"method": "latent", "rank": 0}, "at least 1"),
        ({"method": "latent", "experts": 4}, "latent has `rank`"),
    ],
)
def test_layers_that_stand_for_no_module(layer, said):
    with pytest.raises(ConfigError, match=said):
        compressed_experts(fused(), CONFIG, layer)


def test_layers_that_stay_have_one_that_attends():
    kinds = ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 3 + ["full_attention"]
    assert with_attention([0, 1, 2], kinds) == [1, 2, 3]
    assert with_attention([0, 1, 2], kinds, [0.9, 0.1, 0.5, 0.2, 0, 0, 0, 0.3]) == [0, 2, 7]
    assert with_attention([0, 3], kinds) == [0, 3]
    assert with_attention([0, 1], None) == [0, 1]


@pytest.mark.parametrize(
    ("section", "has_text", "found"),
    [
        ({"method": "auto", "keep": 0.9}, True, ["prune", "latent", "core_delta"]),
        ({"method": "auto", "keep": 0.9}, False, ["latent", "core_delta"]),
        ({"method": "auto", "keep": 0.1}, True, "keep 0.1 leaves auto no rank"),  # and one expert for a token's four
        ({"method": "prune"}, False, "no calibration text"),
        ({"method": "prune", "keep": 0.25}, True, "leaves 2 of 8 experts and a token takes 4. Keep at least 0.5"),
    ],
)
def test_which_forms_a_layer_may_take(section, has_text, found):
    config = AutoConfig.for_model("qwen3_moe", num_experts_per_tok=4)
    made = CompressConfig.model_validate(section)
    if isinstance(found, str):
        with pytest.raises(ConfigError, match=found):
            candidates(made, config, (8, 48, 24), has_text)
    else:
        assert [entry["method"] for entry in candidates(made, config, (8, 48, 24), has_text)] == found
