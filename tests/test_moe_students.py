"""Students with routed experts: the teacher's routers as targets, what is logged, and experts that no load loses."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import stopped_after, tiny_model, with_keys
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher
from limbeck.errors import ConfigError
from limbeck.losses.objective import Context, Objectives
from limbeck.losses.router import RouterTap, Routing
from limbeck.losses.router_kd import router_divergence
from limbeck.models import load_causal_lm
from limbeck.pipeline import plan

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
    "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
LAYERS = [{"method": "latent", "rank": 8}, {"method": "shared_core", "rank": 8}]
PRUNED = [{"method": "core_delta", "rank": 8}, {"method": "prune", "experts": 4}]


def moe(seed=0, kind="qwen3_moe", **changes):
    import limbeck.registration  # noqa: F401 (our architectures)

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def run(packed, folder, student, teacher=None, **changes):
    arguments = DistillationArguments(**{
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0, "data_seed": 0,
        "save_strategy": "steps", "save_steps": 2, **changes,
    })  # fmt: skip
    return DistillationTrainer(student, arguments, teacher=teacher, train_dataset=packed, eval_dataset=packed)


# -- routers as targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_routers_divergence_is_the_definition(sigmoid):
    torch.manual_seed(0)
    wanted, found = ([torch.randn(12, 5, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    valid = torch.rand(3, 4) < 0.6
    total, chosen = 0.0, torch.zeros(12, 2, dtype=torch.long)
    for target, own in zip(wanted, found, strict=True):
        for n in valid.flatten().nonzero().flatten():
            p, q = ((row.sigmoid() if sigmoid else row.exp()) for row in (target[n], own[n]))
            p, q = p / p.sum(), q / q.sum()
            total += float((p * (p / q).log()).sum())
    routings = [[Routing(z, chosen, sigmoid) for z in layers] for layers in (wanted, found)]
    assert float(router_divergence(*routings, valid)) == pytest.approx(total / 3 / int(valid.sum()), rel=1e-5)


def test_a_students_routers_follow_the_teachers(packed, tmp_path):
    """With the objective the routers come nearer, and its metric is the divergence that a by-hand pass finds."""
    teacher = LocalTeacher(moe(seed=3), top_k=8, max_batch_tokens=64)  # several passes a batch
    curves = {}
    for weight in (1e-6, 5.0):
        student = moe(seed=4)
        loss = {"objectives": [{"name": "router_kd", "weight": weight}], "alpha": 0.5, "temperature": 1.0}
        trainer = run(packed, tmp_path / str(weight), student, teacher, loss=loss, max_steps=12, save_strategy="no")
        before = trainer.evaluate()["eval_router_kd_loss"]
        rows = packed.rows(range(len(packed)))
        taps = [RouterTap(model) for model in (teacher.model, student)]
        with taps[0].recording(), taps[1].recording(), torch.no_grad():
            for model in (teacher.model, student):
                model(**rows.model_inputs("per_document"))
            by_hand = router_divergence(taps[0].routings(), taps[1].routings(), rows.labels != -100)
        assert before == pytest.approx(float(by_hand), rel=1e-4)
        trainer.train()
        curves[weight] = [entry["router_kd_loss"] for entry in trainer.state.log_history if "router_kd_loss" in entry]
    assert curves[5.0][-1] < 0.7 * curves[1e-6][-1]


def test_where_there_are_no_routers_to_follow():
    def refused(match, student, teacher):
        from limbeck.config import LossConfig

        config = LossConfig(objectives=[{"name": "router_kd", "weight": 0.1}])
        with pytest.raises(ConfigError, match=match):
            Objectives.of(Context(config, student, teacher))

    refused("training.mode is ce", moe(), None)
    refused("LlamaForCausalLM has no routed experts", moe(), LocalTeacher(tiny_model(seed=1), top_k=4))
    refused(r"over \[8, 8\] experts.*over \[4, 4\]", moe(num_experts=4), LocalTeacher(moe(), top_k=4))


def test_a_cached_teacher_has_no_routers(packed, tmp_path, recipe):
    from limbeck import TeacherCache
    from limbeck.teachers.build_cache import build_cache

    build_cache(recipe, tmp_path / "cache")
    with pytest.raises(ConfigError, match="a TeacherCache does not have them"):
        run(packed, tmp_path / "x", moe(), TeacherCache(tmp_path / "cache"),
            loss={"objectives": [{"name": "router_kd"}]})  # fmt: skip


def test_a_run_with_cached_targets_refuses_it_before_the_cache_is_made(recipe):
    changed = with_keys(recipe, loss={"objectives": [{"name": "router_kd"}]})
    with pytest.raises(ConfigError, match="looks into the teacher, and its targets come from a cache"):
        plan(changed)


# -- what is logged -------------------------------------------------------------------------------------------------


def test_every_layers_load_and_entropy_are_logged(packed, tmp_path):
    trainer = run(packed, tmp_path, moe(), max_steps=1, save_strategy="no")
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "router_aux_loss" in entry)
    load = torch.tensor([[entry[f"layer_load/{layer:03d}/{e:03d}"] for e in range(8)] for layer in range(2)])
    torch.testing.assert_close(load.sum(dim=1), torch.ones(2), rtol=0, atol=1e-5)
    whole = [entry[f"expert_load/{e:03d}"] for e in range(8)]
    torch.testing.assert_close(load.mean(dim=0), torch.tensor(whole), rtol=0, atol=1e-6)
    assert 0.0 < entry["router_entropy/000"] <= float(torch.tensor(8.0).log()) + 1e-6
    assert not torch.allclose(load[0], load[1])


# -- loads that keep every expert -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("qwen3_moe", None), ("compressed_qwen3_moe", LAYERS), ("compressed_qwen3_moe", PRUNED)],
    ids=["fused", "latent and shared core", "core and pruned"],
)
def test_saved_resumed_and_best_models_keep_every_expert(packed, tmp_path, kind, layers):
    """Bit by bit: a save loaded again, a run stopped and resumed, and the best checkpoint loaded at the end."""
    given = {} if layers is None else {"expert_layers": layers}
    keys = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss",
            "greater_is_better": True, "load_best_model_at_end": True}  # fmt: skip
    whole = run(packed, tmp_path / "whole", moe(kind=kind, **given), **keys)
    whole.train()
    best = load_causal_lm(whole.state.best_model_checkpoint, dtype="float32").state_dict()
    assert whole.state.best_global_step == 2  # the worse one: it is not the one that training ended with
    held = whole.model.state_dict()
    assert held.keys() == best.keys()
    assert sum("experts" in name for name in held) >= 4
    for name, value in held.items():
        assert torch.equal(value, best[name]), name
    with stopped_after(1):
        run(packed, tmp_path / "cut", moe(kind=kind, **given), **keys).train()
    run(packed, tmp_path / "cut", moe(seed=9, kind=kind, **given), **keys).train(resume_from_checkpoint=True)
    for step in (2, 4):
        one, two = (load_file(tmp_path / name / f"step_{step}" / "model.safetensors") for name in ("whole", "cut"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_compressed_models_of_a_config_begin_alike_and_differ_from_their_seed():
    """Factors begin as nothing on top of what experts share; two layers of different forms in one model."""
    model, again, other = (moe(seed, "compressed_qwen3_moe", expert_layers=LAYERS) for seed in (0, 0, 1))
    for (name, one), two, three in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        if "norm" not in name and not name.endswith("_u"):
            assert not torch.equal(one, three), name
        if name.endswith("_u"):
            assert not one.any()
    with pytest.raises(Exception, match="expert_layers has 1 entries and num_hidden_layers is 2"):
        moe(kind="compressed_qwen3_moe", expert_layers=LAYERS[:1])
