"""Teachers over HTTP: the same loss as a local teacher's, whatever the endpoint speaks; every wrong answer refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request

from conftest import peaked_model, remote_identity, tiny_model, with_keys
from limbeck import LocalTeacher, TeacherCache
from limbeck.config import Recipe, SamplingConfig
from limbeck.data.dataset import PackedDataset, PackedRows
from limbeck.data.tokenizer import recipe_tokenizer
from limbeck.errors import ConfigError, CorruptError, LimbeckError, MismatchError
from limbeck.evaluation.fidelity import score_model
from limbeck.evaluation.suites import Fidelity, table
from limbeck.models import load_causal_lm
from limbeck.pipeline import run_pipeline
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.tail import estimate_log_z
from limbeck.targets.wire import decode_targets, encode_targets
from limbeck.teachers import identity
from limbeck.teachers.base import Teacher
from limbeck.teachers.check import check_targets
from limbeck.teachers.http import RefusedError, UnreachableError, WrongAnswerError
from limbeck.teachers.remote import RemoteTeacher
from limbeck.teachers.sources import RemoteSource
from limbeck.training.head import attach_objectives
from serving import bound, free_port, limbeck_app, running, sglang_app, trl_app, user_app, vllm_app
from test_teachers import loss_of

TAUS = (1.0, 2.0)
PRINT = "ab" * 32
ASKED = "cd" * 32


@pytest.fixture(scope="module")
def model(teacher_folder):
    return load_causal_lm(str(teacher_folder), dtype="float32").eval()


@pytest.fixture(scope="module")
def ours(teacher_folder):
    with running(limbeck_app(teacher_folder)) as url:
        yield url


@pytest.fixture(scope="module")
def rows():
    """Three rows: two documents and filler, one document, three documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4000, (3, 24), generator=generator)
    docs = torch.tensor([[0] * 9 + [1] * 10 + [-1] * 5, [2] * 24, [3] * 2 + [4] * 21 + [5]])
    return PackedRows(torch.arange(3), ids, docs)


def canonical(targets):
    """Sorted by id."""
    order = torch.where(targets.valid, targets.token_ids, 1 << 30).argsort(dim=-1)
    names = ("token_ids", "logprobs", "weights")
    held = {n: t.gather(-1, order) if n in names else t for n, t in targets.tensors().items()}
    return targets.with_tensors(held)


def local(model, top_k=16, attention="per_document", **more):
    return LocalTeacher(model, top_k=top_k, temperatures=TAUS, attention=attention, **more)


# -- the wire format ------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_the_wire_is_exact(model, rows, full):
    targets = local(model).targets(rows)
    held = decode_targets(encode_targets(targets, full=full, fingerprint=PRINT, request=ASKED))
    assert held.fingerprint == PRINT[:32]
    assert held.request == ASKED[:32]
    a, b = canonical(targets), canonical(held.targets)
    assert torch.equal(a.token_ids, b.token_ids)
    if full:
        assert all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in a.tensors())
    else:  # a float16 has eleven bits; the head is then moved by the mean rounding
        torch.testing.assert_close(b.logprobs, a.logprobs, rtol=2**-10, atol=2**-10)
    assert bool((held.targets.logprobs.diff(dim=-1) <= 0).all()), "the likeliest first"


@pytest.mark.parametrize("tail", [1e-6, 1e-4, 1e-2, 0.3])
def test_half_precision_keeps_small_tails(tail):
    """Sixteen float16 log-probabilities sum to 1 within 1e-3 at best; the tail travels as a number of its own."""
    head = torch.linspace(2.0, -1.0, 16, dtype=torch.float64).softmax(-1) * (1.0 - tail)
    p = torch.cat([head, torch.full((84,), tail / 84.0, dtype=torch.float64)])
    targets = SparseTargets.from_logits(p.log().reshape(1, 1, 100), 16, TAUS)
    held = decode_targets(encode_targets(targets, full=False, fingerprint=PRINT, request=ASKED)).targets
    for tau in TAUS:
        wanted = 1.0 - float((p ** (1.0 / tau) / (p ** (1.0 / tau)).sum())[:16].sum())
        # A float16 logit near 14 has steps of 2^-7.
        assert float(held.at_temperature(tau)[1].exp()) == pytest.approx(wanted, rel=1e-2, abs=2e-7)


