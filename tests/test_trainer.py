"""The trainer: accumulation, ranks, resuming, modes, frozen parameters, fused experts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import loss_request, rules, stopped_after, tiny_model
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher, TeacherCache
from limbeck.config import LossConfig, Recipe, SamplingConfig
from limbeck.data.dataset import PackedRows
from limbeck.errors import ConfigError, CorruptError, LimbeckError
from limbeck.teachers.base import Teacher
from limbeck.teachers.build_cache import build_cache
from limbeck.training.collate import RowCollator
from limbeck.training.head import attach_objectives
from limbeck.training.phases import train_recipe


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True, "max_grad_norm": 0.0, "seed": 0, "data_seed": 0,
    }  # fmt: skip
    loss = {name: changes.pop(name) for name in LossConfig.model_fields.keys() & changes.keys()}
    return DistillationArguments(**{**settings, **changes}, loss=loss)


def trained(packed, folder, model=None, teacher="local", **changes):
    if teacher == "local":
        teacher = LocalTeacher(tiny_model(seed=9), top_k=8)
    trainer = DistillationTrainer(
        model or tiny_model(), arguments(folder, **changes), teacher=teacher, train_dataset=packed
    )
    trainer.train()
    return trainer


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(first, second) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def with_changes(recipe_tree, **sections) -> Recipe:
    tree = json.loads(json.dumps(recipe_tree))
    for name, changes in sections.items():
        tree[name] = {**tree.get(name, {}), **changes} if isinstance(changes, dict) else changes
    if tree.get("stages", {}).get("enabled"):
        tree["training"].pop("max_steps", None)  # a run is as long as its stages
    return Recipe.model_validate(tree)


def test_eight_by_one_is_one_by_eight(packed, tmp_path):
    """Documents differ in length, so a mean of micro-batch means would not pass."""
    whole = trained(packed, tmp_path / "a", per_device_train_batch_size=8)
    parts = trained(packed, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert largest_difference(weights(whole.model), weights(parts.model)) < 1e-5
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


RANK_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from conftest import tiny_model
from limbeck import DistillationTrainer, LocalTeacher, ranks
from limbeck.data.dataset import PackedDataset
from test_trainer import arguments
packed, out = PackedDataset(sys.argv[1]), sys.argv[2]
args = arguments(out, per_device_train_batch_size=4, ddp_backend="gloo")
teacher = LocalTeacher(tiny_model(seed=9), top_k=8)
trainer = DistillationTrainer(tiny_model(), args, teacher=teacher, train_dataset=packed)
trainer.train()
assert args.world_size == 2
trainer.save_model(out)
if trainer.is_world_process_zero():
    torch.save([e["loss"] for e in trainer.state.log_history if "loss" in e], out + "/losses.pt")
ranks.shut_down()
ranks.end(0)
"""


def test_two_gloo_ranks_are_one_process(packed, tmp_path):
    one = trained(packed, tmp_path / "one", per_device_train_batch_size=8)
    script = tmp_path / "ranks.py"
    script.write_text(RANK_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [*command, str(packed.folder), str(tmp_path / "two"), tests],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(tmp_path / "two" / "model.safetensors")
    mine = {name: value for name, value in weights(one.model).items() if name in two}
    assert len(mine) == len(two)
    assert largest_difference(mine, two) < 1e-5
    losses = torch.load(tmp_path / "two" / "losses.pt", weights_only=True)
    assert losses == pytest.approx([e["loss"] for e in one.state.log_history if "loss" in e], abs=1e-5)


def test_every_trainable_parameter_changes_and_frozen_ones_do_not(packed, tmp_path, capsys):
    model = tiny_model(tie_word_embeddings=False)
    before = weights(model)
    trained(packed, tmp_path, model, parameter_lr_multipliers=rules(("mlp", 0.0), ("embed", 0.5)))
    after = weights(model)
    frozen = [name for name in before if "mlp" in name]
    assert frozen
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in frozen), name


