"""`limbeck teacher serve`'s HTTP side: bounds, key, metrics, fuzzing, load; float8 and adapters."""

import asyncio
import json
import random
import re
import time

import httpx2
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from conftest import save_model, tiny_model
from limbeck import LocalTeacher
from limbeck.config import Recipe
from limbeck.data.dataset import PackedRows
from limbeck.errors import LimbeckError
from limbeck.models import load_causal_lm
from limbeck.targets.spec import TargetSpec
from limbeck.targets.wire import decode_targets
from limbeck.teachers.server.engine import BusyError, Engine, Request
from limbeck.teachers.server.load import hold_as_float8, load_served
from serving import limbeck_app, running

LIMITS = {"max_sequences": 6, "max_tokens": 200, "max_top_k": 50, "max_body_mb": 0.02, "max_reply_mb": 3.0}


@pytest.fixture(scope="module")
def url(teacher_folder):
    with running(limbeck_app(teacher_folder, **LIMITS)) as found:
        yield found


def post(url, path, body, **options):
    return httpx2.post(url + path, json=body, timeout=30, **options)


def asked(**changes):
    return {"input_ids": [[5, 6, 7, 8]], "top_k": 4, "temperatures": [1.0], **changes}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/targets", asked(input_ids=[[1]] * 7), "7 sequences; this server takes 6"),
        ("/v1/targets", asked(input_ids=[[1] * 150, [1]]), "300 tokens .* takes 200"),
        ("/v1/targets", asked(input_ids=[[4096]]), "token id 4096; the vocabulary has 4096 ids"),
        ("/v1/targets", asked(input_ids=[[-1]]), "greater than or equal to 0"),
        ("/v1/targets", asked(input_ids=[[1.5]]), "valid integer"),
        ("/v1/targets", asked(input_ids=[[True]]), "valid integer"),
        ("/v1/targets", asked(input_ids=[[]]), "at least 1 item"),
        ("/v1/targets", asked(input_ids=[]), "at least 1 item"),
        ("/v1/targets", asked(top_k=51), "top_k . sampled_tail is 51; this server gives 1 to 50"),
        ("/v1/targets", asked(top_k=0), "is 0; this server gives 1 to 50"),
        ("/v1/targets", asked(temperatures=[2.0]), "include 1"),
        ("/v1/targets", asked(temperatures=[1.0, 0.0]), "greater than or equal to 0.01"),
        ("/v1/targets", asked(temperatures=[1.0] * 9), "at most 8"),
        ("/v1/targets", asked(documents=[[3]]), "lengths that sum to its own"),
        ("/v1/targets", asked(row_ids=[1, 2]), "2 row_ids for 1 sequences"),
        ("/v1/targets", asked(sampled_tail=3, sampling_temperature=3.0), "3.0 is not among the temperatures"),
        ("/v1/targets", asked(k=3), "Extra inputs"),
        ("/v1/topk", {"input_ids": [[1, 2]], "topk": 51}, "topk is 51; this server gives at most 50"),
        ("/v1/topk", {"input_ids": [[1, 2]], "return_dtype": "int4"}, "int8"),
        ("/v1/completions", {"input_ids": [[1, 2]], "return_logits": False}, "True"),
        ("/v1/completions", {"input_ids": [[1] * 100], "return_logits": True}, "this server gives 52 positions"),
    ],
)
def test_bounds_are_said_in_one_line(url, path, body, message):
    reply = post(url, path, body)
    assert reply.status_code == 422
    found = reply.json()["error"]["message"]
    assert re.search(message, found), found
    assert "Traceback" not in reply.text


def test_broken_and_large_bodies(url):
    assert (
        httpx2.post(url + "/v1/targets", content=b'{"input', headers={"content-type": "application/json"}).status_code
        == 400
    )
    large = post(url, "/v1/targets", asked(input_ids=[[1] * 20000]))
    assert large.status_code == 413
    assert "20000 bytes" in large.json()["error"]["message"]

    def endless():
        for _ in range(100):
            yield b"[" * 1000

    assert httpx2.post(url + "/v1/targets", content=endless()).status_code == 413
    assert httpx2.get(url + "/nowhere").status_code == 404
    assert httpx2.get(url + "/v1/targets").status_code == 405
    assert httpx2.get(url + "/health").json()["status"] == "ok"