def test_the_wire_carries_sampled_tails_and_varying_supports(model, rows):
    drawn = local(model, sampling=SamplingConfig(head=4, draws=9), sampling_temperature=2.0).targets(rows)
    held = decode_targets(encode_targets(drawn, full=True, fingerprint=PRINT, request=ASKED)).targets
    assert held.sampling_temperature == 2.0
    a, b = canonical(drawn), canonical(held)
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(torch.where(a.valid, a.weights, 0.0), torch.where(b.valid, b.weights, 0.0))
    few = SparseTargets.from_logits(torch.tensor([[[1.0, -math.inf, 0.5, -math.inf]]]), 3, TAUS)
    assert torch.equal(
        decode_targets(encode_targets(few, full=True, fingerprint=PRINT, request=ASKED)).targets.token_ids,
        few.token_ids,
    )


def test_damage_on_the_wire_is_noticed(model, rows):
    data = encode_targets(local(model).targets(rows), full=False, fingerprint=PRINT, request=ASKED)
    for place in range(0, len(data), 97):
        spoilt = bytearray(data)
        spoilt[place] ^= 0x10
        with pytest.raises(CorruptError):
            decode_targets(bytes(spoilt))
    for size in (0, 7, 60, len(data) - 1):
        with pytest.raises(CorruptError):
            decode_targets(data[:size])


def test_the_tail_estimate_is_exact_for_power_laws_and_close_for_models(model, rows):
    ranks = torch.arange(1, 5001).double()
    logits = (-1.3 * ranks.log()).float().unsqueeze(0)
    exact = SparseTargets.from_logits(logits, 64, TAUS)
    found = estimate_log_z(exact.logprobs, exact.valid, 5000, 2.0)
    assert float((found - exact.log_z[:, 1]).abs()) < 0.02  # an integral for a sum
    held = local(model, top_k=64).targets(rows).flatten()
    gap = (estimate_log_z(held.logprobs, held.valid, 4096, 2.0) - held.log_z[:, 1]).abs().mean()
    lump = torch.logaddexp((held.logprobs / 2).logsumexp(-1), held.at_temperature(1.0)[1] / 2) - held.log_z[:, 1]
    assert float(gap) < 0.25 * float(lump.abs().mean())
    everything = local(model, top_k=None).targets(rows).flatten()
    torch.testing.assert_close(
        estimate_log_z(everything.logprobs, everything.valid, 4096, 2.0), everything.log_z[:, 1], rtol=0, atol=2e-3
    )


# -- protocols over real HTTP ---------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["per_document", "packed"])
def test_limbeck_targets_are_the_local_ones_to_the_bit(model, ours, rows, attention):
    remote = RemoteTeacher.connect([ours], top_k=16, temperatures=TAUS, attention=attention, full=True)
    assert isinstance(remote, Teacher)
    assert remote.ahead == 8
    try:
        assert remote.info.protocol == "limbeck"
        a, b = canonical(local(model, attention=attention).targets(rows)), canonical(remote.targets(rows))
        assert all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in a.tensors())
        student = tiny_model(seed=1)
        attach_objectives(student)
        for tau in TAUS:
            assert loss_of(student, rows, a, tau) == loss_of(student, rows, b, tau)
    finally:
        remote.close()


def test_limbeck_gives_the_local_draws(model, ours, rows):
    sampling = SamplingConfig(head=4, draws=9, seed=3)
    remote = RemoteTeacher.connect([ours], temperatures=TAUS, sampling=sampling, sampling_temperature=2.0, full=True)
    own = local(model, sampling=sampling, sampling_temperature=2.0)
    a, b = canonical(own.targets(rows)), canonical(remote.targets(rows))
    remote.close()
    assert torch.equal(a.token_ids, b.token_ids)
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-6, atol=1e-7)


APPS = {"vllm": lambda m: vllm_app(m, max_logprobs=64), "sglang": sglang_app, "trl": trl_app, "user": user_app}
#: Protocol -> largest error of a loss at τ = 1 (its precision), and at τ = 2 (None: it must be refused).
PRECISION = {"limbeck": (1e-4, 1e-4), "topk": (2e-2, 2e-2), "user": (1e-5, 1e-5), "vllm": (1e-5, None),
             "sglang": (1e-5, None), "trl": (1e-5, None)}  # fmt: skip


