"""kill -9 in each stage of a curriculum and in the middle of a save; and of one rank of two."""

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

NANO = Path(__file__).parents[2] / "recipes" / "nano-ce-then-kd.yaml"
PATTERNS = ("student/final/*.safetensors", "student/best/*.safetensors", "student/*/final/*.safetensors")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A two-stage recipe of a minute's tenth, its data and cache, and an undisturbed run of it."""
    root = tmp_path_factory.mktemp("stages")
    corpus, teacher = long_corpus_and_teacher(root, documents=60, repeats=6)
    tree = {
        "dataset": {"name": str(corpus), "max_length": 64, "validation_fraction": 0.1},
        "teacher": {"model": str(teacher), "top_k": 16, "splits": ["train"]},
        "student": {"config": TINY},
        "optimizer": {"name": "muon_lion"},
        "training": {"per_device_train_batch_size": 4, "logging_steps": 4, "report_to": [], "save_steps": 2,
                     "eval_steps": 2, "eval_rows": 8, "save_total_limit": 2, "learning_rate": 0.02},
        "stages": {"enabled": True, "configs": [
            {"stage_name": "ce", "max_steps": 12, "training": {"mode": "ce"}},
            {"stage_name": "kd", "max_steps": 16, "parameter_lr_multipliers": [{"pattern": "mlp", "lr_multiplier": 2}]},
        ]},
    }  # fmt: skip
    path = root / "tiny.yaml"
    path.write_text(json.dumps(tree))
    limbeck("train", path, "--output_dir", root / "whole")
    return path, root / "whole"


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The recipe that ships, undisturbed; takes minutes."""
    root = tmp_path_factory.mktemp("nano")
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "limbeck", "train", str(NANO), "--output_dir", str(root / "whole")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr
    return NANO, root / "whole"


def has_saved(folder: Path, stage: str) -> bool:
    return bool(list((folder / "student" / stage).glob("step_*")))


def is_saving(folder: Path, stage: str) -> bool:
    """A save has begun and one before it is whole."""
    return has_saved(folder, stage) and bool(list((folder / "student" / stage).glob(".step_*.tmp")))


MOMENTS = {
    "in ce": lambda folder: has_saved(folder, "ce"),
    "in kd": lambda folder: has_saved(folder, "kd"),
    "saving": lambda folder: is_saving(folder, "kd"),
}


def kill_at(command: list, folder: Path, moment: str, threads: str = "1") -> None:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )  # fmt: skip
    deadline = time.monotonic() + 1200
    while not MOMENTS[moment](folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    if moment != "saving":
        time.sleep(random.Random(moment).uniform(0.0, 0.05))
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "training ended before it could be killed"


def check(recipe: Path, whole: Path, tmp_path: Path, moment: str, threads: str) -> None:
    folder = tmp_path / "run"
    flags = ["--dataset.packed_dir", str(whole / "data"), "--teacher.cache_dir", str(whole / "cache")]
    command = [sys.executable, "-m", "limbeck", "train", str(recipe), "--output_dir", str(folder), *flags]
    kill_at(command, folder, moment, threads)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stderr
    expected = digest(whole, *PATTERNS)
    assert len(expected) == 4
    assert digest(folder, *PATTERNS) == expected
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("moment", [m if m == "saving" else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_killed_in_a_curriculum(tiny, tmp_path, moment):
    check(*tiny, tmp_path, moment, "1")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_nano_recipe_killed(nano, tmp_path, moment):
    check(*nano, tmp_path, moment, "2")


def ranks_of(agent: int) -> dict[int, int]:
    """RANK -> process id of a torchrun's workers."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(") ")[2].split()
            environment = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((item[5:] for item in environment if item.startswith(b"RANK=")), None)
        if rank is not None and int(fields[1]) == agent:
            found[int(rank)] = int(status.parent.name)
    return found


def test_a_killed_rank_ends_the_run_clearly_and_it_resumes(tiny, tmp_path):
    recipe, whole = tiny
    flags = ["--dataset.packed_dir", str(whole / "data"), "--teacher.cache_dir", str(whole / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(folder: Path) -> list[str]:
        return [*TORCHRUN, "train", str(recipe), "--output_dir", str(folder), *flags]

    done = subprocess.run(command(tmp_path / "two"), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "cut"
    with (tmp_path / "err").open("w") as err:
        agent = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=err, env=environment)
        while not has_saved(folder, "kd") and agent.poll() is None:
            time.sleep(0.002)
        os.kill(ranks_of(agent.pid)[1], signal.SIGKILL)
        assert agent.wait(timeout=120) != 0
    text = (tmp_path / "err").read_text()
    # Rank 0 notices the lost connection, or torchrun ends it first: in a step, or while it leaves because of the
    # connection. Each says how to go on.
    said = ("lost another rank", "terminated; run the same command again to continue", "the same command goes on after")
    assert any(words in text for words in said), text[-3000:]
    assert not (folder / "student" / "manifest.json").exists()
    again = subprocess.run(command(folder), capture_output=True, text=True, timeout=300, env=environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "continuing from" in again.stderr
    assert digest(folder, *PATTERNS) == digest(tmp_path / "two", *PATTERNS)