def test_multipliers_scale_and_typos_are_refused(packed, tmp_path):
    trainer = trained(packed, tmp_path / "a", parameter_lr_multipliers=rules(("mlp", 0.1), ("mlp|attn", 10.0)))
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["mlp · adamw"] == pytest.approx(1e-4)
    assert rates["mlp|attn · adamw"] == pytest.approx(1e-2)
    assert rates["all others · adamw · no decay"] == pytest.approx(1e-3)
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(list(trainer.model.parameters()))
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] == 0.0
    with pytest.raises(ConfigError, match="'expert' matches no parameter"):
        trained(packed, tmp_path / "b", parameter_lr_multipliers=rules(("expert", 0.1)))


@pytest.mark.parametrize("precision", ["bf16", "activation_checkpointing"])
def test_precision_and_activation_checkpointing_train_alike(packed, tmp_path, precision):
    plain = trained(packed, tmp_path / "a")
    other = trained(packed, tmp_path / "b", **{precision: True})
    limit = 5e-3 if precision == "bf16" else 1e-6
    assert largest_difference(weights(plain.model), weights(other.model)) < limit
    assert all(p.dtype == torch.float32 for p in other.model.parameters())


def test_any_dataset_of_input_ids_will_do(tmp_path):
    """Somebody else's script: plain lists of ids of various lengths, with Hugging Face labels."""
    items = [
        {"input_ids": list(range(5, 5 + n)), "labels": [-100] * 3 + list(range(8, 5 + n))} for n in (9, 6, 12, 7)
    ] * 4
    trainer = trained(items, tmp_path, per_device_train_batch_size=4)
    assert trainer.state.global_step == 2
    batch = trainer.data_collator(items[:2])
    assert batch["labels"][1].tolist() == [-100, -100, 8, 9, 10, -100, -100, -100, -100]


def test_undeclared_temperature_is_refused_at_start(packed, tmp_path):
    with pytest.raises(ConfigError, match=r"loss.temperature is 3.0 and the teacher declares \[1.0, 2.0\]"):
        trained(packed, tmp_path, temperature=3.0)


def test_cached_and_local_teachers_train_the_same_student(recipe, packed, teacher_folder, tmp_path):
    from limbeck.models import load_causal_lm

    build_cache(recipe, recipe.cache_dir)
    cached = trained(packed, tmp_path / "a", teacher=TeacherCache(recipe.cache_dir), dataloader_num_workers=1)
    local = LocalTeacher(load_causal_lm(str(teacher_folder), dtype="float32"), top_k=16)
    direct = trained(packed, tmp_path / "b", teacher=local)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (cached, direct)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_a_resumed_run_ends_with_the_same_bytes(recipe_tree, recipe, packed, tmp_path):
    settings = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "use_cached_logits": False}
    training = {**recipe_tree["training"], **{k: v for k, v in settings.items() if k != "use_cached_logits"}}
    recipe = with_changes(recipe_tree, training=training, teacher={"use_cached_logits": False})
    train_recipe(recipe, tmp_path / "whole")
    with stopped_after(saves=2):
        train_recipe(recipe, tmp_path / "cut")
    (tmp_path / "cut" / "step_5").mkdir()  # half a checkpoint, as a kill would leave it
    train_recipe(recipe, tmp_path / "cut")
    for name in ("final/model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "cut" / "provenance.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4]
    assert not (tmp_path / "cut" / "step_5").exists()
    assert not list((tmp_path / "cut").rglob("training_args.bin"))


