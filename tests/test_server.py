"""A served model, called over HTTP: OpenAI's endpoints, streams, limits, strangers, company and its end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import pytest
import torch

from conftest import TOKENIZER, save_model
from limbeck.export.gguf import GGUFExport
from limbeck.kernels import native
from limbeck.serving.generate import Generation
from limbeck.serving.model import GgufModel
from limbeck.serving.sampling import Sampling
from test_gguf_oracle import CASES, lively_model

pytestmark = pytest.mark.skipif(native() is None, reason="the extension is not built here")
TURN = [{"role": "user", "content": "x"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Running:
    """`limbeck serve` in a process of its own."""

    def __init__(self, path, *words, key=None):
        env = {**os.environ, **({"SERVED_KEY": key} if key else {})}
        command = [sys.executable, "-m", "limbeck", "serve", str(path), "--port", "0", *words]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"at (http://\S+)", line)
            if found:
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.log))
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self._reader.start()
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def post(self, path, **body):
        return self.client.post(path, json=body)

    def events(self, path, **body):
        """The data of a stream's events, the last one being None for [DONE]."""
        found = []
        with self.client.stream("POST", path, json={**body, "stream": True}) as reply:
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith("text/event-stream")
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    found.append(None if line == "data: [DONE]" else json.loads(line[6:]))
        assert found[-1] is None
        return found[:-1]

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.client.close()
        return self.process.wait(timeout=60)


