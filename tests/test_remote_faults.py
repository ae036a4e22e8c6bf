"""What endpoints do wrong, one thing at a time: what is tried again, what ends the run, what is never believed."""

import json
import math
import os

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from conftest import limbeck, peaked_model, remote_identity, tiny_model
from limbeck import LocalTeacher
from limbeck.config import Recipe
from limbeck.data.dataset import PackedRows
from limbeck.errors import ConfigError, LimbeckError, MismatchError
from limbeck.models import load_causal_lm
from limbeck.teachers import identity
from limbeck.teachers.build_cache import build_cache
from limbeck.teachers.http import LostError, RefusedError, WrongAnswerError
from limbeck.teachers.identity import environment_key
from limbeck.teachers.remote import RemoteTeacher
from serving import Served, bound, free_port, limbeck_app, running, user_app, vllm_app


@pytest.fixture(scope="module")
def model(teacher_folder):
    return load_causal_lm(str(teacher_folder), dtype="float32").eval()


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(1, 4000, (2, 20), generator=torch.Generator().manual_seed(0))
    return PackedRows(torch.arange(2), ids, torch.zeros_like(ids))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("limbeck.teachers.http._FIRST_PAUSE", 0.02)


class Switch:
    """An ASGI app that can be exchanged, or answer with a status, while it serves."""

    def __init__(self, app):
        self.app, self.status, self.left, self.seen = app, None, 0, 0

    def fail(self, status, times):
        self.status, self.left = status, times

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            self.seen += 1
            if self.left:
                self.left -= 1
                await Response("later", self.status, {"retry-after": "0"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


def vllm(url, **more):
    return RemoteTeacher.connect([url], top_k=8, temperatures=(1.0,), vocab_size=4096, **more)


@pytest.mark.parametrize("kind", ["limbeck", "vllm"])
@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_that_is_not_ready_is_waited_for(teacher_folder, model, rows, kind, status):
    switch = Switch(limbeck_app(teacher_folder) if kind == "limbeck" else vllm_app(model))
    with running(switch) as url:
        if status != 500:  # at the start a 500 may be how a server refuses a form it does not know
            switch.fail(status, 2)
        teacher = vllm(url) if kind == "vllm" else RemoteTeacher.connect([url], top_k=8, temperatures=(1.0,))
        expected = teacher.targets(rows)
        switch.fail(status, 5)
        found = teacher.targets(rows)
        assert torch.equal(found.logprobs, expected.logprobs)
        switch.fail(status, 1000)
        teacher._client._retries = 3
        with pytest.raises(LostError, match="did not answer 4 times in a row"):
            teacher.targets(rows)
        teacher.close()


def test_another_model_is_noticed_even_after_an_idle_restart(model, rows):
    """No request fails: the closed connection is replaced in silence, and a new one means a new look."""
    other = peaked_model(9)
    with bound() as held:
        with running(vllm_app(model), held) as url:
            teacher = vllm(url)
            teacher.targets(rows)
        with running(vllm_app(other), held), pytest.raises(WrongAnswerError, match="changed while this run went on"):
            teacher.targets(rows)
    teacher.close()


def test_two_endpoints_of_different_models_are_refused(model):
    with (
        running(vllm_app(model)) as one,
        running(vllm_app(tiny_model(seed=9))) as two,
        pytest.raises(WrongAnswerError, match=f"{one} and {two} serve different models"),
    ):
        RemoteTeacher.connect([one, two], top_k=8, temperatures=(1.0,), vocab_size=4096)


def test_an_endpoint_that_failed_once_is_asked_again(teacher_folder, rows):
    app = limbeck_app(teacher_folder)
    one, two = Switch(app), Switch(app)
    with running(one) as first, running(two) as second:
        teacher = RemoteTeacher.connect([first, second], top_k=8, temperatures=(1.0,))
        one.fail(503, 1)
        for _ in range(4):
            teacher.targets(rows)
        seen = one.seen
        for future in [teacher.submit(rows) for _ in range(12)]:
            future.result()
        teacher.close()
        assert one.seen >= seen + 3
        assert two.seen >= 3


def test_a_dead_endpoint_does_not_stop_the_others(teacher_folder, rows):
    """Sequential requests, each of which would rather have asked the dead one."""
    for dead_first in (True, False):
        app = limbeck_app(teacher_folder)
        with running(app) as alive, running(app) as doomed:
            urls = [doomed, alive] if dead_first else [alive, doomed]
            teacher = RemoteTeacher.connect(urls, top_k=8, temperatures=(1.0,), retries=2)
            expected = teacher.targets(rows)
            next(one for one in teacher._client.endpoints if one.url == doomed).url = f"http://127.0.0.1:{free_port()}"
            for _ in range(6):
                assert torch.equal(teacher.targets(rows).logprobs, expected.logprobs)
            for future in [teacher.submit(rows) for _ in range(8)]:
                future.result()
            teacher.close()


def forget():
    for memory in (identity._FOUND, identity._ANSWERED, identity._REMEMBERED):
        memory.clear()


def test_names_of_teachers_hold_between_ranks_and_folders(recipe, packed, model):
    """Signatures differ a little every time; the name must not, wherever it is asked for."""

    class Noisy(Served):
        def logits(self, ids):
            return super().logits(ids) + 2e-3 * torch.randn(4096)

    def over(url, **changes):
        section = {**recipe.teacher.model_dump(exclude_unset=True), "endpoint": url}
        tree = {**recipe.model_dump(exclude_unset=True), **changes}
        return Recipe.model_validate({**tree, "teacher": section, "loss": {"temperature": 1.0}})

    with running(vllm_app(Noisy(model))) as url:
        names = []
        for _ in range(3):
            forget()
            names.append(remote_identity(over(url)))
        build_cache(over(url), recipe.cache_dir)
        forget()
        (recipe.root / "endpoints.json").unlink()  # results brought from elsewhere
        names.append(remote_identity(over(url)))
    assert all(name == names[0] for name in names)
    forget()
    assert remote_identity(over(url)) == names[0], "remembered when it is gone"


def test_most_canaries_of_a_right_server_pass_and_none_of_a_shifted_one(model):
    """The first row to change is the changed token's, whatever the tokens."""
    import asyncio

    from limbeck.teachers.protocols.base import WireSpec
    from limbeck.teachers.protocols.segments import CANARY
    from limbeck.teachers.protocols.vllm import VLLMProtocol

    served = Served(model)
    generator = torch.Generator().manual_seed(0)

    class Session:
        def __init__(self, by):
            self.by = by

        async def try_query(self, query):
            (ids,) = query.body["prompt"]
            rows = served.prompt_logprobs(ids, 4)
            rows = rows[self.by :] + rows[: self.by]
            held = [None, *({str(i): {"logprob": v, "rank": r} for i, v, r in row} for row in rows)]
            reply = {"choices": [{"index": 0, "prompt_logprobs": held}]}
            return query.parse(type("Reply", (), {"content": json.dumps(reply).encode()}))

    found = {0: [], 1: [], -1: []}
    for _ in range(25):
        protocol = VLLMProtocol()
        protocol.canary = torch.randint(1, 4000, (len(CANARY),), generator=generator).tolist()
        for by, results in found.items():
            results.append(asyncio.run(protocol.aligned(Session(by), WireSpec(4, (1.0,), vocab_size=4096))))
    assert False not in found[0]
    assert True not in found[1] + found[-1]


def spoiling(model, change):
    """A vLLM whose answers to more than the canary are changed."""
    app, served = FastAPI(), Served(model)

    @app.get("/v1/models")
    def models():
        return {"data": [{"id": "m"}]}

    @app.post("/v1/completions")
    async def completions(request: Request):
        body = await request.json()
        if "prompt_logprobs" not in body or body["prompt_logprobs"] > 20:
            return JSONResponse({"error": {"message": "no"}}, 400)
        choices = []
        for index, ids in enumerate(body["prompt"]):
            entries = served.prompt_logprobs(ids, body["prompt_logprobs"])
            held = [None, *({str(i): {"logprob": v, "rank": r} for i, v, r in row} for row in entries)]
            choices.append({"index": index, "prompt_logprobs": change(held) if len(ids) > 12 else held})
        return Response(json.dumps({"choices": choices}), media_type="application/json")

    return app


def first_value(value):
    def change(held):
        next(iter(held[3].values()))["logprob"] = value
        return held

    return change


def first_id(token):
    def change(held):
        key = next(iter(held[3]))
        held[3] = {token if k == key else k: v for k, v in held[3].items()}
        return held

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held[:4], "distributions for 3 positions of a sequence of 20 tokens; protocol vllm has 19"),
        (lambda held: [None, held[1], *held[1:]], "for 20 positions of a sequence of 20 tokens"),
        (lambda held: [held[1], *held[1:]], "a distribution of the first token"),
        (lambda held: [*held[:5], None, *held[6:]], "left out the log-probabilities"),
        (first_value(math.nan), "NaN"),
        (first_value(4.0), "sum to"),
        (first_value(-(10**400)), "cannot be read|has not the shape"),
        (first_id("-7"), "names id -7"),
        (first_id("4096"), "names id 4096, and the vocabulary has 4096 ids"),
        (first_id(str(1 << 40)), "cannot be read|has not the shape"),
        (first_id("x"), "has not the shape"),
        (lambda held: [None, *[{} for _ in held[1:]]], "left out the log-probabilities"),
    ],
)
def test_answers_that_no_model_gives_are_refused(model, rows, change, message):
    with running(spoiling(model, change)) as url:
        teacher = vllm(url)
        with pytest.raises(WrongAnswerError, match=message):
            teacher.targets(rows)
        teacher.close()