@pytest.fixture(scope="module")
def urls(model, ours):
    import contextlib

    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(running(app(model))) for name, app in APPS.items()}
        yield {**found, "limbeck": ours, "topk": ours}


@pytest.mark.parametrize("name", PRECISION)
@pytest.mark.parametrize("tau", TAUS)
def test_every_protocol_gives_the_local_loss(model, urls, rows, name, tau):
    at_one, at_two = PRECISION[name]
    settings = {"top_k": 16, "temperatures": tuple(sorted({1.0, tau})), "vocab_size": 4096}
    protocol = name if name == "topk" else "auto"
    if tau != 1.0 and at_two is None:
        with pytest.raises(ConfigError, match="teacher.tail: approximate"):
            RemoteTeacher.connect([urls[name]], protocol=protocol, **settings)
        settings["approximate"] = True
    remote = RemoteTeacher.connect([urls[name]], protocol=protocol, **settings)
    try:
        assert remote.info.protocol == name
        student = tiny_model(seed=1)
        attach_objectives(student)
        theirs = loss_of(student, rows, remote.targets(rows), tau)
        ours = loss_of(student, rows, local(model).targets(rows), tau)
        precision = at_one if tau == 1.0 else at_two or 0.35  # an estimated tail
        assert theirs["kl_loss"] == pytest.approx(ours["kl_loss"], abs=precision)
        attach_objectives(model)  # itself: shifted by one, this would be several nats
        itself = loss_of(model, rows, remote.targets(rows), 1.0)
        assert abs(itself["kl_loss"]) < {"topk": 1e-3, "limbeck": 1e-5}.get(name, 1e-6)
    finally:
        remote.close()
        if hasattr(model.forward, "__closure__"):
            model.__dict__.pop("forward", None)


def test_cached_over_http_is_cached_locally(recipe, packed, ours, teacher_folder, tmp_path):
    from limbeck.teachers.build_cache import build_cache

    own = build_cache(recipe, tmp_path / "local")
    remote = with_keys(recipe, teacher={"endpoint": [ours, ours], "logprobs": "float32"})
    theirs = build_cache(remote, tmp_path / "remote")
    a, b = TeacherCache(tmp_path / "local"), TeacherCache(tmp_path / "remote")
    assert len(a) == len(b) > 20
    assert [s.rows for s in own.splits["train"].shards] == [s.rows for s in theirs.splits["train"].shards]
    one, two = a.read(range(20)), b.read(range(20))
    assert torch.equal(one.token_ids, two.token_ids)
    torch.testing.assert_close(one.logprobs, two.logprobs, rtol=1e-3, atol=1e-3)


class Counted:
    """An ASGI application that remembers which paths were asked for."""

    def __init__(self, app):
        self.app, self.asked = app, []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            self.asked.append(scope["path"])
        await self.app(scope, receive, send)


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_with_a_remote_teacher_finds_it_out_once_and_shows_its_kl(recipe, teacher_folder, model, cached):
    """Cache, training and the table: one discovery, and the column that a local teacher of the same ids bounds."""
    keys = {"endpoint": "", "use_cached_logits": cached, "logprobs": "float32"}
    limits = {"training": {"max_steps": 2, "learning_rate": 1e-3, "report_to": []}}
    app = Counted(limbeck_app(teacher_folder))
    with running(app) as url:
        remote = with_keys(recipe, teacher={**keys, "endpoint": url}, tokenizer={"name": str(teacher_folder)}, **limits)
        found = run_pipeline(remote).results["evaluation"]["student_kd"]
    assert app.asked.count("/v1/teacher") == 1
    assert list(run_pipeline(remote).results["evaluation"]) == [
        "student_kd"
    ]  # the server is gone, and it is found done
    student = load_causal_lm(str(recipe.student_dir / "final"), dtype="float32")
    rows = PackedDataset(recipe.packed_dir, "validation")
    teacher = LocalTeacher(model, top_k=16, vocab_size=4096)
    whole = score_model(student, rows, recipe_tokenizer(remote).byte_lengths(), teacher=teacher)
    assert 0.5 * whole.kl_to_teacher < found["kl_to_teacher_at_least"] < whole.kl_to_teacher
    assert found["top1_agreement"] == pytest.approx(whole.top1_agreement)
    head, _ = table({"student": found}, [Fidelity()])
    assert "KL to teacher ≥" in head
    assert "KL to teacher" not in head


