"""kill -9 in the middle of pack, cache and train: the rerun ends with the bytes of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import TINY, digest, limbeck, long_corpus_and_teacher

PATTERNS = {"pack": ("data/*.parquet", "data/manifest.json"),
            "cache": ("cache/*.h5", "cache/manifest.json"),
            "train": ("student/final/*.safetensors", "student/best/*.safetensors")}  # fmt: skip
COMMANDS = {"pack": ("data", "pack"), "cache": ("teacher", "cache"), "train": ("train",)}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A corpus and a teacher big enough that every stage takes a while, and an undisturbed run of all three."""
    root = tmp_path_factory.mktemp("kill")
    corpus, teacher = long_corpus_and_teacher(root, documents=120, repeats=12)
    tree = {
        "name": "kill",
        "dataset": {"name": str(corpus), "max_length": 64, "validation_fraction": 0.1, "rows_per_shard": 16},
        "teacher": {"model": str(teacher), "top_k": 16, "rows_per_shard": 16},
        "student": {"config": TINY},
        "training": {"max_steps": 24, "per_device_train_batch_size": 4, "logging_steps": 4, "report_to": [],
                     "save_steps": 3, "eval_steps": 3, "eval_rows": 8, "save_total_limit": 2},
    }  # fmt: skip
    limbeck("train", write_recipe(tree, root / "whole"))
    return root, tree


def write_recipe(tree: dict, folder: Path) -> Path:
    """The recipe as a file beside the folder it writes."""
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps({**tree, "output_dir": str(folder)}))
    return path


def finished_pieces(folder: Path, stage: str) -> int:
    """How far a running stage has come: shards in place, or checkpoints begun."""
    if stage == "train":
        steps = [int(p.name.split("_")[1]) for p in (folder / "student").glob("step_*")]
        return max(steps, default=0) // 3
    name, pattern = {"pack": ("data", "*.parquet"), "cache": ("cache", "*.h5")}[stage]
    return len(list((folder / name).glob(pattern)))


def run_and_kill(stage: str, recipe: Path, folder: Path, seed: int) -> None:
    """Start a stage, wait for a few of its pieces and a random moment, and kill it and its workers."""
    generator = random.Random(seed)
    after, delay = generator.randint(1, 5), generator.uniform(0.0, 0.05)
    command = [sys.executable, "-m", "limbeck", *COMMANDS[stage], str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while finished_pieces(folder, stage) < after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the stage ended before it could be killed"


def check(ground, tmp_path: Path, stage: str, seed: int) -> None:
    root, tree = ground
    folder = tmp_path / "run"
    recipe = write_recipe(tree, folder)
    if stage != "pack":  # what the stage reads is made in peace
        limbeck(*COMMANDS["pack" if stage == "cache" else "cache"], recipe)
    run_and_kill(stage, recipe, folder, seed)
    limbeck(*COMMANDS[stage], recipe)
    expected = digest(root / "whole", *PATTERNS[stage])
    assert digest(folder, *PATTERNS[stage]) == expected
    assert len(expected) >= 2
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("stage", [pytest.param("pack", marks=pytest.mark.slow), "cache", "train"])
def test_killed_once(ground, tmp_path, stage):
    check(ground, tmp_path, stage, seed=11)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pack", "cache", "train"])
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_ten_random_moments(ground, tmp_path, stage, seed):
    check(ground, tmp_path, stage, seed)
