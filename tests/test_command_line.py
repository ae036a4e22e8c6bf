"""The command line as people use it: help, completion, values, flags in messages, folders for recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from conftest import limbeck, save_model, tiny_model
from limbeck.cli import main
from limbeck.cli.completion import install
from limbeck.cli.main import root
from limbeck.cli.options import key_options, parse_flags
from limbeck.cli.table import SUBCOMMANDS
from limbeck.config import Recipe
from limbeck.errors import ConfigError
from limbeck.recipe import keys, load_recipe
from limbeck.registry import DIVERGENCES, PROTOCOLS

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def shown(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


# -- help ---------------------------------------------------------------------------------------------------


def test_help_shows_the_commands_own_keys_first_and_the_rest_on_demand(capsys):
    code, out, _ = shown(capsys, "train", "--help")
    assert code == 0
    for text in ("--pretrain-ce-only", "--lr, --learning-rate, --training.learning_rate NUMBER", "--dry-run"):
        assert text in out
    assert out.index("Flags of this command") < out.index("Most used keys")
    assert "teacher_server" not in out
    _, everything, _ = shown(capsys, "train", "--help-all")
    for key, _ in keys():
        assert f"--{key} " in everything, key


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_has_help_that_names_known_keys(capsys, name):
    code, out, _ = shown(capsys, *name.split(), "--help")
    assert code == 0
    assert SUBCOMMANDS[name].help.split(":")[0][:40] in " ".join(out.split())
    known = dict(keys())
    sub = SUBCOMMANDS[name]
    assert not [key for key in (*sub.first, *sub.aliases.values()) if key not in known and key != "student.ternary"]


def test_choices_of_enumerated_keys_are_shown(capsys):
    _, out, _ = shown(capsys, "run", "--help-all")
    flat = " ".join(out.split())
    assert f"--loss.divergence {'|'.join(DIVERGENCES)}" in flat
    assert f"--teacher.remote.protocol auto|{'|'.join(PROTOCOLS)}" in flat
    assert "--training.device cpu|cuda" in flat
    assert "--training.bf16 auto|true|false" in flat
    assert "--student.ternary.group_size row|tensor|NUMBER" in flat
    assert "--training.report_to tensorboard|wandb|trackio" in flat


def test_groups_and_the_whole_have_help(capsys):
    assert shown(capsys)[0] == 2
    code, out, _ = shown(capsys, "--help")
    assert code == 0
    for name in SUBCOMMANDS:
        assert f"  {name} " in out
    code, out, _ = shown(capsys, "teacher", "--help")
    assert code == 0
    assert "teacher cache" in out
    assert "data pack" not in out
    assert shown(capsys, "teacher")[0] == 2
    assert shown(capsys, "--version")[1].startswith("limbeck 0.")


# -- completion ---------------------------------------------------------------------------------------------


def completed(*words):
    """What bash is told to offer for the last word."""
    line = " ".join(["limbeck", *words])
    environment = {
        **os.environ, "_LIMBECK_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words)),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "limbeck"], env=environment, capture_output=True, text=True, timeout=60
    )
    return [line.split(",", 1)[1] for line in done.stdout.splitlines() if "," in line]


def test_the_shell_completes_commands_flags_and_choices():
    assert set(completed("te")) == {"teacher"}
    assert set(completed("teacher", "")) == {"cache", "probe", "serve"}
    assert "--loss.alpha" in completed("train", "--loss.a")
    assert completed("train", "--loss.divergence", "js") == ["jsd"]


@pytest.mark.parametrize(("shell", "start"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", None)])
def test_completion_is_installed_once_and_leaves_the_rest_alone(shell, start, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    if start:
        (tmp_path / start).write_text("export MINE=1")
    for _ in range(2):
        path = install(root(), shell)
    assert "_LIMBECK_COMPLETE" in path.read_text()
    if start:
        assert (tmp_path / start).read_text().splitlines() == ["export MINE=1", f'. "{path}"']
    with pytest.raises(ConfigError, match="choose bash, zsh or fish"):
        install(root(), "tcsh")


# -- values and flags in messages ---------------------------------------------------------------------------


def test_lists_nulls_and_sections_can_be_given():
    assert parse_flags(["--student.ternary.exclude", "[o_proj]"]) == {"student": {"ternary": {"exclude": ["o_proj"]}}}
    assert parse_flags(["--student.ternary", "null"]) == {"student": {"ternary": None}}
    assert parse_flags(["--teacher.sampling", "{head: 3}"]) == {"teacher": {"sampling": {"head": 3}}}
    assert parse_flags(["--seed", "-1"]) == {"seed": -1}
    assert parse_flags(["--lr", "1", "--lr", "2"]) == {"training": {"learning_rate": 2}}
    assert parse_flags(["--student.config.hidden_size=64", "--student.config.tie", "-3"]) == {
        "student": {"config": {"hidden_size": 64, "tie": -3}}
    }
    assert parse_flags(["--training.dashboard", "on"]) == {"training": {"dashboard": "on"}}
    assert parse_flags(["--loss.jsd_beta", "0.3"]) == {"loss": {"jsd_beta": 0.3}}


@pytest.mark.parametrize(
    ("key", "one", "listed"),
    [
        ("--report-to", "wandb", ["wandb"]),
        ("--report-to", "wandb,tensorboard", ["wandb", "tensorboard"]),
        ("--pipeline.export", "gguf", ["gguf"]),
        ("--teacher.splits", "train", ["train"]),
        ("--teacher-endpoint", "http://a:1,http://b:2", ["http://a:1", "http://b:2"]),
    ],
)
def test_one_name_stands_for_a_list(key, one, listed):
    def value(words):
        found = load_recipe(None, parse_flags([key, words]))
        return {
            "--report-to": found.training.report_to, "--pipeline.export": found.pipeline.export,
            "--teacher.splits": found.teacher.cache.splits, "--teacher-endpoint": found.teacher.remote.endpoint,
        }[key]  # fmt: skip

    assert value(one) == value(json.dumps(listed)) == listed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "fast"], "error: --lr (training.learning_rate) must be a number (found 'fast')\n"),
        (["--max-steps", "0"], "error: --max-steps (training.max_steps) must be -1 or larger than 0 (found 0)\n"),
        (["--loss.alpha", "1.5"], "error: --loss.alpha (loss.alpha)"),
        (["--report-to", "tensorbord"], "must be one of tensorboard, wandb, trackio (found 'tensorbord')"),
        (["--bf16", "maybe"], "error: --bf16 (training.bf16) must be true or false or auto (found 'maybe')\n"),
        (["--student.ternary.group_size", "0"], "must be larger than 0 or one of row, tensor (found 0)"),
        (["--dataset.max_length", "1.5"], "must be a whole number (found 1.5)"),
        (["--loss.divergence", "kl"], "unknown divergence 'kl'; choose one of forward_kl"),
        (["--lr"], "limbeck config show: --lr needs a value"),
        (["--stages.configs", "{a: 1}"], "stages.configs must be a list"),
    ],
)
def test_a_wrong_flag_is_named_as_it_was_typed(capsys, flags, message):
    code, _, err = shown(capsys, "config", "show", *flags)
    assert code == 2
    assert message.replace("--loss.alpha (loss.alpha)", "loss.alpha must be at most 1") in err
    assert err.count("\n") == 1
    for word in ("Input should", "constrained", "literal[", "valid integer", "pydantic"):
        assert word not in err


def test_a_recipes_own_mistake_names_the_file(capsys, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("loss: {alpha: lots}\nsaddle: [1]\n")
    code, _, err = shown(capsys, "config", "show", path, "--lr", "2")
    assert code == 2
    assert err == (
        f"error: {path}: loss.alpha must be a number (found 'lots')\n"
        "  saddle must be a section, with keys and values (found [1])\n"
    )


def test_yes_and_on_are_words_where_a_key_wants_words(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("training: {dashboard: off, bf16: yes}\nsaddle: {enabled: on}\n")
    found = load_recipe(path)
    assert (found.training.dashboard, found.training.bf16, found.saddle.enabled) == ("off", True, True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_every_shipped_recipe(path):
    validator = jsonschema_rs.validator_for(Recipe.model_json_schema())
    validator.validate(yaml.safe_load(path.read_text()))
    wrong = {**yaml.safe_load(path.read_text()), "teachr": {}}
    assert not validator.is_valid(wrong)


def test_no_flag_means_two_keys():
    for sub in SUBCOMMANDS.values():
        names = [name.replace("_", "-") for option in key_options(sub.aliases) for name in option.shown]
        assert len(names) == len(set(names))


# -- folders for recipes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus, teacher_folder):
    """A run's folder, made from a recipe and a flag."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "small.yaml"
    student = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
               "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    tree = {
        "dataset": {"name": str(corpus), "max_length": 32, "validation_fraction": 0.2},
        "teacher": {"model": str(teacher_folder), "top_k": 8},
        "student": {"config": student, "ternary": {"group_size": 32}},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": []},
        "pipeline": {"export": ["gguf"]},
    }
    recipe.write_text(yaml.safe_dump(tree))
    limbeck("run", recipe, "--output_dir", folder / "out", "--lr", "2e-3", cwd=folder)
    recipe.unlink()  # the folder alone stands for it
    return folder / "out"