def test_filler_before_a_text_is_filler(model, teacher_folder, rows):
    """As a collator with left padding makes it: the same targets from every protocol as from a local teacher."""
    docs = torch.zeros_like(rows.doc_ids)
    docs[0, :7] = -1
    docs[1, -4:] = -1
    padded = PackedRows(rows.row_ids, rows.input_ids, docs)
    with running(limbeck_app(teacher_folder)) as ours, running(vllm_app(model)) as theirs:
        for attention in ("per_document", "packed"):
            own = LocalTeacher(model, top_k=8, temperatures=(1.0,), attention=attention).targets(padded)
            for url, protocol in ((ours, "limbeck"), (ours, "topk"), (theirs, "vllm")):
                teacher = RemoteTeacher.connect(
                    [url], protocol=protocol, top_k=8, temperatures=(1.0,), vocab_size=4096, attention=attention
                )
                found = teacher.targets(padded)
                teacher.close()
                labelled = padded.labels != -100
                assert torch.equal(found.token_ids[..., 0][labelled], own.token_ids[..., 0][labelled]), protocol


def test_logits_of_another_width_are_another_vocabulary(tmp_path, teacher_folder):
    from limbeck.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(teacher_folder))
    with running(user_app(tiny_model(vocab_size=1000))) as url:
        with pytest.raises(MismatchError, match="1000 ids and tokenizer .* has 4096"):
            RemoteTeacher.connect([url], tokenizer=tokenizer)
        with pytest.raises(ConfigError, match="teacher.vocab_size is 999 and the endpoint's logits have 1000"):
            RemoteTeacher.connect([url], vocab_size=999)


