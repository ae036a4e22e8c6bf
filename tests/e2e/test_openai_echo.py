"""Protocol openai-echo against a server that is not ours: llama-cpp-python's, over a small GGUF.

Needs the `verify` extra (`make verify`): llama-cpp-python is built from source.
"""

import importlib.util
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from conftest import TOKENIZER, limbeck
from limbeck import LocalTeacher
from limbeck.data.dataset import PackedRows
from limbeck.data.tokenizer import load_tokenizer
from limbeck.models import load_causal_lm
from limbeck.teachers.http import RefusedError
from limbeck.teachers.remote import RemoteTeacher
from limbeck.training.head import attach_objectives
from serving import free_port
from test_teachers import loss_of

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs the verify extra"),
]  # fmt: skip
TEXT = '''def read(path, encoding="utf-8"):
    """Return the text of a file."""
    with open(path, encoding=encoding) as handle:
        return handle.read()


class Reader:
    def __init__(self, path):
        self.path = path

    def lines(self):
        return read(self.path).splitlines()
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """llama-cpp-python's own server over the shipped teacher in float16."""
    model = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    limbeck("export", TOKENIZER, "--type", "f16", "--embedding", "f16", "--output", model)
    port = free_port()
    options = {"model": model, "port": port, "host": "127.0.0.1", "logits_all": "true", "n_ctx": 512, "n_threads": 2}
    command = [sys.executable, "-m", "llama_cpp.server", "--verbose", "false"]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5)
            break
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield url
    process.kill()
    process.wait()


def rows_of(tokenizer):
    ids = torch.tensor(tokenizer.hf(TEXT)["input_ids"])
    docs = (torch.arange(len(ids)) >= 40).long()
    return PackedRows(torch.arange(1), ids.unsqueeze(0), docs.unsqueeze(0))


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_loss_is_the_local_one(server, tau):
    tokenizer = load_tokenizer(TOKENIZER)
    with pytest.raises(RefusedError, match="one text.*teacher.tail: approximate"):
        RemoteTeacher.connect([server], temperatures=(1.0,), tokenizer=tokenizer, top_k=32)
    remote = RemoteTeacher.connect(
        [server], temperatures=tuple({1.0, tau}), tokenizer=tokenizer, top_k=32, approximate=True
    )
    rows = rows_of(tokenizer)
    targets = remote.targets(rows)
    remote.close()
    assert remote.info.protocol == "openai-echo"
    known = targets.valid.any(dim=-1)
    assert float(known.float().mean()) > 0.9
    teacher = load_causal_lm(TOKENIZER, dtype="float32").eval()
    own = LocalTeacher(teacher, top_k=32, temperatures=(1.0, tau) if tau != 1.0 else (1.0,)).targets(rows)
    same = targets.token_ids[..., 0][known] == own.token_ids[..., 0][known]
    assert float(same.float().mean()) > 0.97
    # Where the server says something, the loss is the local one within what float16 weights cost and ambiguous texts
    # in the tail move; shifted by one it would be several nats.
    labels = torch.where(known, rows.labels, -100)
    attach_objectives(teacher)
    shown = type("Rows", (), {"labels": labels, "model_inputs": rows.model_inputs})()
    theirs, ours = (loss_of(teacher, shown, held, tau) for held in (targets, own))
    gap = abs(theirs["kl_loss"] - ours["kl_loss"])
    assert gap < (5e-3 if tau == 1.0 else 0.1)
    assert int((shown.labels >= 0).sum()) > 50


def test_training_through_it_runs(server, corpus, tmp_path):
    done = limbeck(
        "train", "--teacher-endpoint", server, "--tokenizer", TOKENIZER, "--teacher.tail", "approximate", "--top-k", 16,
        "--dataset", corpus, "--seq-len", 64, "--max-steps", 3, "--batch-size", 2, "--output_dir", tmp_path / "run",
        "--student.config.model_type", "llama", "--student.config.hidden_size", 32, "--report-to=[]",
        "--student.config.intermediate_size", 64, "--student.config.num_hidden_layers", 1,
        "--student.config.num_attention_heads", 2, "--dataset.validation_fraction", 0.2,
    )  # fmt: skip
    assert "openai-echo" in done.stderr
    assert (tmp_path / "run" / "student" / "manifest.json").exists()
