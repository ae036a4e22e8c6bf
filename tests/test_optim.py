"""The optimizer beside its twins, its groups, schedules and ramps; sharded over two real ranks."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import loss_request, rules, tiny_model
from limbeck.config import OptimizerConfig
from limbeck.errors import ConfigError
from limbeck.models import MatrixLayout, hidden_matrices
from limbeck.models.structure import _is_transposed
from limbeck.optim.groups import build_groups, check_groups, describe_groups
from limbeck.optim.hybrid import HybridOptimizer
from limbeck.optim.muon import orthogonalise
from limbeck.optim.schedules import Ramp, build_schedule, schedule_arguments

EXPERTS = {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "head_dim": 16, "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip


def twins(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return first, [p.detach().clone().requires_grad_() for p in first]


def steps_alike(ours, theirs, pairs, count=6, atol=1e-6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p, q in zip(*pairs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(*pairs, strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0)


def test_adamw_is_torchs():
    pairs = twins([(7, 5), (9,), (3, 4, 5)])
    ours = HybridOptimizer(
        [{"params": pairs[0], "algorithm": "adamw", "lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}]
    )
    theirs = torch.optim.AdamW(pairs[1], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    steps_alike(ours, theirs, pairs, atol=0.0)


def test_lion_is_lion_pytorchs():
    from lion_pytorch import Lion

    pairs = twins([(7, 5), (9,), (3, 4, 5)])
    ours = HybridOptimizer([{"params": pairs[0], "algorithm": "lion", "lr": 1e-2, "weight_decay": 0.1}])
    theirs = Lion(pairs[1], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), use_triton=False)
    steps_alike(ours, theirs, pairs)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_on_matrices(adjust, nesterov, monkeypatch):
    """torch multiplies in bfloat16 always; with the same precision the two agree to a rounding of it."""
    import limbeck.optim.muon as muon

    monkeypatch.setattr(muon, "bfloat16_is_fast", lambda device: True)
    pairs = twins([(8, 32), (32, 8), (16, 16), (16, 16)])
    ours = HybridOptimizer([
        {"params": pairs[0], "algorithm": "muon", "lr": 0.02, "weight_decay": 0.1, "adjust_lr": adjust,
         "nesterov": nesterov}
    ])  # fmt: skip
    theirs = torch.optim.Muon(pairs[1], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust, nesterov=nesterov)
    size = 0.02 * (0.2 * 32**0.5 if adjust == "match_rms_adamw" else 2.0)
    steps_alike(ours, theirs, pairs, atol=0.05 * size)


def test_newton_schulz_reaches_the_polar_factor():
    """Singular values end near 1 (the quintic's own band), singular vectors stay."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 6, 10)
    found = orthogonalise(matrices, dtype=torch.float32)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ found @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    assert float((values - torch.diag_embed(diagonal)).abs().max()) < 1e-4


def test_every_matrix_in_a_tensor_is_orthogonalised_apart():
    """Fused tensors step as the separate matrices in them would: experts × gate/up, heads, GPT-2's columns."""
    torch.manual_seed(0)
    gate, up = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    heads = torch.randn(3, 5, 8)
    fused = [torch.cat([gate, up], dim=1), heads.reshape(15, 8), heads.reshape(15, 8).T.contiguous()]
    layouts = [(6, False), (5, False), (5, True)]
    apart = [*gate.unbind(), *up.unbind(), *heads.unbind()]
    fused = [p.clone().requires_grad_() for p in fused]
    apart = [p.clone().requires_grad_() for p in apart]
    for p in (*fused, *apart):
        p.grad = p.detach().clone()
    HybridOptimizer([{"params": fused, "algorithm": "muon", "lr": 0.1, "layouts": layouts}]).step()
    HybridOptimizer([{"params": apart, "algorithm": "muon", "lr": 0.1}]).step()
    again = torch.cat([torch.stack(apart[:4]), torch.stack(apart[4:8])], dim=1)
    torch.testing.assert_close(fused[0], again, atol=2e-3, rtol=0)
    together = torch.stack(apart[8:]).reshape(15, 8)
    torch.testing.assert_close(fused[1], together, atol=2e-3, rtol=0)
    torch.testing.assert_close(fused[2], together.T, atol=2e-3, rtol=0)
    # Whole, the fused tensor would move elsewhere.
    whole = heads.reshape(15, 8).clone().requires_grad_()
    whole.grad = whole.detach().clone()
    HybridOptimizer([{"params": [whole], "algorithm": "muon", "lr": 0.1}]).step()
    assert float((whole - together).detach().abs().max()) > 5e-3


@given(st.sampled_from([(6, 4), (3, 6, 4), (12, 5)]), st.sampled_from([0, 2, 3]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_layouts_split_and_join(shape, rows, transposed):
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    tensor = torch.randn(stored)
    layout = MatrixLayout(rows, transposed)
    torch.testing.assert_close(layout.join(layout.split(tensor), tensor.shape), tensor)


def test_hidden_matrices_of_an_moe():
    model = tiny_model(**EXPERTS)
    found = hidden_matrices(model)
    layer = "model.layers.0."
    assert found[f"{layer}mlp.experts.gate_up_proj"] == MatrixLayout(16)
    assert found[f"{layer}mlp.experts.down_proj"] == MatrixLayout(0)
    assert found[f"{layer}self_attn.q_proj.weight"] == MatrixLayout(16)  # two heads
    assert found[f"{layer}self_attn.k_proj.weight"] == MatrixLayout(0)  # one head
    assert found[f"{layer}self_attn.o_proj.weight"] == MatrixLayout(0)
    others = {name for name, _ in model.named_parameters()} - found.keys()
    assert others == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", f"{layer}mlp.gate.weight",
        f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight",
        f"{layer}self_attn.q_norm.weight", f"{layer}self_attn.k_norm.weight",
    }  # fmt: skip


def test_gpt2_columns_are_outputs():
    model = tiny_model(
        model_type="gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=64, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    found = hidden_matrices(model)
    assert found["transformer.h.0.attn.c_attn.weight"] == MatrixLayout(16, transposed=True)
    assert found["transformer.h.0.mlp.c_fc.weight"] == MatrixLayout(0, transposed=True)


def test_default_split_and_rates():
    model = tiny_model(**EXPERTS)
    groups = build_groups(model, OptimizerConfig(name="muon_lion"), 0.02, 0.1, rules(("experts", 0.5)))
    by_name = {group["name"]: group for group in groups}
    assert by_name["experts · muon"]["lr"] == pytest.approx(0.01)
    assert by_name["all others · muon"]["lr"] == pytest.approx(0.02)
    assert by_name["all others · lion"]["lr"] == pytest.approx(1e-4)
    assert by_name["all others · lion · no decay"]["weight_decay"] == 0.0
    assert by_name["all others · lion"]["weight_decay"] == 0.1
    check_groups(model, groups)
    table = describe_groups(groups, model)
    assert "experts · muon" in table
    assert "lr 0.01 " in table
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())


def test_parameters_are_claimed_exactly_once():
    model = tiny_model(tie_word_embeddings=True)
    config = OptimizerConfig()
    with pytest.raises(ConfigError, match=r"'lm_head' gives it 0.5|'embed' gives it 2.0"):
        build_groups(model, config, 1e-3, 0.0, rules(("embed", 2.0), ("lm_head", 0.5)))
    build_groups(model, config, 1e-3, 0.0, rules(("lm_head", 0.5)))  # a tied head is found by either of its names
    groups = build_groups(model, config, 1e-3, 0.0)
    with pytest.raises(ConfigError, match=r"no group claims model\.embed_tokens\.weight"):
        check_groups(model, [{**group, "params": group["params"][1:]} for group in groups])
    with pytest.raises(ConfigError, match="is claimed by all · adamw and mine"):
        check_groups(model, [*groups, {"name": "mine", "params": groups[0]["params"][:1]}])
    on_norms = OptimizerConfig.model_validate({"algorithms": [{"pattern": "norm", "algorithm": "muon"}]})
    with pytest.raises(ConfigError, match="works on matrices"):
        build_groups(model, on_norms, 1e-3, 0.0)
    on_nothing = OptimizerConfig.model_validate({"algorithms": [{"pattern": "expert", "algorithm": "lion"}]})
    with pytest.raises(ConfigError, match="optimizer.algorithms: 'expert' matches no parameter"):
        build_groups(model, on_nothing, 1e-3, 0.0)


def test_state_goes_round_through_a_checkpoint():
    pairs = twins([(8, 6), (8, 6)])

    def optimizer(params):
        return HybridOptimizer([
            {"params": params[:1], "algorithm": "muon", "lr": 0.1, "layouts": [(4, False)]},
            {"params": params[1:], "algorithm": "lion", "lr": 0.1},
        ])  # fmt: skip

    first, second = optimizer(pairs[0]), optimizer(pairs[1])
    for p in pairs[0]:
        p.grad = torch.ones_like(p)
    first.step()
    for p, q in zip(*pairs, strict=True):
        q.data.copy_(p.data)
    import io

    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    steps_alike(first, second, pairs, count=2, atol=0.0)


# -- schedules and ramps ------------------------------------------------------------------------------------


def rates(kind, total, warmup, **changes):
    options = {"decay_ratio": 0.25, "decay_type": "linear", "min_lr_ratio": 0.0, **changes}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = build_schedule(optimizer, kind, total, warmup, **options)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_schedules_are_transformers_own(kind):
    """Where its warm-up and ours mean the same, every rate is."""
    from transformers import get_scheduler

    options = {"decay_ratio": 0.25, "decay_type": "cosine", "min_lr_ratio": 0.0}
    name, special = schedule_arguments(kind, 30, 7, **options)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(name, optimizer, 7, 30, scheduler_specific_kwargs=special)
    found = []
    for _ in range(30):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(kind, 30, 7, decay_type="cosine") == pytest.approx(found, abs=1e-12)


def test_schedules_have_their_shapes():
    wsd = rates("warmup_stable_decay", 20, 4)
    assert wsd[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert wsd[4:16] == [1.0] * 12
    assert wsd[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates("cosine", 20, 4, min_lr_ratio=0.1)[-1] > 0.1
    assert rates("cosine", 20, 4)[-1] < 0.02
    assert rates("linear", 10, 0)[5] == pytest.approx(0.5)
    assert rates("constant", 10, 0) == [1.0] * 10
    with pytest.raises(ConfigError, match="warmup_steps is 18 and decay of 5 steps .* the run has 20 steps"):
        rates("warmup_stable_decay", 20, 18)


def test_ramps():
    ramp = Ramp(0.2, 0.6, 4)
    assert [ramp.at(step) for step in range(6)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.6])
    levels = Ramp(4.0, 1.0, 10, (1.0, 2.0, 4.0))
    assert [levels.at(step) for step in (0, 2, 4, 8, 10)] == [4.0, 4.0, 2.0, 2.0, 1.0]
    assert levels.values() == (1.0, 2.0, 4.0)


# -- two ranks ------------------------------------------------------------------------------------------------

# Three heads over two ranks: the second lies on both.
ACROSS = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
SHARDED = """
import sys, torch
import torch.distributed as dist
from limbeck import ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
sys.path.insert(0, sys.argv[1])
from test_optim import ACROSS, EXPERTS, five_steps, new_optimizer
from conftest import loss_request, rules, tiny_model
import limbeck.optim.muon as muon
muon.bfloat16_is_fast = lambda device: False
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.set_num_threads(1)
model = tiny_model(seed=3, **{**EXPERTS, **ACROSS}).train()
def shard(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = five_steps(model, rank=dist.get_rank(), ranks=2, prepare=shard)
assert all(isinstance(p, DTensor) for p in model.parameters())
# What accelerate saves and loads of a sharded optimizer comes back as it was.
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
saved = get_optimizer_state_dict(model, optimizer)
fresh = new_optimizer(model)
set_optimizer_state_dict(model, fresh, saved)
for old, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
    assert old["name"] == new["name"] and list(old.get("layouts", [])) == list(new.get("layouts", []))
    for p in old["params"]:
        for key, value in optimizer.state[p].items():
            other = fresh.state[p][key]
            same = value.to_local() if isinstance(value, DTensor) else value
            assert torch.equal(same, other.to_local() if isinstance(other, DTensor) else other), key
full = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
if dist.get_rank() == 0:
    torch.save(full, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
ranks.end(0)
"""


def five_steps(model, rank=0, ranks=1, prepare=None):
    """Five steps of the fused loss and the hybrid optimizer on rows that the ranks share."""
    from limbeck.data.dataset import PackedRows
    from limbeck.training.head import attach_objectives

    attach_objectives(model)
    if prepare is not None:
        prepare(model)
    optimizer = new_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.randint(0, 4096, (4, 16), generator=generator)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
        rows = PackedRows(torch.arange(len(ids)), ids, torch.zeros_like(ids))
        request = loss_request(rows.labels, num_items=4 * 15 / ranks)
        model(**rows.model_inputs("packed"), loss_request=request).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def new_optimizer(model):
    """Muon and AdamW; Lion's signs would turn a gradient's last bit into a whole step, AdamW's first ones too."""
    return HybridOptimizer(build_groups(model, OptimizerConfig(name="muon_adamw"), 0.02, 0.1, adam={"eps": 1e-3}))


def test_fully_sharded_over_two_ranks_is_one_process(tmp_path, monkeypatch):
    """FSDP2 on gloo: experts stay local, matrices across ranks are gathered, and nothing changes."""
    import limbeck.optim.muon as muon

    monkeypatch.setattr(muon, "bfloat16_is_fast", lambda device: False)
    script, out = tmp_path / "sharded.py", tmp_path / "full.pt"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(out)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    model = tiny_model(seed=3, **{**EXPERTS, **ACROSS}).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    five_steps(model)
    full = torch.load(out, weights_only=True)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        torch.testing.assert_close(full[name], parameter.detach(), atol=1e-5, rtol=0, msg=name)


# -- which parameters are what ---------------------------------------------------------------------------------

LATENT = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 0, "num_key_value_heads": 2, "q_lora_rank": None,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
FUSED = {
    # every row of a layout: a name and how many rows one matrix has (0: the whole tensor is one)
    "mpt": ({"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}, {"attn.Wqkv.weight": 16}),
    "granitemoeshared": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
        {"shared_mlp.input_linear.weight": 24, "shared_mlp.output_linear.weight": 0},
    ),
    "jetmoe": (
        {"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2, "num_attention_heads": 4},
        {"mlp.input_linear.weight": 64, "mlp.output_linear.weight": 0},
    ),
    "deepseek_v2": (LATENT, {"self_attn.q_proj.weight": 24, "self_attn.kv_b_proj.weight": 0}),
    "opt": ({"head_dim": None, "word_embed_proj_dim": 32, "ffn_dim": 48}, {"self_attn.q_proj.weight": 16}),
    "deepseek_v3": ({**LATENT, "num_attention_heads": 1, "num_key_value_heads": 1}, {"self_attn.q_proj.weight": 0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FUSED)
def test_fused_tensors_of_other_models_are_split_where_their_matrices_end(kind):
    changes, expected = FUSED[kind]
    found = hidden_matrices(tiny_model(**{**changes, "vocab_size": 300, "model_type": kind}))
    for suffix, rows in expected.items():
        layouts = [layout for name, layout in found.items() if name.endswith(suffix)]
        assert layouts, (suffix, sorted(found))
        assert all(layout.rows == rows for layout in layouts), suffix


def test_gate_and_up_side_by_side_are_cut_between_columns():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(hidden_size=8)
            self.experts = torch.nn.Module()
            self.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 8, 20))

    assert hidden_matrices(Layer()) == {"experts.gate_up_proj": MatrixLayout(10, True)}


def test_state_space_parameters_do_not_decay():
    """Mamba's A_log is two-dimensional and no matrix: its decay would change how long the state lasts."""
    model = tiny_model(vocab_size=300, model_type="mamba", state_size=8, intermediate_size=64)
    groups = build_groups(model, OptimizerConfig(), 1e-3, 0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    by_name = dict(model.named_parameters())
    a_log = next(p for name, p in by_name.items() if name.endswith("A_log"))
    assert a_log.ndim == 2
    for name, parameter in by_name.items():
        wanted = 0.1 if parameter.ndim >= 2 and not name.endswith("A_log") else 0.0
        assert decay[id(parameter)] == wanted, name
    marked = torch.nn.Linear(4, 4, bias=False)
    marked.weight._no_weight_decay = True
    assert build_groups(marked, OptimizerConfig(), 1e-3, 0.1)[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "warmup_stable_decay"])
def test_a_warm_up_begins_at_nothing_wherever_the_decay_ends(kind):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = build_schedule(optimizer, kind, 20, 4, decay_ratio=0.25, decay_type="linear", min_lr_ratio=0.2)
    found = []
    for _ in range(21):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert found[20] == pytest.approx(0.2, abs=1e-6)
    assert min(found[4:]) >= 0.2 - 1e-6


def test_a_step_gives_back_what_its_closure_found():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = HybridOptimizer([{"name": "rest", "algorithm": "adamw", "params": [parameter], "lr": 0.1}])

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert bool((parameter < 1.0).all()), "the closure's gradients were used"
    assert optimizer.step() is None


def test_square_experts_are_outputs_by_inputs():
    """Of a square matrix the shape cannot tell which way it lies; torch's own way is the rule."""
    module = torch.nn.Module()
    square, wide = (torch.nn.Parameter(torch.zeros(2, 8, columns)) for columns in (8, 12))
    assert not _is_transposed(module, "down_proj", square, 8)
    assert not _is_transposed(module, "down_proj", wide, None)
    assert not _is_transposed(module, "down_proj", wide, 8)
    assert _is_transposed(module, "gate_up_proj", wide, 8)