def test_a_half_made_cache_is_not_continued_with_another_vocabulary_or_teacher(recipe, packed, model, teacher_folder):
    def over(url, **teacher):
        section = {**recipe.teacher.model_dump(exclude_unset=True), "endpoint": url, **teacher}
        tree = recipe.model_dump(exclude_unset=True)
        return Recipe.model_validate({**tree, "teacher": section, "loss": {"temperature": 1.0}})

    other = peaked_model(9)
    with running(vllm_app(model)) as url, running(vllm_app(other)) as elsewhere, running(vllm_app(model)) as moved:
        build_cache(over(url), recipe.cache_dir)
        (recipe.cache_dir / "manifest.json").unlink()
        for wrong in (over(url, vocab_size=9000), over(elsewhere)):
            with pytest.raises(LimbeckError, match="vocab_size|signature"):
                build_cache(wrong, recipe.cache_dir)
        build_cache(over(moved), recipe.cache_dir)  # the same model on another port is the same teacher


@pytest.mark.parametrize("value", ["two\nlines", "with space", "käy", "\x7f"])
def test_values_that_are_no_key_are_refused_unseen(monkeypatch, value):
    monkeypatch.setenv("A_KEY", value)
    with pytest.raises(ConfigError, match="names A_KEY, whose value is no key") as caught:
        environment_key("A_KEY", "teacher.api_key_env")
    assert value not in str(caught.value)
    with pytest.raises(ConfigError, match="not set"):
        environment_key("NO_KEY", "teacher.api_key_env")


def test_a_proxy_that_cannot_be_used_is_named():
    environment = {**os.environ, "ALL_PROXY": "nonsense://x"}
    done = limbeck("teacher", "probe", "http://10.1.2.3:9", check=False, env=environment)
    assert done.returncode == 2
    assert "ALL_PROXY" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_large_wrong_body_is_refused_at_its_first_wrong_number(teacher_folder):
    import httpx2
    import psutil

    with running(limbeck_app(teacher_folder)) as url:
        body = b'{"top_k": 4, "input_ids": [[' + b"-1," * 900_000 + b"-1]]}"
        before = psutil.Process().memory_info().rss
        reply = httpx2.post(url + "/v1/targets", content=body, timeout=60, headers={"content-type": "application/json"})
        assert reply.status_code == 422
        assert len(reply.content) < 1000
        assert psutil.Process().memory_info().rss - before < 300e6


def test_a_question_it_cannot_understand_is_not_repeated(model, rows):
    switch = Switch(vllm_app(model))
    with running(switch) as url:
        teacher = vllm(url)
        seen = switch.seen
        switch.fail(400, 1)
        with pytest.raises(RefusedError, match="status 400: later"):
            teacher.targets(rows)
        assert switch.seen <= seen + 3
        teacher.close()
