"""Ctrl-C while a run trains: the step in hand is finished and saved; what goes on from it ends with the same bytes."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import TINY, digest, limbeck, save_model, tiny_model, write_corpus

PATTERNS = ("student/final/*.safetensors",)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A recipe without `save_steps`, and an undisturbed run of it."""
    root = tmp_path_factory.mktemp("interrupt")
    corpus, teacher = write_corpus(root / "text"), save_model(tiny_model(seed=7), root / "teacher")
    tree = {
        "name": "interrupt",
        "dataset": {"name": str(corpus), "max_length": 32, "validation_fraction": 0.2},
        "teacher": {"model": str(teacher), "top_k": 8},
        "student": {"config": TINY},
        "training": {"max_steps": 120, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                     "logging_steps": 7, "report_to": []},
    }  # fmt: skip
    limbeck("train", written(tree, root / "whole"))
    return root, tree


def written(tree, folder):
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps({**tree, "output_dir": str(folder)}))
    return path


def started(recipe):
    return subprocess.Popen(
        [sys.executable, "-m", "limbeck", "train", str(recipe)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip


def step_lines(log) -> int:
    return log.read_text().count("elapsed=") if log.exists() else 0


def until_training(process, log, lines):
    """Wait until the log holds more lines of steps than before: training goes on."""
    while process.poll() is None and step_lines(log) <= lines:
        time.sleep(0.01)


def interrupted(ground, name, times, numbers):
    """Train with signals at random moments; gives the run's folder, and how often a signal came in time."""
    root, tree = ground
    folder, chance, stops = root / name, random.Random(name), 0
    recipe = written(tree, folder)
    for attempt in range(times + 1):
        log = folder / "student" / "training.log"
        process = started(recipe)
        if attempt < times:
            until_training(process, log, step_lines(log))
            time.sleep(chance.uniform(0.0, 0.15))
            number = numbers[attempt % len(numbers)]
            process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == 128 + number, stderr
        saved = sorted(int(path.name.removeprefix("step_")) for path in (folder / "student").glob("step_*"))
        kept = folder / "student" / f"step_{saved[-1]}"
        assert f"stopped after step {saved[-1]}; the same command goes on from {kept}" in stderr
        assert "Traceback" not in stderr
        stops += 1
    return folder, stops


@pytest.mark.parametrize(
    ("times", "numbers"),
    [
        (2, [signal.SIGINT, signal.SIGTERM]),
        pytest.param(10, [signal.SIGINT], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_interrupted_again_and_again_ends_with_the_same_bytes(ground, times, numbers):
    folder, stops = interrupted(ground, f"cut{times}", times, numbers)
    assert stops >= min(times, 2)
    assert digest(folder, *PATTERNS) == digest(ground[0] / "whole", *PATTERNS)
    places = (folder, ground[0] / "whole")
    curves = [
        json.loads((place / "student/step_120/trainer_state.json").read_text())["log_history"] for place in places
    ]
    assert [entry["step"] for entry in curves[0]] == [entry["step"] for entry in curves[1]]
    assert [entry["loss"] for entry in curves[0] if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in curves[1] if "loss" in entry], abs=1e-5
    )


def test_a_second_signal_leaves_at_once(ground):
    root, tree = ground
    recipe = written({**tree, "training": {**tree["training"], "max_steps": 3000}}, root / "twice")
    process = started(recipe)
    until_training(process, root / "twice" / "student" / "training.log", 0)
    process.send_signal(signal.SIGSTOP)  # both are there before the next step
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert "leaving at once" in stderr
    assert "Traceback" not in stderr


def test_two_ranks_stop_at_the_same_step(ground):
    """One of them is told; both save, and the run goes on to the undisturbed one's end."""
    root, tree = ground
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck"]
    two = {**tree, "training": {**tree["training"], "per_device_train_batch_size": 1}}
    recipe = written(two, root / "ranks")
    process = subprocess.Popen(
        [*command, "train", str(recipe)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    until_training(process, root / "ranks" / "student" / "training.log", 0)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-INT", children[-1]], check=True)
    _, stderr = process.communicate(timeout=120)
    assert "stopped after step" in stderr
    limbeck("train", recipe)
    assert (root / "ranks" / "student" / "manifest.json").exists()