def test_the_table_does_without_a_teacher_that_has_gone_and_gains_it_when_it_is_back(recipe, teacher_folder, caplog):
    """Nothing is waited for long, the run ends well, and the next one with the teacher makes the table again."""
    short = {
        "training": {"max_steps": 1, "learning_rate": 1e-3, "report_to": []},
        "tokenizer": {"name": str(teacher_folder)},
    }
    held = bound()
    with running(limbeck_app(teacher_folder), held) as url:
        remote = with_keys(recipe, teacher={"endpoint": url, "retries": 0, "timeout": 2.0}, **short)
        run_pipeline(remote, "train")
    caplog.set_level("INFO", "limbeck")
    gone = run_pipeline(remote).results["evaluation"]["student_kd"]
    assert gone["kl_to_teacher_at_least"] is None
    assert "is not there, and what compares with it is left out" in caplog.text
    assert [stage.state for stage in run_pipeline(remote).stages][-1] == "skipped"
    with running(limbeck_app(teacher_folder), held):
        back = run_pipeline(remote)
        assert back.results["evaluation"]["student_kd"]["kl_to_teacher_at_least"] > 0
    again = run_pipeline(remote)
    assert [stage.state for stage in again.stages][-1] == "skipped"
    assert again.results["evaluation"] == back.results["evaluation"]


def test_an_endpoint_that_cannot_give_what_is_wanted_is_not_remembered(recipe, packed, teacher_folder):
    with running(limbeck_app(teacher_folder, max_top_k=8)) as url:
        remote = with_keys(recipe, teacher={"endpoint": url})
        for _ in range(2):
            source = RemoteSource.of(remote)
            with pytest.raises(ConfigError, match="top_k is 16 and the endpoint gives at most 8"):
                source.check(recipe_tokenizer(remote))
            assert not source.memory.was_asked()


def test_an_endpoint_that_comes_back_as_another_model_is_refused(recipe, packed, model):
    """It was not there when its inputs were wanted, so it was taken for who it had been."""
    other = peaked_model(9)
    held = bound()
    with running(vllm_app(model), held) as url:
        remote = with_keys(recipe, teacher={"endpoint": url, "retries": 0, "timeout": 2.0}, loss={"temperature": 1.0})
        tokenizer = recipe_tokenizer(remote)
        RemoteSource.of(remote).check(tokenizer)
    identity._FOUND.clear(), identity._ANSWERED.clear()
    RemoteSource.of(remote).inputs(tokenizer)
    with running(vllm_app(other), held), pytest.raises(MismatchError, match="serves another model than when this run"):
        RemoteSource.of(remote).open(tokenizer)


def test_a_teacher_known_by_its_signature_is_found_out_once_too(recipe, packed, model):
    app = Counted(vllm_app(model))
    with running(app) as url:
        remote = with_keys(recipe, teacher={"endpoint": url}, loss={"temperature": 1.0})
        source, tokenizer = RemoteSource.of(remote), recipe_tokenizer(remote)
        source.check(tokenizer)
        asked = len(app.asked)
        source.inputs(tokenizer)
        assert len(app.asked) == asked
        teacher = RemoteSource.of(remote).open(tokenizer)
        assert len(app.asked) == asked
        teacher.targets(packed.rows([0]))
        teacher.close()
        assert len(app.asked) <= asked + 2  # the targets, and the signature on the new connection


def test_a_teacher_that_was_exchanged_since_it_was_found_out_is_refused(recipe, packed, model):
    other = peaked_model(9)
    held = bound()
    with running(vllm_app(model), held) as url:
        remote = with_keys(recipe, teacher={"endpoint": url}, loss={"temperature": 1.0})
        source, tokenizer = RemoteSource.of(remote), recipe_tokenizer(remote)
        source.check(tokenizer)
    with running(vllm_app(other), held):
        teacher = source.open(tokenizer)
        with pytest.raises(WrongAnswerError, match="changed while this run went on"):
            teacher.targets(packed.rows([0]))
        teacher.close()