def test_nothing_is_trained_after_the_last_step(recipe_tree, packed, tmp_path):
    """Killed between the last checkpoint and `final/`, with a rate that is not 0: the same bytes, no further step."""
    training = {**recipe_tree["training"], "mode": "ce", "max_steps": 3, "lr_scheduler_type": "constant"}
    recipe = with_changes(recipe_tree, training=training)
    folder = tmp_path / "student"
    train_recipe(recipe, folder)
    before = (folder / "final" / "model.safetensors").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "final").rename(folder / ".final.tmp")  # half-written, as a kill leaves it
    manifest = train_recipe(recipe, folder)
    assert manifest.steps == 3
    assert (folder / "final" / "model.safetensors").read_bytes() == before
    assert not (folder / ".final.tmp").exists()


def test_resume_from_an_earlier_checkpoint_leaves_the_later_ones(recipe_tree, packed, tmp_path):
    folder = tmp_path / "run" / "student"
    base = {**recipe_tree["training"], "mode": "ce", "save_steps": 1, "save_total_limit": None, "max_steps": 4}
    train_recipe(with_changes(recipe_tree, training=base), folder)
    changed = {**base, "max_steps": 3, "learning_rate": 5e-3, "resume_from": str(folder / "step_2")}
    manifest = train_recipe(with_changes(recipe_tree, training=changed), folder)
    lines = [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    assert manifest.steps == 3
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_1", "step_2", "step_3"]


def test_force_starts_over_and_keeps_the_old_result(recipe_tree, packed, tmp_path):
    from limbeck.pipeline import run_pipeline

    recipe = with_changes(recipe_tree, training={**recipe_tree["training"], "mode": "ce"})
    run_pipeline(recipe, "train")
    before = (recipe.student_dir / "final" / "model.safetensors").read_bytes()
    states = [stage.state for stage in run_pipeline(recipe, "train", force=True).stages]
    assert states == ["skipped", "done"]
    assert (recipe.student_dir / "final" / "model.safetensors").read_bytes() == before
    kept = list((recipe.root / "previous").iterdir())
    assert len(kept) == 1
    assert (kept[0] / "final" / "model.safetensors").read_bytes() == before


def test_modes_change_on_the_same_run_and_are_recorded(recipe_tree, packed, tmp_path, capsys):
    folder = tmp_path / "run" / "student"
    base = recipe_tree["training"]
    ce = with_changes(recipe_tree, training={**base, "mode": "ce", "max_steps": 2, "save_steps": 2})
    train_recipe(ce, folder)
    first = (folder / "final" / "model.safetensors").read_bytes()
    kd = with_changes(
        recipe_tree,
        training={**base, "max_steps": 4, "save_steps": 2, "resume_from": str(folder)},
        teacher={"use_cached_logits": False},
    )
    without = kd.model_copy(update={"training": kd.training.model_copy(update={"resume_from": None})})
    with pytest.raises(LimbeckError, match="made from other inputs"):
        train_recipe(without, folder)
    train_recipe(kd, folder)
    assert (folder / "final" / "model.safetensors").read_bytes() != first
    lines = [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert [(line["mode"], line["step"]) for line in lines] == [("ce", 0), ("distill", 2)]
    assert "teacher" in lines[1]["changed"]
    log = (folder / "training.log").read_text()
    assert " kl=" in [line for line in log.splitlines() if "elapsed=" in line][-1]


def test_log_lines_have_the_promised_form(recipe_tree, packed, tmp_path):
    import re

    recipe = with_changes(
        recipe_tree, teacher={"use_cached_logits": False}, training={**recipe_tree["training"], "step_line": "both"}
    )
    train_recipe(recipe, tmp_path / "student")
    log = (tmp_path / "student" / "training.log").read_text().splitlines()
    lines = [line[21:] for line in log if "elapsed=" in line or "Step " in line]

    # The teacher's share is shown where the machine made it wait.
    numbers = r"loss=\d+\.\d\d lr=\S+ gnorm=\d+\.\d tok/s=\d+ elapsed=\d+s(?: teacher=\d+%)?"
    assert re.fullmatch(rf"\[     2/      4\] {numbers}", lines[0]), lines[0]
    assert re.fullmatch(r"Step 2: Total Loss: \d+\.\d{4}, CE Loss: \d+\.\d{4}, KL Loss: \d+\.\d{4}", lines[1]), lines[1]


def test_stages_train_what_they_name(recipe_tree, packed, tmp_path):
    recipe = with_changes(
        recipe_tree,
        training={**recipe_tree["training"], "mode": "ce"},
        stages={
            "enabled": True,
            "configs": [
                {"stage_name": "mlp_only", "max_steps": 2, "parameter_lr_multipliers": [
                    {"pattern": "mlp", "lr_multiplier": 1.0}, {"pattern": ".*", "lr_multiplier": 0.0}]},
                {"stage_name": "everything", "max_steps": 2},
            ],
        },
    )  # fmt: skip
    train_recipe(recipe, tmp_path / "student")
    from limbeck.data.tokenizer import recipe_tokenizer
    from limbeck.training.run import new_student

    start = weights(new_student(recipe.student, recipe_tokenizer(recipe), "per_document", recipe.seed))
    first = load_file(tmp_path / "student" / "mlp_only" / "final" / "model.safetensors")
    second = load_file(tmp_path / "student" / "everything" / "final" / "model.safetensors")
    assert second.keys() == load_file(tmp_path / "student" / "final" / "model.safetensors").keys()
    for name in first:
        assert torch.equal(first[name], start[name]) == ("mlp" not in name), name
        assert not torch.equal(first[name], second[name]), name


def test_a_damaged_checkpoint_is_named(recipe_tree, packed, tmp_path):
    recipe = with_changes(recipe_tree, training={**recipe_tree["training"], "mode": "ce", "save_steps": 2})
    train_recipe(recipe, tmp_path / "student")
    (tmp_path / "student" / "manifest.json").unlink()
    path = tmp_path / "student" / "step_4" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"step_4.*missing or damaged"):
        train_recipe(recipe, tmp_path / "student")


def test_fused_experts_survive_resume(packed, tmp_path):
    """transformers #48805: the Trainer's own loading leaves fused expert weights at their initialisation."""
    experts = {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "head_dim": 16, "decoder_sparse_step": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    whole = trained(packed, tmp_path / "a", tiny_model(**experts), save_strategy="steps", save_steps=1, max_steps=2)
    resumed = DistillationTrainer(
        tiny_model(**experts, seed=5), arguments(tmp_path / "a", max_steps=2, save_strategy="no"),
        teacher=whole.teacher, train_dataset=packed,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "step_1"))
    assert any("experts" in name for name in weights(whole.model))
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0.0


def test_rotation_keeps_the_newest_and_the_best(recipe_tree, packed, tmp_path):
    recipe = with_changes(
        recipe_tree,
        training={**recipe_tree["training"], "mode": "ce", "max_steps": 6, "save_steps": 1, "save_total_limit": 2},
    )
    train_recipe(recipe, tmp_path / "student")
    kept = sorted(path.name for path in (tmp_path / "student").glob("step_*"))
    assert kept == ["step_5", "step_6"]


def test_a_better_older_checkpoint_outlives_the_rotation(packed, tmp_path):
    """Best at step 2 of 5 with room for two: steps 2, 4 and 5 stay, and `best/` is step 2."""
    trainer = DistillationTrainer(
        tiny_model(),
        arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
                  save_total_limit=2, metric_for_best_model="eval_loss", greater_is_better=False),
        train_dataset=packed, eval_dataset=packed,
    )  # fmt: skip
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6])

    def evaluate(*args, **kwargs):
        metrics = {"eval_loss": next(losses)}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    trainer.evaluate = evaluate
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_2", "step_4", "step_5"]
    assert trainer.state.best_global_step == 2
    best, second = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "step_2"))
    assert all(torch.equal(best[name], second[name]) for name in second)