@pytest.mark.parametrize("part", ["", "student", "student/final"])
def test_eval_takes_a_run_its_student_or_its_model(finished, part):
    scores = json.loads(limbeck("eval", finished / part, "--json", cwd=finished).stdout)
    assert scores["student"]["kl_to_teacher"] > 0


def test_generate_export_and_inspect_take_them_too(finished, tmp_path):
    for part in ("", "student/final"):
        text = json.loads(limbeck("generate", finished / part, "--max-new-tokens", "2", "--json").stdout)
        assert text["text"].startswith("def ")
        output = tmp_path / f"{len(part)}.gguf"
        done = json.loads(limbeck("export", finished / part, "--output", output, "--json").stdout)
        assert Path(done["output"]) == output
        assert output.is_file()
    assert "tensors" in limbeck("inspect", finished, "--json").stdout


def test_run_continues_a_runs_folder(finished):
    states = json.loads(limbeck("run", finished, "--json", cwd=finished).stdout)["stages"]
    assert {stage["state"] for stage in states} == {"skipped"}
    shown = json.loads(limbeck("config", "show", finished, "--json").stdout)
    assert shown["training"]["learning_rate"] == 2e-3


def test_a_models_name_is_no_recipe(capsys):
    code, out, _ = shown(capsys, "generate", "tiny-python", "--max-new-tokens", "1", "--json")
    assert code == 0
    assert json.loads(out)["model"] == "tiny-python"
    assert "no finished model" in shown(capsys, "export", "nowhere")[2]


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
    code, _, err = shown(capsys, "train", tmp_path)
    assert code == 2
    assert "is a folder and no run's (no recipe.yaml in it)" in err
    model = save_model(tiny_model(), tmp_path / "model")
    code, _, err = shown(capsys, "eval", model)
    assert code == 2
    assert "limbeck eval RECIPE.yaml --model" in err
    code, _, err = shown(capsys, "train", "a.yaml", "b.yaml")
    assert "unexpected argument 'b.yaml'" in err