# -- refusals ---------------------------------------------------------------------------------------------


def test_a_model_that_nothing_tells_from_another_is_refused(ours, recipe_tree, monkeypatch):
    """Neither a fingerprint nor a signature: an exchanged teacher would pass, and caches would be taken for others."""
    from limbeck.registry import PROTOCOLS
    from limbeck.teachers.protocols.limbeck import LimbeckProtocol

    class Nameless(LimbeckProtocol):
        name = "nameless"

        async def describe(self, session):
            return replace(await super().describe(session), protocol=self.name, fingerprint=None)

    monkeypatch.setitem(PROTOCOLS._parts, "nameless", Nameless)
    with pytest.raises(LimbeckError, match="tells no fingerprint and gives no signature"):
        RemoteTeacher.connect([ours], protocol="nameless", top_k=4)
    section = {**recipe_tree["teacher"], "endpoint": [ours], "protocol": "nameless"}
    with pytest.raises(LimbeckError, match="tells no fingerprint and gives no signature"):
        remote_identity(Recipe.model_validate({**recipe_tree, "teacher": section}))


def test_nobody_there_is_said_at_once():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UnreachableError, match=f"Failed to connect to teacher endpoint: {url}"):
        RemoteTeacher.connect([url], retries=50)


def test_a_k_beyond_the_servers_limit_names_both(model, rows):
    with (
        running(vllm_app(model)) as url,
        pytest.raises(ConfigError, match="top_k is 64 and the endpoint gives at most 20"),
    ):
        RemoteTeacher.connect([url], top_k=64, temperatures=(1.0,), vocab_size=4096)


def test_another_tokenizer_is_refused(ours, corpus, tmp_path):
    from limbeck.config import DatasetConfig
    from limbeck.data.tokenizer import train_tokenizer

    other = train_tokenizer(DatasetConfig(name=str(corpus)), 300, tmp_path / "other")
    with pytest.raises(LimbeckError, match="was made with tokenizer|same tokenizer"):
        RemoteTeacher.connect([ours], tokenizer=other)


def shifted_app(model, by):
    """A vLLM whose positions are off by some."""
    app, plain = FastAPI(), vllm_app(model)
    app.add_api_route("/v1/models", next(r.endpoint for r in plain.routes if r.path == "/v1/models"))

    @app.post("/v1/completions")
    async def completions(request: Request):
        inner = next(route.endpoint for route in plain.routes if route.path == "/v1/completions")
        reply = await inner(request)
        for choice in reply["choices"] if isinstance(reply, dict) else []:
            held = choice["prompt_logprobs"][1:]
            choice["prompt_logprobs"] = [None, *(held[by:] + held[:by])]
        return reply

    return app


@pytest.mark.parametrize("by", [1, -1])
def test_a_server_off_by_one_is_found_out(model, by):
    with running(shifted_app(model, by)) as url, pytest.raises(WrongAnswerError, match="misaligned"):
        RemoteTeacher.connect([url], top_k=4, temperatures=(1.0,), vocab_size=4096)


def spoilt(**changes):
    targets = SparseTargets.from_logits(torch.randn(1, 3, 50), 4, TAUS)
    tensors = {name: tensor.clone() for name, tensor in targets.tensors().items()}
    for name, (place, value) in changes.items():
        tensors[name][place] = value
    return targets.with_tensors(tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": ((0, 1, 2), math.nan)}, "row 0, position 1 gives the log-probability nan"),
        ({"logprobs": ((0, 2), 3.5)}, "sum to .* at temperature 1"),
        ({"token_ids": ((0, 0, 0), 51)}, "names id 51, and the vocabulary has 50 ids"),
        ({"token_ids": ((0, 1), 7)}, "names id 7 twice"),
        ({"log_z": ((0, 0, 1), math.inf)}, "gives the normaliser inf"),
        ({"log_z": ((0, 0, 1), -9.0)}, "sum to .* at temperature 2"),
    ],
)
def test_impossible_answers_are_refused(changes, message):
    with pytest.raises(WrongAnswerError, match=message):
        check_targets(spoilt(**changes), "the teacher")