def test_a_start_from_elsewhere_that_is_killed_twice_ends_as_undisturbed(recipe_tree, packed, tmp_path):
    """`resume_from` holds for the first start alone; what is killed afterwards goes on from its own checkpoints."""
    base = {**recipe_tree["training"], "mode": "ce", "save_steps": 1, "save_total_limit": None, "max_steps": 2}
    train_recipe(with_changes(recipe_tree, training=base), tmp_path / "first")
    changed = {**base, "max_steps": 6, "learning_rate": 5e-3, "resume_from": str(tmp_path / "first" / "step_2")}
    recipe = with_changes(recipe_tree, training=changed)
    train_recipe(recipe, tmp_path / "whole")
    for saves in (1, 2):  # killed after one save, then after two more
        with stopped_after(saves):
            train_recipe(recipe, tmp_path / "cut")
    train_recipe(recipe, tmp_path / "cut")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "provenance.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 5]
    name = "final/model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_filler_and_borders_carry_no_loss():
    """Rows that are filled up: no label at the filler, before it, or across a border, whatever ids stand there."""
    items = [
        {"input_ids": [4, 5, 6, 7, 8], "doc_ids": [0, 0, 1, 1, -1], "row_id": 0},
        {"input_ids": [9, 9, 9], "doc_ids": [2, -1, -1], "row_id": 1},
    ]
    batch = RowCollator(None, pad_id=3)(items)
    none = -100
    assert batch["labels"].tolist() == [[5, none, 7, none, none], [none] * 5]
    assert batch["doc_ids"].tolist() == [[0, 0, 1, 1, -1], [2, -1, -1, -1, -1]]
    assert batch["input_ids"][1].tolist() == [9, 9, 9, 3, 3]
    model = tiny_model()
    attach_objectives(model)
    rows = PackedRows(batch["row_ids"], batch["input_ids"], batch["doc_ids"])
    request = loss_request(batch["labels"])
    assert int(request.batch.positions) == 2
    with torch.no_grad():
        logits = model(**rows.model_inputs("packed")).logits
    expected = torch.nn.functional.cross_entropy(logits[0, [0, 2]], torch.tensor([5, 7]))
    torch.testing.assert_close(model(**rows.model_inputs("packed"), loss_request=request).loss.detach(), expected)