def gguf_file(folder, model, template=None):
    save_model(model, folder / "final")
    if template is not None:
        config = json.loads((folder / "final" / "tokenizer_config.json").read_text())
        (folder / "final" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    GGUFExport(folder / "final", "f16").write(folder / "m.gguf")
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The shipped teacher with a chat template."""
    from limbeck.models import load_causal_lm

    folder = tmp_path_factory.mktemp("served")
    return gguf_file(folder, load_causal_lm(TOKENIZER, dtype="float32"), TEMPLATE)


@pytest.fixture(scope="module")
def server(files):
    running = Running(files, "--max-concurrent", "4", "--server.max_waiting", "20", "--server.name", "tiny")
    yield running
    assert running.stop() == 0


def test_information(server):
    assert server.client.get("/health").json()["status"] == "ok"
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    ids = server.post("/tokenize", text="def f(x):").json()["tokens"]
    assert server.post("/detokenize", tokens=ids).json()["text"] == "def f(x):"
    reply = server.client.post("/v1/embeddings", json={"input": "x"})
    assert reply.status_code == 404
    assert "causal language model" in reply.json()["error"]["message"]
    assert "limbeck_cache_bytes" in server.client.get("/metrics").text


def test_the_likeliest_completion_is_the_engines(server, files):
    model = GgufModel(files)
    prompt = model.tokenizer.encode("import os\n\ndef ")
    wanted = model.tokenizer.decode([*prompt, *Generation(model, Sampling(0.0)).tokens(prompt, 20)])
    body = server.post("/v1/completions", prompt="import os\n\ndef ", temperature=0, max_tokens=20).json()
    assert "import os\n\ndef " + body["choices"][0]["text"] == wanted
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 20, "total_tokens": len(prompt) + 20}
    assert body["choices"][0]["finish_reason"] == "length"
    echoed = server.post("/v1/completions", prompt=prompt, temperature=0, max_tokens=20, echo=True).json()
    assert echoed["choices"][0]["text"] == wanted


def test_a_stream_is_the_whole_answer_in_parts(server):
    asked = {"prompt": "class A:\n    def ", "max_tokens": 24, "seed": 3, "temperature": 0.9}
    whole = server.post("/v1/completions", **asked).json()["choices"][0]
    events = server.events("/v1/completions", **asked, stream_options={"include_usage": True})
    parts = [choice for event in events for choice in event["choices"]]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    assert len(parts) > 10
    assert events[-1]["usage"]["completion_tokens"] == 24
    chat = {"messages": [{"role": "user", "content": "x = 1"}], "max_tokens": 12, "seed": 5}
    whole = server.post("/v1/chat/completions", **chat).json()["choices"][0]
    events = server.events("/v1/chat/completions", **chat)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole["message"]["content"]


def test_logprobs_are_the_models(server, files):
    model = GgufModel(files)
    ids = model.tokenizer.encode("def f(x):\n    return x")
    logits = torch.from_numpy(model.line().extend(ids, every=True)).double().log_softmax(-1)
    body = server.post("/v1/completions", prompt=ids, max_tokens=0, echo=True, logprobs=3, temperature=0).json()
    found = body["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None
    for place in range(1, len(ids)):
        assert found["token_logprobs"][place] == pytest.approx(float(logits[place - 1, ids[place]]), abs=1e-4)
        best = sorted(found["top_logprobs"][place].values(), reverse=True)
        assert best == pytest.approx(logits[place - 1].topk(3).values.tolist(), abs=1e-4)
    assert "".join(found["tokens"]) == "def f(x):\n    return x"
    assert found["text_offset"] == [sum(map(len, found["tokens"][:place])) for place in range(len(ids))]
    chat = {
        "messages": [{"role": "user", "content": "y"}],
        "max_tokens": 3,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    content = server.post("/v1/chat/completions", **chat).json()["choices"][0]["logprobs"]["content"]
    for entry in content:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_stop_strings_end_a_text_before_them(server):
    free = server.post("/v1/completions", prompt="def f(", temperature=0, max_tokens=40).json()["choices"][0]["text"]
    stop = free[10:14]
    body = server.post("/v1/completions", prompt="def f(", temperature=0, max_tokens=40, stop=["never", stop]).json()
    choice = body["choices"][0]
    assert choice["text"] == free[: free.index(stop)]
    assert choice["finish_reason"] == "stop"
    events = server.events("/v1/completions", prompt="def f(", temperature=0, max_tokens=40, stop=stop)
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]


def test_the_same_seed_gives_the_same_text_in_company(server):
    asked = {"prompt": "import sys\n", "max_tokens": 30, "seed": 11, "temperature": 1.0}
    alone = server.post("/v1/completions", **asked).json()["choices"][0]["text"]
    found = []

    def ask(number):
        body = asked if number % 3 == 0 else {**asked, "prompt": f"x{number} = ", "seed": number}
        text = server.post("/v1/completions", **body).json()["choices"][0]["text"]
        if number % 3 == 0:
            found.append(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 3
    several = server.post("/v1/completions", **asked, n=3).json()["choices"]
    assert several[0]["text"] == alone
    assert len({choice["text"] for choice in several}) == 3


def test_sampling_parameters_are_used(server):
    ids = server.post("/tokenize", text="zzz", add_special=False).json()["tokens"]
    asked = {"prompt": "def ", "max_tokens": 6, "temperature": 0}
    plain = server.post("/v1/completions", **asked).json()["choices"][0]["text"]
    biased = server.post("/v1/completions", **asked, logit_bias={str(ids[0]): 100}).json()["choices"][0]["text"]
    assert biased != plain
    one = [
        server.post("/v1/completions", **{**asked, "temperature": 2.0, "seed": s, "top_k": 1}).json() for s in range(3)
    ]
    assert {body["choices"][0]["text"] for body in one} == {plain}
    nucleus = server.post("/v1/completions", **{**asked, "temperature": 2.0, "top_p": 1e-6}).json()
    assert nucleus["choices"][0]["text"] == plain
    least = server.post("/v1/completions", **{**asked, "temperature": 2.0, "min_p": 1.0}).json()
    assert least["choices"][0]["text"] == plain
    long = {"prompt": "a a a a", "max_tokens": 60, "temperature": 0}
    varied = server.post("/v1/completions", **long, repetition_penalty=5.0).json()["choices"][0]["text"]
    assert varied != server.post("/v1/completions", **long).json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}, "context is"),
        ("/v1/completions", {"prompt": [10**6]}, "ids are 0 to"),
        ("/v1/completions", {"prompt": []}, "empty"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"99999999": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": ["x"] * 9, "n": 2}, "18 texts"),
        ("/v1/chat/completions", {"messages": [{"role": "bad", "content": "x"}]}, "no such role"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ("/v1/chat/completions", {"messages": TURN, "response_format": {"type": "json_object"}}, "response_format"),
        ("/detokenize", {"tokens": [10**6]}, "ids are 0 to"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_a_400_with_the_reason(server, path, body, message):
    reply = server.client.post(path, json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_pages_of_other_sites_are_refused(server):
    body = {"prompt": "x", "max_tokens": 1}
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}, {"origin": "null"}):
        assert server.client.post("/v1/completions", json=body, headers=headers).status_code == 403
    own = {"origin": server.url}
    assert server.client.post("/v1/completions", json=body, headers=own).status_code == 200
    local = {"host": f"localhost:{server.url.rpartition(':')[2]}"}
    assert server.client.post("/v1/completions", json=body, headers=local).status_code == 200


def test_a_prompt_that_begins_alike_is_not_read_again(server):
    start = "\n".join(f"value_{number} = {number}" for number in range(60))
    asked = {"temperature": 0, "max_tokens": 4}
    first = server.post("/v1/completions", prompt=start + "\nlast = ", **asked).json()
    again = server.post("/v1/completions", prompt=start + "\nlast = ", **asked).json()
    other = server.post("/v1/completions", prompt=start + "\nother", **asked).json()
    fresh = Running_fresh(server, start + "\nother", asked)
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert other["choices"][0]["text"] == fresh


def Running_fresh(server, prompt, asked):  # noqa: N802
    """The same by a request that reads all of its prompt: echo takes no shortcut."""
    body = server.post("/v1/completions", prompt=prompt, echo=True, **asked).json()
    return body["choices"][0]["text"][len(prompt) :]


def test_a_caller_that_leaves_frees_its_place(server):
    long = {"prompt": "def ", "max_tokens": 900, "temperature": 1.0, "stream": True}
    for _ in range(6):
        with server.client.stream("POST", "/v1/completions", json=long) as reply:
            next(reply.iter_lines())
    deadline = time.monotonic() + 10
    while server.client.get("/health").json()["active"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.client.get("/health").json() == {"status": "ok", "active": 0, "waiting": 0}


def test_a_full_queue_and_a_wrong_key(files):
    running = Running(
        files, "--max-concurrent", "1", "--server.max_waiting", "1", "--api-key-env", "SERVED_KEY", key="k1"
    )
    statuses = []

    def ask():
        statuses.append(running.post("/v1/completions", prompt="x", max_tokens=400, temperature=0))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = [reply.status_code for reply in statuses]
    assert set(codes) == {200, 429}
    full = next(reply for reply in statuses if reply.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1
    wrong = httpx.post(f"{running.url}/v1/completions", json={"prompt": "x"}, headers={"authorization": "Bearer k2"})
    assert wrong.status_code == 401
    assert "k1" not in wrong.text + "".join(running.log)
    assert running.stop() == 0


def test_a_stop_finishes_what_is_being_written(files):
    running = Running(files)
    found = []

    def ask():
        found.append(running.events("/v1/completions", prompt="def ", max_tokens=300, temperature=0))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    running.process.send_signal(signal.SIGTERM)
    thread.join(timeout=60)
    assert found[0][-1]["choices"][0]["finish_reason"] == "length"
    assert running.process.wait(timeout=60) == 0


def test_a_recurrent_model_is_served(tmp_path):
    path = gguf_file(tmp_path, lively_model(3, **{**CASES["qwen3next"], "max_position_embeddings": 2048}))
    running = Running(path)
    asked = {"prompt": "import os " * 20, "max_tokens": 12, "temperature": 0}
    first = running.post("/v1/completions", **asked).json()["choices"][0]["text"]
    assert running.post("/v1/completions", **asked).json()["choices"][0]["text"] == first
    longer = running.post("/v1/completions", **{**asked, "prompt": asked["prompt"] + first}).json()
    whole = running.post("/v1/completions", **{**asked, "prompt": asked["prompt"] + first, "echo": True}).json()
    assert whole["choices"][0]["text"].endswith(longer["choices"][0]["text"])
    reply = running.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert reply.status_code == 400
    assert "no chat template" in reply.json()["error"]["message"]
    assert running.stop() == 0


def test_schemathesis_finds_no_server_error(files):
    """Whatever the published schema allows: no answer is the server's own failure, none hangs."""
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks, openapi

    running = Running(files, "--server.max_waiting", "200", "--ctx-size", "48")
    schema = openapi.from_url(f"{running.url}/openapi.json")
    seen = {"requests": 0, "answered": 0}
    for operation in schema.get_all_operations():

        @settings(
            max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
        )
        @given(case=operation.ok().as_strategy())
        def one(case):
            reply = case.call(timeout=30)
            seen["requests"] += 1
            seen["answered"] += reply.status_code == 200
            case.validate_response(reply, checks=[checks.not_a_server_error])

        one()
    assert seen["requests"] > 80
    assert seen["answered"] > 5
    assert running.client.get("/health").json()["active"] == 0
    assert running.stop() == 0


@pytest.mark.slow
def test_sixty_four_clients_for_a_minute(files):
    """Answers and refusals alone, memory that stays, no place that is left taken; some callers leave early."""
    import random

    import psutil

    running = Running(files, "--max-concurrent", "8", "--server.max_waiting", "16")
    process, statuses, wrong = psutil.Process(running.process.pid), {}, []
    deadline = time.monotonic() + 60

    def client(number):
        chance = random.Random(number)
        with httpx.Client(base_url=running.url, timeout=60) as http:
            while time.monotonic() < deadline:
                body = {"prompt": "x = " * chance.randint(1, 40), "max_tokens": chance.randint(1, 40), "seed": number}
                try:
                    if chance.random() < 0.3:
                        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
                            lines = [
                                line for line, _ in zip(reply.iter_lines(), range(chance.randint(1, 6)), strict=False)
                            ]
                            status = reply.status_code
                            if status == 200 and not lines[0].startswith("data: "):
                                wrong.append(lines[0])
                    else:
                        reply = http.post("/v1/completions", json=body)
                        status = reply.status_code
                        reply.json()
                    statuses[status] = statuses.get(status, 0) + 1
                    if status == 429:
                        time.sleep(0.2)
                except Exception as error:
                    wrong.append(repr(error))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    time.sleep(20)
    warm = process.memory_info().rss
    for thread in threads:
        thread.join()
    end = process.memory_info().rss
    print(statuses, f"{warm / 1e6:.0f} MB after 20 s, {end / 1e6:.0f} MB after 60 s")
    assert not wrong, wrong[:5]
    assert set(statuses) <= {200, 429}
    assert statuses[200] > 100
    assert end < 1.02 * warm + 4e6
    time.sleep(1.0)
    assert running.client.get("/health").json() == {"status": "ok", "active": 0, "waiting": 0}
    assert running.stop() == 0
