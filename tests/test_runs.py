"""Nothing is lost, and a person is told what is where: changed keys, longer runs, `limbeck runs`, endings."""

import contextlib
import io
import json
import shlex
import shutil
import signal
import time

import pytest

from conftest import TINY, digest, limbeck, with_keys
from limbeck.cli import main
from limbeck.folders import differences
from limbeck.pipeline import run_pipeline
from limbeck.runs import find_runs, prune
from limbeck.storage import read_json
from limbeck.training.checkpoints import what_remains

FEW = {"max_steps": 4, "save_steps": 2}


def said(*words) -> str:
    """What a command says on stderr; it must succeed."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        assert main([str(word) for word in words]) == 0, stderr.getvalue()
    return stderr.getvalue()


def test_differences_name_the_key_itself():
    old = {"training": {"max_steps": 4, "lr": 1.0}, "seed": 0, "same": [1]}
    new = {"training": {"max_steps": 8, "lr": 1.0}, "seed": 1, "same": [1], "more": True}
    assert differences(old, new) == "more: null -> true; seed: 0 -> 1; training.max_steps: 4 -> 8"
    assert differences({str(i): 0 for i in range(6)}, {}).endswith("; and 2 more")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, teacher_folder):
    """A finished run of 4 steps, made once."""
    root = tmp_path_factory.mktemp("trained")
    tree = {
        "name": "small",
        "dataset": {"name": str(corpus), "max_length": 32, "validation_fraction": 0.2},
        "teacher": {"model": str(teacher_folder), "top_k": 16},
        "student": {"config": TINY},
        "training": {"per_device_train_batch_size": 4, "report_to": [], "learning_rate": 1e-3, **FEW},
    }
    (root / "r.yaml").write_text(json.dumps({**tree, "output_dir": str(root / "run")}))
    limbeck("train", root / "r.yaml")
    return root, tree


@pytest.fixture
def longer(trained, tmp_path):
    """A copy of it, and its recipe file."""
    root, tree = trained
    shutil.copytree(root / "run", tmp_path / "run")
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**tree, "output_dir": str(tmp_path / "run")}))
    return path


def test_a_longer_run_says_where_the_earlier_one_is_and_how_to_extend_it(longer, tmp_path):
    done = limbeck("train", longer, "--max-steps", "8")
    kept = next((tmp_path / "run" / "previous").glob("student-*"))
    assert "training.max_steps: 4 -> 8" in done.stderr
    assert f"is kept in {kept}" in done.stderr
    assert f"`--max-steps 8 --resume-from {kept}`" in done.stderr
    anew = digest(tmp_path / "run" / "student" / "final", "*.safetensors")
    extended = limbeck("train", longer, "--max-steps", "8", "--resume-from", kept)  # the very line that was given
    assert f"continuing from {kept / 'step_4'} (step 4)" in extended.stderr
    assert read_json(tmp_path / "run" / "student" / "manifest.json")["steps"] == 8
    assert digest(tmp_path / "run" / "student" / "final", "*.safetensors") != anew  # another schedule before step 4
    before = limbeck("train", longer, "--max-steps", "8", "--resume-from", kept).stderr  # again: nothing is undone
    assert "(step 8)" in before


def test_a_finished_run_is_extended_in_place(longer, tmp_path):
    folder = tmp_path / "run" / "student"
    limbeck("train", longer, "--max-steps", "6", "--resume-from", folder)
    assert read_json(folder / "manifest.json")["steps"] == 6
    assert not (tmp_path / "run" / "previous").exists()


def test_runs_lists_what_is_there_and_prunes_what_was(longer, tmp_path):
    limbeck("train", longer, "--max-steps", "8")
    shown = limbeck("runs", tmp_path / "run").stdout
    assert "student" in shown
    assert "8 steps" in shown
    assert "differs from the present one: training.max_steps: 4 -> 8" in shown
    found = json.loads(limbeck("runs", tmp_path, "--json").stdout)["runs"]
    assert [run["path"] for run in found] == [str(tmp_path / "run")]
    assert {stage["state"] for stage in found[0]["stages"]} == {"complete"}
    names = {path.name for path in (tmp_path / "run" / "previous").iterdir()}
    dry = json.loads(limbeck("runs", tmp_path, "--prune", "--dry-run", "--json").stdout)
    assert dry["dry_run"] is True
    assert {path.name for path in (tmp_path / "run" / "previous").iterdir()} == names
    gone = json.loads(limbeck("runs", tmp_path, "--prune", "--json").stdout)
    assert gone["bytes"] == dry["bytes"] > 0
    assert not any((tmp_path / "run" / "previous").iterdir())
    assert (tmp_path / "run" / "student" / "final" / "config.json").is_file()


def test_force_and_resume_from_exclude_each_other(longer, tmp_path):
    folder = tmp_path / "run" / "student"
    before = digest(folder, "**/*.safetensors")
    refused = limbeck("train", longer, "--force", "--resume-from", folder, check=False)
    assert refused.returncode == 2
    assert "--force starts over and training.resume_from goes on from" in refused.stderr
    assert digest(folder, "**/*.safetensors") == before


def test_a_student_that_starts_from_the_folders_own_weights_keeps_them_until_they_are_read(longer, tmp_path):
    """They lie in the folder that the new training moves away."""
    final = tmp_path / "run" / "student" / "final"
    limbeck("train", longer, "--student-model", final, "--max-steps", "2")
    assert read_json(tmp_path / "run" / "student" / "manifest.json")["steps"] == 2
    assert len(list((tmp_path / "run" / "previous").glob("student-*"))) == 1


@pytest.mark.slow
def test_a_shorter_run_is_not_told_to_extend_anything(longer):
    told = limbeck("train", longer, "--max-steps", "2").stderr
    assert "training.max_steps: 4 -> 2" in told
    assert "--resume-from" not in told


@pytest.mark.slow
def test_what_a_training_started_from_is_not_pruned(longer, tmp_path):
    limbeck("train", longer, "--max-steps", "8")
    kept = next((tmp_path / "run" / "previous").glob("student-*"))
    limbeck("train", longer, "--max-steps", "8", "--resume-from", kept)
    gone = json.loads(limbeck("runs", tmp_path / "run", "--prune", "--json").stdout)["pruned"]
    assert str(kept) not in gone
    assert kept.is_dir()
    assert len(gone) == 1, "the run of 8 steps that began anew"


def test_runs_leaves_strangers_alone(tmp_path):
    stranger = tmp_path / "previous" / "student-abc"
    stranger.mkdir(parents=True)
    (stranger / "notes.txt").write_text("mine")
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    assert prune(find_runs(tmp_path)) == []
    assert (stranger / "notes.txt").is_file()
    refused = limbeck("runs", tmp_path / "previous", check=False)
    assert "holds no runs. Name a folder that does" in refused.stderr


def test_a_run_ends_with_the_commands_to_type_next(recipe, recipe_file, tmp_path):
    run_pipeline(recipe)
    done = json.loads(limbeck("run", recipe_file, "--json").stdout)
    assert len(done["next"]) == 3
    words = shlex.split(done["next"][0])  # it is no decoration: it runs
    assert limbeck(*words[words.index("generate") :], "--max-new-tokens", "4").stdout


def test_samples_stand_side_by_side(recipe):
    own = with_keys(recipe, pipeline={"generate": True, "ce_baseline": True}, generation={"max_new_tokens": 6})
    report = run_pipeline(own)
    assert list(report.results["samples"]) == ["teacher", "student_kd", "student_ce"]
    assert report.results["sample"] == report.results["samples"]["student_kd"]
    head = next(line for line in report.texts[-1].splitlines() if "student kd" in line)
    assert head.index("teacher") < head.index("student kd") < head.index("student ce")


def test_what_remains_is_what_happens(tmp_path, longer):
    assert what_remains(tmp_path / "nothing") == "the same command starts over, as no checkpoint had been saved"
    folder = tmp_path / "run" / "student"
    assert what_remains(folder) == f"the same command goes on from {folder / 'step_4'}"


@pytest.mark.slow
def test_ctrl_c_while_packing_starts_is_one_line(tmp_path):
    """The processes that tokenise are just starting: none of them may print what it was doing."""
    import os
    import subprocess
    import sys

    (tmp_path / "t").mkdir()
    for number in range(24):
        (tmp_path / "t" / f"{number}.txt").write_text("some words of a text " * 60_000)
    command = [sys.executable, "-m", "limbeck", "data", "pack", "--input", str(tmp_path / "t"), "--output",
               str(tmp_path / "out"), "--tokenizer", "tiny-python", "--dataset.num_proc", "2"]  # fmt: skip
    for wait in (0.0, 0.4, 1.0):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                                   start_new_session=True)  # fmt: skip
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "inputs.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
        _, told = process.communicate(timeout=60)
        assert "Traceback" not in told, told
        if process.returncode == 0:  # it was faster
            break
        assert process.returncode == 130
        assert told.splitlines()[-1] == "interrupted; what is finished is kept, and the same command goes on after it"