@pytest.mark.parametrize("attention", ["packed", "per_document"])
def test_padding_in_front_is_padding_behind(attention):
    """Left-padded items (a generation's batch) train as the same items padded on the right."""
    ids, labels = [11, 12, 13, 14], [-100, -100, 13, 14]
    left = {"input_ids": [0, 0, *ids], "attention_mask": [0, 0, 1, 1, 1, 1], "labels": [-100, -100, *labels]}
    right = {"input_ids": [*ids, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0], "labels": [*labels, -100, -100]}
    one, other = RowCollator(None)([left]), RowCollator(None)([right])
    for key in one:
        assert torch.equal(one[key], other[key]), key
    model = tiny_model()
    attach_objectives(model)
    rows = PackedRows(one["row_ids"], one["input_ids"], one["doc_ids"])
    found = model(**rows.model_inputs(attention), loss_request=loss_request(one["labels"]))
    with torch.no_grad():
        logits = tiny_model()(input_ids=torch.tensor([ids])).logits[0, 1:3]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([13, 14]), reduction="sum")
    torch.testing.assert_close(found.metrics["ce_loss"].float(), expected)


def distributions(rows, *models):
    """Each model's own next-token distributions at the labelled positions, `[N, V]` in float64."""
    with torch.no_grad():
        return [m(**rows.model_inputs("per_document")).logits[rows.labels >= 0].double().softmax(-1) for m in models]