@pytest.mark.parametrize(
    "sent", ['{"choices": []}', '{"choices": [{"index": 0, "prompt_logprobs": [1, 2]}]}', '{"x": 1}']
)
def test_answers_of_another_shape_are_refused(sent):
    from limbeck.teachers.http import Reply
    from limbeck.teachers.protocols.base import WireSpec
    from limbeck.teachers.protocols.vllm import VLLMProtocol

    query = VLLMProtocol().query([[1, 2, 3]], WireSpec(4, (1.0,), vocab_size=100))
    with pytest.raises(WrongAnswerError):
        query.parse(Reply(200, {}, sent.encode()))
    with pytest.raises(CorruptError):
        query.parse(Reply(200, {}, sent[:-3].encode()))


def test_positions_without_support_carry_no_divergence():
    """What no teacher spoke of: KL 0, no gradient of its own, CE as ever; and so through the codec."""
    from limbeck.losses.dense import dense_distillation_loss
    from limbeck.losses.fused import fused_distillation_loss
    from limbeck.targets.codec import CodecSpec, decode, encode

    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 6, 8, requires_grad=True), torch.randn(40, 8)
    labels = torch.randint(0, 40, (1, 6))
    targets = SparseTargets.from_logits(torch.randn(1, 6, 40), 5, TAUS)
    tensors = targets.tensors()
    tensors["token_ids"][0, 3:], tensors["logprobs"][0, 3:], tensors["log_z"][0, 3:] = -1, -math.inf, 0.0
    targets = targets.with_tensors(tensors)
    for tail in ("bucket", "renormalise", "ignore"):
        for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
            hidden.grad = None
            out = fused_distillation_loss(hidden, weight, labels, targets, alpha=1.0, tail=tail, divergence=divergence)
            out.loss.backward()
            assert torch.isfinite(out.loss)
            assert float(hidden.grad[0, 3:].abs().max()) < 1e-6
    out = fused_distillation_loss(hidden, weight, labels, targets, alpha=0.4)
    dense = dense_distillation_loss(hidden @ weight.T, labels, targets, alpha=0.4)
    torch.testing.assert_close(out.loss, dense, rtol=1e-5, atol=1e-5)
    flat = targets.flatten()
    held = decode(encode(flat, CodecSpec(5, 40, TAUS)), CodecSpec(5, 40, TAUS))
    assert not bool(held.valid[3:].any())
    assert bool(torch.isfinite(held.log_z).all())
    assert np.isneginf(held.logprobs[3:].numpy()).all()


def test_recipes_that_contradict_themselves_are_refused():
    from limbeck.config import Recipe

    for teacher, message in (
        ({"endpoint": "a:1"}, "is no URL"),
        ({"endpoint": "http://key@a:1"}, "must not hold a user or a key"),
        ({"endpoint": "http://a:1", "protocol": "vllm", "sampling": {}}, "needs protocol limbeck"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.model_validate({"teacher": teacher})
    recipe = Recipe.model_validate({"teacher": {"endpoint": "http://a:1/, http://b:2"}})
    assert recipe.teacher.remote.endpoint == ["http://a:1", "http://b:2"]
    assert recipe.teacher.is_remote
    assert not recipe.teacher.reads_cache


def test_a_refusal_shows_the_servers_words_but_not_the_key(teacher_folder, rows):
    with running(limbeck_app(teacher_folder, key="s3cret-key")) as url:
        with pytest.raises(RefusedError, match="wants another key .*asked without a key"):
            RemoteTeacher.connect([url])
        with pytest.raises(RefusedError) as caught:
            RemoteTeacher.connect([url], api_key="s3cret-wrong")
        assert "s3cret" not in str(caught.value)
        remote = RemoteTeacher.connect([url], api_key="s3cret-key", max_request_tokens=100_000)
        far = PackedRows(torch.arange(1), torch.full((1, 4), 4095), torch.zeros(1, 4, dtype=torch.long))
        assert remote.targets(far).token_ids.shape == (1, 4, 64)
        remote.close()
