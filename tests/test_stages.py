"""Stages: a curriculum of recipes in a row, each with its own data, optimizer and loss; resuming inside them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import limbeck, stopped_after
from limbeck.config import Recipe
from limbeck.errors import ConfigError, LimbeckError
from limbeck.pipeline import build_stages, run_pipeline
from limbeck.recipe import load_recipe
from limbeck.students.build import build_student
from test_trainer import with_changes

CURRICULUM = {
    "enabled": True,
    "configs": [
        {"stage_name": "ce", "max_steps": 3, "training": {"mode": "ce", "learning_rate": 2e-3},
         "dataset": {"max_length": 16}},
        {"stage_name": "kd", "max_steps": 4, "loss": {"alpha_initial": 0.1, "alpha_warmup_steps": 3,
         "temperature_initial": 4.0, "temperature_warmup_steps": 2},
         "optimizer": {"name": "muon_lion"}, "training": {"learning_rate": 0.01},
         "parameter_lr_multipliers": [{"pattern": "embed", "lr_multiplier": 0.0}]},
    ],
}  # fmt: skip


@pytest.fixture
def curriculum(recipe_tree) -> Recipe:
    training = {**recipe_tree["training"], "save_steps": 1, "eval_steps": 1, "save_total_limit": 2}
    return with_changes(recipe_tree, training=training, stages=CURRICULUM)


def finals(folder):
    return {name: (folder / name / "model.safetensors").read_bytes() for name in
            ("ce/final", "kd/final", "final", "best")}  # fmt: skip


def test_a_curriculum_packs_caches_and_trains_what_each_stage_says(curriculum):
    states = {stage.name: stage.state for stage in run_pipeline(curriculum, "train").stages}
    assert states == {"pack": "done", "pack:ce": "done", "cache": "done", "train": "done"}
    root, student = curriculum.root, curriculum.student_dir
    assert json.loads((root / "data-ce" / "manifest.json").read_text())["max_length"] == 16
    cache = json.loads((root / "cache" / "manifest.json").read_text())
    assert cache["codec"]["temperatures"] == [1.0, 2.0, 2.5, 3.0, 3.5, 4.0]  # what either stage uses
    ce = load_file(student / "ce" / "final" / "model.safetensors")
    kd = load_file(student / "kd" / "final" / "model.safetensors")
    start = build_student(curriculum.student, {"vocab_size": 4096}, curriculum.seed).state_dict()
    for name, value in kd.items():
        assert not torch.equal(ce[name], start[name]), name
        assert torch.equal(ce[name], value) == ("embed" in name), name
    logs = json.loads((student / "kd" / "step_4" / "trainer_state.json").read_text())["log_history"]
    lines = [entry for entry in logs if "loss" in entry]
    assert [round(entry["alpha"], 3) for entry in lines] == [round(0.1 + 0.4 / 3, 3), 0.5]
    assert [entry["temperature"] for entry in lines] == [3.0, 2.0]
    assert {"lr/all_others.muon", "lr/all_others.lion.no_decay"} < lines[0].keys()
    assert (student / "final" / "model.safetensors").read_bytes() == (
        student / "kd" / "final" / "model.safetensors"
    ).read_bytes()
    assert (student / "best" / "tokenizer.json").exists()
    assert {stage.state for stage in run_pipeline(curriculum, "train").stages} == {"skipped"}


def test_a_changed_stage_leaves_those_before_it(curriculum):
    run_pipeline(curriculum, "train")
    before = finals(curriculum.student_dir)
    stamp = (curriculum.student_dir / "ce" / "manifest.json").stat().st_mtime_ns
    tree = json.loads(curriculum.model_dump_json(exclude_unset=True))
    tree["stages"]["configs"][1]["max_steps"] = 3
    changed = Recipe.model_validate(tree)
    run_pipeline(changed, "train")
    after = finals(curriculum.student_dir)
    assert after["ce/final"] == before["ce/final"]
    assert (curriculum.student_dir / "ce" / "manifest.json").stat().st_mtime_ns == stamp
    assert after["kd/final"] != before["kd/final"]
    kept = [path for path in (curriculum.root / "previous").iterdir() if path.name.startswith("kd-")]
    assert len(kept) == 1
    tree["stages"]["configs"].append({"stage_name": "more", "max_steps": 1})
    longer = Recipe.model_validate(tree)
    run_pipeline(longer, "train")
    assert (longer.student_dir / "more" / "final" / "model.safetensors").exists()
    assert finals(curriculum.student_dir)["kd/final"] == after["kd/final"]
    run_pipeline(curriculum, "train")  # back to the first recipe: its own result returns
    assert finals(curriculum.student_dir) == before


@pytest.mark.parametrize("saves", [2, 5])
def test_resume_lands_inside_the_right_stage(curriculum, recipe_tree, tmp_path, saves):
    """Stopped after the second or fifth save: inside ce, inside kd."""
    run_pipeline(curriculum, "train")
    whole = finals(curriculum.student_dir)
    tree = json.loads(curriculum.model_dump_json(exclude_unset=True))
    cut = Recipe.model_validate({**tree, "output_dir": str(tmp_path / "cut")})
    with stopped_after(saves):
        run_pipeline(cut, "train")
    assert (cut.student_dir / "kd").exists() == (saves == 5)
    run_pipeline(cut, "train")
    assert finals(cut.student_dir) == whole
    stage = "ce" if saves == 2 else "kd"
    lines = (cut.student_dir / stage / "provenance.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2]


def test_a_run_without_stages_gives_way_and_comes_back(curriculum):
    tree = json.loads(curriculum.model_dump_json(exclude_unset=True))
    training = {**tree["training"], "max_steps": 4}
    plain = Recipe.model_validate({**tree, "training": training, "stages": {"enabled": False}})
    run_pipeline(plain, "train")
    first = (plain.student_dir / "final" / "model.safetensors").read_bytes()
    run_pipeline(curriculum, "train")
    assert (curriculum.student_dir / "kd").is_dir()
    run_pipeline(plain, "train")
    assert (plain.student_dir / "final" / "model.safetensors").read_bytes() == first
    assert not (plain.student_dir / "kd").exists()


@pytest.mark.parametrize("changes", [
    {"parameter_lr_multipliers": [{"pattern": "expertz", "lr_multiplier": 2.0}]},
    {"training": {"warmup_steps": 9}},
    {"optimizer": {"algorithms": [{"pattern": "norm", "algorithm": "muon"}]}},
])  # fmt: skip
def test_a_later_stages_mistake_shows_before_the_first_trains(curriculum, changes):
    tree = json.loads(curriculum.model_dump_json(exclude_unset=True))
    tree["stages"]["configs"][1].update(changes)
    with pytest.raises(ConfigError, match="stage kd: "):
        run_pipeline(Recipe.model_validate(tree), "train")
    assert not (curriculum.student_dir / "ce").exists()


def test_a_named_folder_is_refused_before_it_is_touched_and_force_trains_all(curriculum, tmp_path):
    tree = json.loads(curriculum.model_dump_json(exclude_unset=True))
    tree["training"]["output_dir"] = str(tmp_path / "named")
    named = Recipe.model_validate(tree)
    run_pipeline(named, "train")
    before = finals(tmp_path / "named")
    tree["stages"]["configs"][1]["max_steps"] = 3
    changed = Recipe.model_validate(tree)
    with pytest.raises(LimbeckError, match=r"kd was made from other inputs \(training"):
        run_pipeline(changed, "train")
    assert (tmp_path / "named" / "manifest.json").exists()
    assert {stage.state for stage in run_pipeline(named, "train").stages} == {"skipped"}
    run_pipeline(changed, "train", force=True)
    assert finals(tmp_path / "named")["ce/final"] == before["ce/final"]
    lines = (tmp_path / "named" / "ce" / "provenance.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0]  # trained anew


def test_stages_with_the_same_rows_share_them(recipe_tree):
    stages = {"enabled": True, "configs": [
        {"stage_name": "a", "max_steps": 1, "dataset": {"max_length": 16}},
        {"stage_name": "b", "max_steps": 1, "dataset": {"max_length": 16}, "loss": {"temperature": 1.0}},
        {"stage_name": "c", "max_steps": 1},
    ]}  # fmt: skip
    recipe = with_changes(recipe_tree, stages=stages)
    assert [node.name for node in build_stages(recipe)] == [
        "pack", "pack:a", "cache:a", "cache", "train", "evaluate",
    ]  # fmt: skip
    folders = {stage.stage_name: own.cache_dir.name for stage, own in recipe.stage_recipes()}
    assert folders == {"a": "cache-a", "b": "cache-a", "c": "cache"}


@pytest.mark.parametrize(("changes", "message"), [
    ({"loss": {"alhpa": 0.3}}, "stage kd: unknown key loss.alhpa; did you mean loss.alpha"),
    ({"training": {"max_steps": 3}}, "stage 'kd' sets training.max_steps"),
    ({"loss": {"temperature_initial": 3.0}}, "temperature_initial is 3.0 and loss.temperature_warmup_steps is 0"),
    ({"optimizer": {"name": "sgd"}}, "optimizer.name"),
])  # fmt: skip
def test_a_stage_with_a_typo_is_named(recipe_tree, tmp_path, changes, message):
    stages = {"enabled": True, "configs": [{"stage_name": "kd", "max_steps": 2, **changes}]}
    path = tmp_path / "recipe.yaml"
    training = {k: v for k, v in recipe_tree["training"].items() if k != "max_steps"}
    path.write_text(json.dumps({**recipe_tree, "training": training, "stages": stages}))
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"loss": {"alpha": 0.5, "alpha_final": 0.7, "alpha_initial": 0.1, "alpha_warmup_steps": 5}}, "set one of them"),
    ({"loss": {"alpha_warmup_steps": 5}}, "a ramp needs both"),
    ({"loss": {"temperature_initial": 4.0, "temperature_warmup_steps": 5},
      "teacher": {"model": "x", "temperatures": [1.0, 2.0]}}, "temperature_initial is 4.0 and teacher.temperatures"),
    ({"stages": CURRICULUM, "training": {"resume_from": "somewhere"}}, "stages continue by themselves"),
    ({"stages": CURRICULUM, "training": {"max_steps": 9}}, "training.max_steps is 9 and stages.enabled is true"),
    ({"stages": {**CURRICULUM, "configs": [{"stage_name": "final", "max_steps": 1}]}, "training": {}},
     "'final' names something else"),
    ({"stages": CURRICULUM, "training": {}, "teacher": {"model": "x", "sampling": {"head": 4}},
      "loss": {"temperature": 1.0}}, None),
    ({"stages": {"enabled": True, "configs": [{"stage_name": "a", "max_steps": 1, "loss": {"temperature": 1.0}}]},
      "training": {}, "teacher": {"model": "x", "sampling": {"head": 4}}}, "teacher.sampling draws at 2.0"),
])  # fmt: skip
def test_keys_that_clash_are_refused_at_once(recipe_tree, tmp_path, changes, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**recipe_tree, **changes}))
    if message is None:
        load_recipe(path)
        return
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_the_recipes_that_ship_have_sound_stages():
    recipe = load_recipe(__import__("pathlib").Path(__file__).parents[1] / "recipes" / "nano-ce-then-kd.yaml")
    first, second = [own for _, own in recipe.stage_recipes()]
    assert (first.training.mode, second.training.mode) == ("ce", "distill")
    assert second.optimizer.name == "muon_lion"
    assert second.parameter_lr_multipliers[0].pattern == "experts"


def test_flags_of_the_user(recipe_file):
    shown = limbeck(
        "config", "show", recipe_file, "--mhc-lr", "3e-4", "--optimizer", "muon_lion", "--lr", "0.02",
        "--enable-saddle-interventions", "--keep-last-checkpoints", "3", "--json",
    )  # fmt: skip
    found = json.loads(shown.stdout)
    assert found["optimizer"]["mhc"]["learning_rate"] == 3e-4
    assert found["optimizer"]["name"] == "muon_lion"
    assert found["saddle"]["enabled"] is True
    assert found["training"]["save_total_limit"] == 3