def student_and_teacher():
    student, teacher = tiny_model(seed=1), tiny_model(seed=9)
    with torch.no_grad():
        for model in (student, teacher):
            model.get_input_embeddings().weight.mul_(15.0)
    return student, teacher


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_the_distance_to_the_teacher_is_one_number_whatever_is_trained(packed, tmp_path, divergence):
    """`eval_kl_to_teacher` is the forward KL at temperature 1 over all ids; the trained one has its own name."""
    student, teacher = student_and_teacher()
    trainer = DistillationTrainer(
        student, arguments(tmp_path, divergence=divergence, temperature=2.0), teacher=LocalTeacher(teacher, top_k=3),
        train_dataset=packed, eval_dataset=packed,
    )  # fmt: skip
    found = trainer.evaluate()
    p, q = distributions(packed.rows(range(len(packed))), teacher, student)
    kl = float((p * (p / q).log()).sum(-1).mean())
    assert found["eval_kl_to_teacher"] == pytest.approx(kl, rel=1e-4)
    assert found["eval_divergence"] != pytest.approx(kl, rel=0.05)
    assert "eval_kl_to_teacher_at_least" not in found


def test_the_distance_to_a_wider_teacher_leaves_its_padding_out(packed, tmp_path):
    student, _ = student_and_teacher()
    teacher = tiny_model(vocab_size=4104, seed=5)
    with torch.no_grad():
        teacher.lm_head.weight[4096:] = 0.0
        teacher.lm_head.weight[:4096] *= 30.0
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=LocalTeacher(teacher, top_k=3), train_dataset=packed, eval_dataset=packed
    )
    found = trainer.evaluate()
    teacher.lm_head.weight.data = teacher.lm_head.weight[:4096].detach().clone()
    p, q = distributions(packed.rows(range(len(packed))), teacher, student)
    assert found["eval_kl_to_teacher"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)


def test_a_teachers_reference_keeps_to_its_budget_and_its_precision(packed):
    model = tiny_model(seed=5)
    rows = packed.rows(range(4))
    length = rows.input_ids.shape[1]
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    whole = LocalTeacher(model, top_k=3).reference(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        teacher = LocalTeacher(model, top_k=3, max_batch_tokens=length)
        seen.clear()
        reference = teacher.reference(rows)
        assert seen
        assert set(seen) == {1}
        found = reference.log_probs(torch.arange(5))
    torch.testing.assert_close(found, whole.log_probs(torch.arange(5)), rtol=1e-5, atol=1e-5)


class Sparse(Teacher):
    """A teacher that gives its stored ids alone: the least that one must have."""

    def __init__(self, local):
        self.local, self.temperatures, self.vocab_size = local, local.temperatures, local.vocab_size

    def targets(self, rows):
        return self.local.targets(rows)

    def template(self):
        return self.local.template()


def test_draws_estimate_the_distance_and_bound_nothing(packed, tmp_path):
    student, model = student_and_teacher()
    local = LocalTeacher(model, sampling=SamplingConfig(head=4, draws=9), temperatures=(1.0,))
    trainer = DistillationTrainer(
        student, arguments(tmp_path, temperature=1.0), teacher=Sparse(local), train_dataset=packed, eval_dataset=packed
    )
    found = trainer.evaluate()
    assert "eval_kl_to_teacher_estimate" in found
    assert "eval_kl_to_teacher_at_least" not in found


def test_a_teacher_that_gives_some_ids_alone_bounds_the_distance(packed, tmp_path):
    """Of the (K+1)-partition at temperature 1; the bound is named as one."""
    student, model = student_and_teacher()
    local = LocalTeacher(model, top_k=3)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, divergence="jsd"), teacher=Sparse(local), train_dataset=packed, eval_dataset=packed
    )
    found = trainer.evaluate()
    p, q = distributions(packed.rows(range(len(packed))), model, student)
    top = p.topk(3).indices
    ps, qs = (torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(-1, keepdim=True)], dim=-1) for x in (p, q))
    expected = float((ps * (ps / qs).log()).sum(-1).mean())
    assert found["eval_kl_to_teacher_at_least"] == pytest.approx(expected, rel=1e-4)
    assert "eval_kl_to_teacher" not in found
