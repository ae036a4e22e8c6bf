"""Training and caching against real servers that fail: the weights end the same, or the run stops cleanly."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import digest, limbeck, save_model, tiny_model
from serving import FaultyProxy, free_port

FINAL = "student/final/*.safetensors"


class Server:
    """`limbeck teacher serve` in a process of its own."""

    def __init__(self, model, port=None, *arguments, **environment):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "limbeck", "teacher", "serve", str(model), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--dtype", "float32", *arguments], stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, env={**os.environ, **environment},
        )  # fmt: skip
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("serving"):
                return
        raise AssertionError("".join(self.lines))

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


@pytest.fixture(scope="module")
def ground(corpus, teacher_folder, tmp_path_factory):
    """A server, a recipe without teacher, and the weights of an undisturbed run."""
    root = tmp_path_factory.mktemp("remote")
    tree = {
        "dataset": {"name": str(corpus), "max_length": 32, "validation_fraction": 0.2, "rows_per_shard": 16},
        "teacher": {"top_k": 16, "rows_per_shard": 8},
        "tokenizer": {"name": str(teacher_folder)},
        "student": {"config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
                               "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}},
        "training": {"max_steps": 30, "per_device_train_batch_size": 2, "logging_steps": 10, "report_to": [],
                     "save_steps": 5, "learning_rate": 1e-3},
    }  # fmt: skip
    with Server(teacher_folder) as server:
        path = root / "plain.yaml"
        path.write_text(json.dumps({**tree, "output_dir": str(root / "plain")}))
        limbeck("train", path, "--teacher-endpoint", server.url)
        yield server, tree, root, digest(root / "plain", FINAL)


def recipe(ground, folder):
    _, tree, _, _ = ground
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps({**tree, "output_dir": str(folder)}))
    return path


def test_an_overlapped_run_is_the_sequential_one(ground, tmp_path):
    server, _, _, expected = ground
    path = recipe(ground, tmp_path / "run")
    limbeck("train", path, "--teacher-endpoint", server.url, "--parallel", "false")
    assert digest(tmp_path / "run", FINAL) == expected
    log = (tmp_path / "run" / "student" / "training.log").read_text()
    assert "loss=" in log


def test_a_fifth_of_the_replies_spoilt_changes_nothing(ground, tmp_path):
    server, _, _, expected = ground
    with FaultyProxy(server.port) as proxy:
        done = limbeck(
            "train", recipe(ground, tmp_path / "run"), "--teacher-endpoint", proxy.url, "--teacher.timeout", 20
        )
    assert digest(tmp_path / "run", FINAL) == expected
    assert all(proxy.spoilt.values()), proxy.spoilt
    assert "had to be repeated" in done.stderr


def test_a_cache_made_through_a_faulty_connection_is_whole(ground, tmp_path):
    server, _, _, _ = ground
    for name, url in (("plain", server.url), ("faulty", None)):
        with FaultyProxy(server.port, every=2) as proxy:
            limbeck("teacher", "cache", recipe(ground, tmp_path / name), "--teacher-endpoint", url or proxy.url)
    assert sum(proxy.spoilt.values()) >= 2
    whole = digest(tmp_path / "plain", "cache/*.h5", "cache/manifest.json")
    assert digest(tmp_path / "faulty", "cache/*.h5", "cache/manifest.json") == whole
    # kill -9 among the shards, and two endpoints to go on with
    path = recipe(ground, tmp_path / "killed")
    command = [sys.executable, "-m", "limbeck", "teacher", "cache", str(path), "--teacher-endpoint", server.url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "killed" / "cache").glob("*.h5"))) < 2 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "cache" / "manifest.json").exists()
    limbeck("teacher", "cache", path, "--teacher-endpoint", f"{server.url},{server.url}/")
    assert digest(tmp_path / "killed", "cache/*.h5", "cache/manifest.json") == whole


def test_a_lost_server_stops_the_run_and_the_next_run_continues(ground, teacher_folder, tmp_path):
    _, _, _, expected = ground
    path = recipe(ground, tmp_path / "run")
    server = Server(teacher_folder)
    command = [sys.executable, "-m", "limbeck", "train", str(path), "--teacher-endpoint", server.url,
               "--teacher.retries", "2"]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "student").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    server.kill()
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1, errors
    assert "did not answer 3 times in a row" in errors
    assert "Traceback" not in errors
    with Server(teacher_folder, server.port) as again:
        done = limbeck("train", path, "--teacher-endpoint", again.url)
    assert "continuing from" in done.stderr
    assert digest(tmp_path / "run", FINAL) == expected


@pytest.mark.slow
def test_a_restarted_server_is_waited_for_and_another_model_is_not_taken(ground, teacher_folder, tmp_path):
    _, _, _, expected = ground
    for name, model in (("same", teacher_folder), ("other", save_model(tiny_model(seed=9), tmp_path / "model"))):
        folder = tmp_path / name
        server = Server(teacher_folder)
        path = recipe(ground, folder)
        command = [sys.executable, "-m", "limbeck", "train", str(path), "--teacher-endpoint", server.url]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not list((folder / "student").glob("step_*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        server.kill()
        with Server(model, server.port):
            _, errors = run.communicate(timeout=120)
        if name == "same":
            assert run.returncode == 0, errors
            assert digest(folder, FINAL) == expected
        else:
            assert run.returncode == 1, errors
            assert "changed" in errors
            assert "One run needs one teacher" in errors


def test_nobody_there_fails_at_once_and_finished_work_needs_nobody(ground, tmp_path):
    path = recipe(ground, tmp_path / "run")
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    done = limbeck("train", path, "--teacher-endpoint", url, check=False)
    assert done.returncode == 1
    assert f"Failed to connect to teacher endpoint: {url}" in done.stderr
    assert time.monotonic() - started < 60
    assert not (tmp_path / "run" / "data").exists(), "before any text is packed"
    with Server(ground[1]["tokenizer"]["name"]) as server:
        limbeck("train", path, "--teacher-endpoint", server.url)
    done = limbeck("train", path, "--teacher-endpoint", server.url)
    assert "train: found done" in done.stderr


def test_the_server_stops_gently(teacher_folder):
    server = Server(teacher_folder)
    server.process.send_signal(signal.SIGTERM)
    _, errors = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    assert "stopped" in errors
    done = limbeck("teacher", "probe", server.url, check=False)
    assert done.returncode == 1


def test_probe_says_what_is_there(ground, teacher_folder):
    server, _, _, _ = ground
    found = json.loads(limbeck("teacher", "probe", server.url, "--model", teacher_folder, "--json").stdout)
    assert found["protocol"] == "limbeck"
    assert found["vocab_size"] == 4096
    assert found["tokenizer"] == "the same"
    assert found["local"]["kl"] < 1e-4
    assert found["round_trips_per_s"] > 0


def test_two_ranks_share_a_remote_teacher(ground, tmp_path):
    """Each rank asks for its own rows; together they learn what one process does with twice the batch."""
    from safetensors.torch import load_file

    server, tree, _, _ = ground
    for name, batch in (("one", 4), ("two", 2)):
        training = {**tree["training"], "per_device_train_batch_size": batch, "max_steps": 5}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**tree, "training": training, "output_dir": str(tmp_path / name)}))
    limbeck("train", tmp_path / "one.yaml", "--teacher-endpoint", server.url)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck"]
    done = subprocess.run(
        [*command, "train", str(tmp_path / "two.yaml"), "--teacher-endpoint", server.url],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "student" / "final" / "model.safetensors") for name in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