def test_the_key_is_wanted_everywhere_but_for_health(teacher_folder):
    with running(limbeck_app(teacher_folder, key="a-key")) as url:
        for path in ("/v1/teacher", "/metrics", "/openapi.json", "/nowhere"):
            reply = httpx2.get(url + path)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert httpx2.get(url + path, headers={"Authorization": "Bearer another"}).status_code == 401
        assert httpx2.get(url + "/v1/teacher", headers={"Authorization": "Bearer a-key"}).status_code == 200
        assert httpx2.get(url + "/health").status_code == 200


def test_what_it_tells_of_itself_is_true(url, teacher_folder):
    told = httpx2.get(url + "/v1/teacher").json()
    assert told["vocab_size"] == 4096
    assert told["limits"]["top_k"] == 50
    assert told["attention"] == ["per_document", "packed"]
    assert str(teacher_folder) not in json.dumps(told), "no path of the machine"
    before = httpx2.get(url + "/metrics").text
    post(url, "/v1/targets", asked())
    after = httpx2.get(url + "/metrics").text

    def tokens(text):
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith("limbeck_tokens_total")))

    assert tokens(after) - tokens(before) == 4.0
    assert 'limbeck_requests_total{path="/v1/targets",status="200"}' in after


def test_shorter_sequences_are_filled_up_without_support(url, teacher_folder):
    reply = post(url, "/v1/targets", asked(input_ids=[[5, 6, 7], [5]], logprobs="float32"))
    targets = decode_targets(reply.content).targets
    assert targets.token_ids.shape == (2, 3, 4)
    assert not bool(targets.valid[1, 1:].any())
    torch.testing.assert_close(targets.logprobs[0, 0], targets.logprobs[1, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_topk_answers_normalise_by_either_of_its_remainders(url, teacher_folder, dtype, tau):
    ids = [5, 6, 7, 8, 9]
    body = {"input_ids": [ids], "topk": 20, "return_dtype": dtype, "temperature": tau}
    reply = post(url, "/v1/topk", body).json()
    model = load_causal_lm(str(teacher_folder), dtype="float32").eval()
    with torch.no_grad():
        expected, top = (model(torch.tensor([ids])).logits[0] / tau).log_softmax(-1).topk(20)
    assert torch.equal(torch.tensor(reply["indices"][0]), top)
    values = torch.tensor(reply["values_int8"][0]) * torch.tensor(reply["scale"][0])[:, None] if dtype == "int8" else (
        torch.tensor(reply["values"][0]))  # fmt: skip
    step = (
        torch.tensor(reply["scale"][0]).max() if dtype == "int8" else torch.tensor(5e-3 if dtype == "float16" else 1e-5)
    )
    by_logit = values - torch.logaddexp(values.logsumexp(-1), torch.tensor(reply["other_logit"][0]))[:, None]
    by_mass = values - values.logsumexp(-1)[:, None] + torch.log1p(-torch.tensor(reply["other_mass"][0]))[:, None]
    for found in (by_logit, by_mass):
        assert float((found - expected).abs().max()) < float(step)
    assert (reply["batch_size"], reply["num_positions"], reply["k"]) == (1, 5, 20)


def test_zstd_is_used_when_asked_for_and_shrinks(url):
    body = asked(input_ids=[list(range(100, 150))], top_k=50)
    plain = httpx2.post(url + "/v1/targets", json=body, headers={"Accept-Encoding": "identity"})
    packed = httpx2.post(url + "/v1/targets", json=body, headers={"Accept-Encoding": "zstd"})
    assert packed.headers["content-encoding"] == "zstd"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content
    assert int(packed.headers["content-length"]) < len(plain.content)


def test_jobs_are_run_together_up_to_the_budget_and_alone_when_they_ask():
    passes, model = [], tiny_model()
    teacher = LocalTeacher(model, top_k=4)
    rows = PackedRows(torch.arange(2), torch.randint(0, 4096, (2, 8)), torch.zeros(2, 8, dtype=torch.long))
    short = PackedRows(torch.arange(1), rows.input_ids[:1, :5], rows.doc_ids[:1, :5])
    engine = Engine(teacher, max_batch_tokens=64, max_queue_tokens=200, observe=lambda *seen: passes.append(seen[:2]))
    plain = Request(top_k=4, temperatures=(1.0, 2.0))
    with engine._wake:  # nothing starts until all are there
        waiting = [engine.submit(part, plain) for part in (rows, short, rows, rows, rows)]
        alone = engine.submit(rows, Request(top_k=4, temperatures=(1.0, 2.0), alone=True))
    together = [future.result(timeout=30) for future in waiting]
    engine.submit(rows, plain).result(timeout=30)
    assert passes[0] == (4, 53)  # 7 rows of up to 8
    assert sorted(passes[1:]) == [(1, 16), (1, 16), (1, 16)]
    expected = teacher.targets(rows)
    for found in (together[0], together[3], alone.result()):
        assert torch.equal(found.token_ids, expected.token_ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    assert torch.equal(alone.result().logprobs, expected.logprobs)
    assert together[1].token_ids.shape == (1, 5, 4)
    with engine._wake:
        held = [engine.submit(rows, plain) for _ in range(12)]
        with pytest.raises(BusyError) as full:
            engine.submit(rows, plain)
    assert full.value.retry_after >= 1
    held[3].cancel()
    engine.close()
    assert held[4].result().token_ids.shape == (2, 8, 4)
    with pytest.raises(BusyError):
        engine.submit(rows, plain)


def test_a_failing_model_is_an_error_without_a_trace(teacher_folder, monkeypatch):
    app = limbeck_app(teacher_folder)
    monkeypatch.setattr(LocalTeacher, "targets", lambda *_: 1 / 0)
    with running(app) as url:
        reply = post(url, "/v1/targets", asked())
        assert reply.status_code == 500
        assert "ZeroDivision" not in reply.text
        monkeypatch.undo()
        assert post(url, "/v1/targets", asked()).status_code == 200


# -- fuzzing and load ---------------------------------------------------------------------------------------


def test_schemathesis_finds_no_server_error(url):
    from schemathesis import checks, openapi

    schema = openapi.from_url(url + "/openapi.json")
    seen = {"requests": 0, "answered": 0}

    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(
            max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
        )
        @given(case=strategy)
        def one(case):
            reply = case.call(timeout=20)
            seen["requests"] += 1
            seen["answered"] += reply.status_code == 200
            assert reply.status_code < 500 or reply.status_code == 503, (case.path, reply.text)
            case.validate_response(reply, checks=[checks.not_a_server_error])

        one()
    assert seen["requests"] > 150
    assert seen["answered"] > 5


async def hammer(url, clients, seconds):
    """Statuses of many clients' requests of all kinds, and what was wrong with any."""
    statuses, wrong = {}, []
    deadline = time.monotonic() + seconds

    async def client(number):
        chance = random.Random(number)
        async with httpx2.AsyncClient(timeout=60) as http:
            while time.monotonic() < deadline:
                ids = [
                    [chance.randrange(4096) for _ in range(chance.randint(1, 48))] for _ in range(chance.randint(1, 4))
                ]
                path, body = chance.choice([
                    ("/v1/targets", asked(input_ids=ids, top_k=16, temperatures=[1.0, 2.0])),
                    ("/v1/targets", asked(input_ids=ids, reproducible=True, logprobs="float32")),
                    ("/v1/topk", {"input_ids": ids, "topk": 32}),
                    ("/v1/completions", {"input_ids": [ids[0][:8]], "return_logits": True}),
                ])  # fmt: skip
                reply = await http.post(url + path, json=body)
                statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
                if reply.status_code in (429, 503):
                    if "retry-after" not in reply.headers:
                        wrong.append("no Retry-After")
                    await asyncio.sleep(0.1)
                elif reply.status_code != 200:
                    wrong.append(reply.text)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return statuses, wrong


def load_test(teacher_folder, seconds):
    """64 clients against a server with a short queue; its memory before and after."""
    with running(limbeck_app(teacher_folder, max_queue_tokens=2000)) as url:
        asyncio.run(hammer(url, 64, seconds / 4))  # warm: allocator, caches
        before = psutil.Process().memory_info().rss
        statuses, wrong = asyncio.run(hammer(url, 64, seconds))
        grown = psutil.Process().memory_info().rss - before
    assert not wrong, wrong[:3]
    assert set(statuses) <= {200, 429, 503}
    assert statuses[200] > 64
    assert grown < 400e6
    print(f"{seconds:g} s: {statuses}, resident memory {before / 1e6:.0f} MB, then {grown / 1e6:+.0f} MB")
    return statuses


def test_sixty_four_clients_get_answers_or_are_told_to_wait(teacher_folder):
    load_test(teacher_folder, 6.0)


@pytest.mark.slow
def test_sixty_four_clients_for_a_minute(teacher_folder):
    assert load_test(teacher_folder, 60.0).get(503, 0) > 0


# -- what is served -----------------------------------------------------------------------------------------


def test_float8_weights_are_close_and_small():
    exact, held = (tiny_model(hidden_size=64, intermediate_size=256, num_hidden_layers=2) for _ in range(2))
    before = sum(p.numel() * p.element_size() for p in held.model.layers.parameters())
    hold_as_float8(held)
    after = sum(p.numel() * p.element_size() for p in held.model.layers.parameters())
    assert after < 0.3 * before
    assert held.lm_head.weight.dtype == torch.float32
    rows = PackedRows(torch.arange(1), torch.randint(0, 4096, (1, 20)), torch.zeros(1, 20, dtype=torch.long))
    a, b = (LocalTeacher(m, top_k=None).targets(rows).to_dense() for m in (exact, held))
    assert 0.0 < float((a - b).abs().sum(-1).max()) < 0.1


def test_float8_reaches_fused_experts():
    moe = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    }
    exact, held = tiny_model(**moe), tiny_model(**moe)
    hold_as_float8(held)
    kept = {name.split(".parametrizations")[0] for name, p in held.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert any("experts" in name for name in kept)
    rows = PackedRows(torch.arange(1), torch.randint(0, 4096, (1, 20)), torch.zeros(1, 20, dtype=torch.long))
    a, b = (LocalTeacher(m, top_k=None).targets(rows).to_dense() for m in (exact, held))
    assert 0.0 < float((a - b).abs().sum(-1).max()) < 0.2


def test_an_adapter_may_hold_embeddings_and_nothing_foreign(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from limbeck.teachers.server.load import merge_adapter

    tuned = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        tuned.get_input_embeddings().weight += 1.0
    tuned.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    merged = merge_adapter(tiny_model(), tmp_path / "a")
    assert torch.equal(merged.get_input_embeddings().weight, tuned.get_input_embeddings().weight)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "lora_A" in name)
    for changed in ({**tensors, "x.lora_A.weight": torch.zeros(1)}, {k: v for k, v in tensors.items() if k != gone}):
        save_file(changed, path)
        with pytest.raises(LimbeckError, match="does not fit"):
            merge_adapter(tiny_model(), tmp_path / "a")


def test_an_adapter_is_merged_and_changes_the_fingerprint(teacher_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = load_causal_lm(str(teacher_folder), dtype="float32")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")

    def served(**server):
        tree = {"teacher": {"model": str(teacher_folder), "dtype": "float32"}, "teacher_server": server}
        recipe = Recipe.model_validate(tree)
        return load_served(recipe.teacher, recipe.teacher_server)

    plain, merged = served(), served(adapter=str(tmp_path / "adapter"))
    assert plain.fingerprint != merged.fingerprint != served(quantization="fp8").fingerprint
    rows = PackedRows(torch.arange(1), torch.arange(20).unsqueeze(0), torch.zeros(1, 20, dtype=torch.long))
    expected = LocalTeacher(tuned.merge_and_unload(), top_k=8).targets(rows)
    found = merged.teacher.with_spec(TargetSpec(8)).targets(rows)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    assert float((found.logprobs - plain.teacher.with_spec(TargetSpec(8)).targets(rows).logprobs).abs().max()) > 0.01
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(LimbeckError, match=r"adapter_model.safetensors is missing"):
        served(adapter=str(tmp_path / "adapter"))


def test_models_that_mix_documents_offer_packed_rows_alone(tmp_path):
    linear = tiny_model(
        model_type="qwen3_next", num_hidden_layers=1, layer_types=["linear_attention"], head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    folder = save_model(linear, tmp_path / "linear")
    with running(limbeck_app(folder)) as url:
        assert httpx2.get(url + "/v1/teacher").json()["attention"] == ["packed"]
        assert post(url, "/v1/targets", asked(documents=[[4]])).status_code == 422
        assert post(url, "/v1/targets", asked()).status_code == 200
        from limbeck.teachers.http import RefusedError
        from limbeck.teachers.remote import RemoteTeacher

        with pytest.raises(RefusedError, match="per_document and the teacher linear can do packed alone"):
            RemoteTeacher.connect([url], attention="per_document")
