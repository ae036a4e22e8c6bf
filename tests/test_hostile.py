"""Callers and servers who mean harm: idle connections, stalled readers, forged logs, bombs, wrong answers."""

import contextlib
import gzip
import http.client
import json
import logging
import resource
import socket
import subprocess
import sys
import time

import httpx2
import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import Response

from conftest import limbeck, tiny_model
from limbeck.config import Recipe, SamplingConfig
from limbeck.config.recipe import TeacherServerConfig
from limbeck.console import printable
from limbeck.data.dataset import PackedRows
from limbeck.models import load_causal_lm
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.wire import decode_targets, encode_targets, request_hash
from limbeck.teachers.bodies import BodyReader, DamagedError, TooLargeError, zstd
from limbeck.teachers.check import check_targets
from limbeck.teachers.http import LostError, RefusedError, TeacherClient, WrongAnswerError
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.remote import RemoteTeacher
from limbeck.teachers.server.gate import HELD_HEADER, Gate
from limbeck.teachers.server.run import uvicorn_settings
from serving import limbeck_app, running, serving

TAUS = (1.0, 2.0)


def guarded(app, config=None, **clocks):
    """Serve an app as `limbeck teacher serve` does; gives host and port."""
    return serving(uvicorn_settings(app, (config or TeacherServerConfig()).max_connections, **clocks))


async def echo(scope, receive, send):
    """An application that answers with as many bytes as the path says."""
    if scope["type"] != "http":
        return
    size = int(scope["path"].strip("/") or 0) if scope["path"].strip("/").isdigit() else 0
    headers = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(size)})


def closed(connection, seconds):
    """True when the other side closes the connection within so many seconds."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_a_head_that_does_not_come_or_comes_by_drops_is_cut_off():
    with guarded(echo, head_seconds=0.5) as address:
        silent, slow = socket.create_connection(address), socket.create_connection(address)
        started = time.monotonic()
        while time.monotonic() - started < 1.5:
            with contextlib.suppress(OSError):
                slow.send(b"G")
            time.sleep(0.1)
        assert closed(silent, 1.0)
        assert closed(slow, 1.0)
        patient = http.client.HTTPConnection(*address)
        for _ in range(3):  # a connection that asks again is no idle one
            patient.request("GET", "/5")
            kept = patient.sock
            assert patient.getresponse().read() == bytes(5)
            assert patient.sock is kept
            time.sleep(0.3)


def test_connections_beyond_the_bound_are_closed_and_health_answers():
    with guarded(echo, TeacherServerConfig(max_connections=20)) as address:
        held = [socket.create_connection(address) for _ in range(60)]
        time.sleep(0.3)
        shut = sum(closed(connection, 0.05) for connection in held)
        assert shut >= 40
        for _ in range(3):
            assert httpx2.get(f"http://{address[0]}:{address[1]}/health").status_code == 200


BESIEGED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from limbeck.cli import main
sys.exit(main(["teacher", "serve", sys.argv[1], "--port", "0"]))
"""


def test_few_files_are_enough_to_stay_healthy(teacher_folder, tmp_path):
    """With 256 open files allowed, 300 idle connections block nothing and fill no log."""
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, "-c", BESIEGED, str(teacher_folder)], stderr=out, stdout=out)
    try:
        deadline = time.monotonic() + 90
        while "serving" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        port = int(log.read_text().split(":")[-1].split()[0])
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for _ in range(20):
            assert httpx2.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
        while sum(closed(connection, 0.01) for connection in held) < 100:
            assert time.monotonic() < deadline
        assert log.stat().st_size < 20_000
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_a_reader_that_stalls_is_dropped_and_holds_little():
    gate = Gate(echo, api_key=None, max_body=1000)
    with guarded(gate, stall_seconds=0.5) as address:
        slow = socket.create_connection(address)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.send(b"GET /30000000 HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.3)
        assert gate._sending == 30_000_000
        deadline = time.monotonic() + 10
        while gate._sending and time.monotonic() < deadline:
            time.sleep(0.1)
        assert gate._sending == 0
        whole = httpx2.get(f"http://{address[0]}:{address[1]}/3000000", timeout=30)
        assert len(whole.content) == 3_000_000  # one that reads gets everything


def test_replies_on_their_way_are_bounded_together():
    gate = Gate(echo, api_key=None, max_body=1000, max_replies=5_000_000)
    with guarded(gate) as address:
        slow = socket.create_connection(address)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.send(b"GET /4900000 HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.3)
        refused = httpx2.get(f"http://{address[0]}:{address[1]}/200000")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert httpx2.get(f"http://{address[0]}:{address[1]}/50000").status_code == 200
        slow.close()


def test_what_a_streamed_answer_holds_is_counted_and_not_told(teacher_folder):
    app = limbeck_app(teacher_folder)
    sizes = []
    original = app._app

    async def spy(scope, receive, send):
        async def watch(message):
            if message["type"] == "http.response.start" and scope["path"] == "/v1/completions":
                sizes.append(dict(message["headers"]).get(HELD_HEADER.encode()))
            await send(message)

        await original(scope, receive, watch)

    app._app = spy
    with running(app) as url:
        reply = httpx2.post(url + "/v1/completions", json={"input_ids": [[5, 6, 7]], "return_logits": True}, timeout=30)
    assert len(reply.json()["logits"][0]) == 3
    assert int(sizes[0]) == 3 * 4096 * 4
    assert HELD_HEADER not in reply.headers


def test_two_lengths_of_one_body_close_the_connection():
    gate = Gate(echo, api_key=None, max_body=1000)
    with guarded(gate) as address:
        connection = socket.create_connection(address)
        head = b"POST /5 HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.send(head + b"0\r\n\r\nGET /7 HTTP/1.1\r\nhost: x\r\n\r\n")
        connection.settimeout(5)
        got = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(4096):
                got += part
        assert got.startswith(b"HTTP/1.1 400")
        assert got.count(b"HTTP/1.1") == 1


def test_a_log_line_is_one_line(caplog, monkeypatch):
    gate = Gate(echo, api_key="key", max_body=1000)
    monkeypatch.setattr(logging.getLogger("limbeck"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="limbeck"), guarded(gate) as address:
        path = "/a%0Aroot%20logged%20in%1b[31m" + "x" * 5000
        assert httpx2.get(f"http://{address[0]}:{address[1]}{path}").status_code == 401
    said = {record.getMessage() for record in caplog.records}  # twice where the logger had stopped handing on before
    lines = [line for line in said if "status 401" in line]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert "\x1b" not in lines[0]
    assert r"/a\nroot logged in\x1b[31m" in lines[0]
    assert len(lines[0]) < 300


def test_what_is_shown_of_others_words_is_plain():
    assert printable("a\r\nb\x1b[2J\x00\u202e\ud800é東") == "a\\r\\nb\\x1b[2J\\x00\\u202e\\ud800é東"
    assert printable("x" * 50, 10) == "x" * 10 + "…"


# -- the client -------------------------------------------------------------------------------------------


def bomb(encoding):
    data = bytes(64 << 20)
    return gzip.compress(data) if encoding == "gzip" else zstd.compress(data)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_bomb_is_refused_before_it_has_gone_off(encoding):
    reader = BodyReader(encoding, 1000)
    with pytest.raises(TooLargeError):
        reader.feed(bomb(encoding))
    assert len(reader.content) <= 1001


@pytest.mark.parametrize("encoding", ["gzip", "zstd", ""])
def test_bodies_come_back_whole_and_cut_ones_do_not(encoding):
    data = b"abcdefgh" * 10_000
    coded = {"gzip": gzip.compress, "zstd": zstd.compress, "": bytes}[encoding](data)
    reader = BodyReader(encoding, len(data))
    for start in range(0, len(coded), 7):
        reader.feed(coded[start : start + 7])
    assert reader.finish() == data
    if encoding:
        cut = BodyReader(encoding, len(data))
        cut.feed(coded[:-4])
        with pytest.raises(DamagedError, match="cut short"):
            cut.finish()
        with pytest.raises(DamagedError, match="does not decompress"):
            BodyReader(encoding, 100).feed(b"no such thing at all")
    with pytest.raises(DamagedError, match="'br'"):
        BodyReader("br", 10)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_a_body_of_several_parts_is_their_sum(encoding, step):
    """RFC 1952 and RFC 8878: members and frames follow each other."""
    compress = {"gzip": gzip.compress, "zstd": zstd.compress}[encoding]
    coded = compress(b"one ") + compress(b"") + compress(b"two")
    reader = BodyReader(encoding, 100)
    for start in range(0, len(coded), step):
        reader.feed(coded[start : start + step])
    assert reader.finish() == b"one two"
    endless = BodyReader(encoding, 1000)
    with pytest.raises(TooLargeError):
        endless.feed(compress(b"") * 10_000)


def test_a_bomb_from_a_server_ends_the_question_in_little_memory():
    app = FastAPI()

    @app.get("/bomb")
    def answer():
        return Response(bomb("zstd"), headers={"content-encoding": "zstd"})

    with running(app) as url:
        client = TeacherClient([url])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with pytest.raises(WrongAnswerError, match="more than 1,000 bytes"):
                client.run(client._once(client.endpoints[0], "GET", "/bomb", None, 1000))
        finally:
            client.close()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # of 65,536 kB


def test_a_servers_words_reach_the_terminal_as_text():
    app = FastAPI()

    @app.post("/v1/targets")
    def targets():
        return Response("\x1b]0;owned\x07 please\nrun rm", 418)

    with running(app) as url:
        client = TeacherClient([url])
        reply = client.run(client.ask(client.endpoints[0], "/v1/targets", {}))
        words = client.words(reply)
        client.close()
    assert words == r"\x1b]0;owned\x07 please run rm"


def test_redirects_are_not_followed(teacher_folder):
    """A redirect would carry the key and the text to wherever it points."""
    asked = []
    elsewhere, app = FastAPI(), FastAPI()

    @elsewhere.api_route("/{path:path}", methods=["GET", "POST"])
    def reached(path: str):
        asked.append(path)
        return {}

    with running(elsewhere) as other:

        @app.api_route("/{path:path}", methods=["GET", "POST"])
        def away(path: str):
            return Response(status_code=307, headers={"location": f"{other}/{path}"})

        with running(app) as url, pytest.raises(RefusedError):
            RemoteTeacher.connect([url], top_k=4, temperatures=(1.0,), vocab_size=4096)
    assert asked == []


# -- answers of our own protocol --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(1, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    return PackedRows(torch.arange(2), ids, torch.zeros_like(ids))


def altering(app, change):
    """The server with its binary answers taken apart, changed and put together again."""

    async def changed(scope, receive, send):
        body = bytearray()
        sent = b""

        async def listen():
            nonlocal sent
            message = await receive()
            sent += message.get("body", b"")
            return message

        async def watch(message):
            if scope["path"] != "/v1/targets":
                await send(message)
            elif message["type"] == "http.response.start":
                watch.start = message
            else:
                body.extend(message["body"])
                if not message.get("more_body"):
                    found = decode_targets(zstd.decompress(bytes(body)))
                    print_ = found.fingerprint
                    targets, request = change(found.targets, found.request)
                    data = encode_targets(targets, full=True, fingerprint=print_, request=request)
                    headers = [(b"content-type", b"application/x-limbeck-targets")]
                    await send({**watch.start, "headers": [*headers, (b"content-length", str(len(data)).encode())]})
                    await send({"type": "http.response.body", "body": data})

        await app(scope, listen, watch)

    return changed


def with_columns(targets, count):
    cut = {n: t if n == "log_z" else t[..., :count] for n, t in targets.tensors().items()}
    return targets.with_tensors(cut)


def wider(targets):
    return SparseTargets(targets.token_ids, targets.logprobs, targets.log_z, targets.temperatures, 5000)


def normalised_otherwise(targets):
    return targets.with_tensors({**targets.tensors(), "log_z": targets.log_z + 0.5})


def weighted(targets):
    tensors = (targets.token_ids, targets.logprobs, targets.log_z)
    return SparseTargets(*tensors, targets.temperatures, targets.vocab_size, targets.logprobs.exp(), 2.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, r: (with_columns(t, 5), r), WrongAnswerError, "ids a position: 8, and answered with 5"),
        (lambda t, r: (wider(t), r), WrongAnswerError, "ids of the vocabulary: 4096, and answered with 5000"),
        (lambda t, r: (normalised_otherwise(t), r), WrongAnswerError, "gives the normaliser 0.5000 at temperature 1"),
        (lambda t, r: (weighted(t), r), WrongAnswerError, "temperature of the draws: None, and answered with 2.0"),
        (lambda t, r: (t[:1], r), WrongAnswerError, "positions"),
        (lambda t, r: (t, "00" * 16), LostError, "answers another request"),
    ],
)
def test_answers_to_another_question_are_not_learnt_from(teacher_folder, rows, monkeypatch, change, error, message):
    monkeypatch.setattr("limbeck.teachers.http._FIRST_PAUSE", 0.01)
    with running(altering(limbeck_app(teacher_folder), change)) as url:
        teacher = RemoteTeacher.connect([url], top_k=8, temperatures=TAUS, retries=2)
        try:
            with pytest.raises(error, match=message):
                teacher.targets(rows)
        finally:
            teacher.close()


def test_an_honest_answer_names_its_request(teacher_folder):
    body = json.dumps({"input_ids": [[5, 6, 7]], "top_k": 4, "temperatures": [1.0]}).encode()
    with running(limbeck_app(teacher_folder)) as url:
        headers = {"content-type": "application/json"}
        reply = httpx2.post(url + "/v1/targets", content=body, headers=headers, timeout=30)
    assert decode_targets(reply.content).request == request_hash(body)[:32]


@pytest.mark.parametrize("tau", [0.5, 2.0, 4.0])
def test_normalisers_lie_between_a_lump_and_an_even_tail(tau):
    """Those of real distributions pass, whatever their tail; sums e^6 times as large or small do not."""
    torch.manual_seed(0)
    for spread in (0.1, 1.0, 8.0):
        targets = SparseTargets.from_logits(torch.randn(1, 50, 400) * spread, 6, (1.0, tau))
        check_targets(targets, "a model")
        # Below temperature 1 one id may hold the whole tail, so that only too small a sum is impossible.
        for off in (6.0, -6.0) if tau > 1.0 else (-6.0,):
            log_z = targets.log_z.clone()
            log_z[0, 7, 1] += off
            with pytest.raises(WrongAnswerError, match="row 0, position 7 gives"):
                check_targets(targets.with_tensors({**targets.tensors(), "log_z": log_z}), "a model")


def test_draws_of_a_row_without_a_number_are_those_of_its_tokens():
    """Filler at its end and the numbers of its documents change nothing."""
    teacher = LocalTeacher(tiny_model(), sampling=SamplingConfig(head=4, draws=9), temperatures=(1.0,))
    ids = torch.arange(5, 17).unsqueeze(0)
    docs = torch.tensor([[0] * 6 + [1] * 6])
    plain = teacher.targets(PackedRows(torch.tensor([-1]), ids, docs))
    for other, owners in (
        (ids, docs + 5),
        (torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(docs, (0, 3), value=-1)),
    ):
        found = teacher.targets(PackedRows(torch.tensor([-1]), other, owners))
        assert torch.equal(found.token_ids[:, :12], plain.token_ids)


def test_rows_without_a_number_are_drawn_by_their_content(teacher_folder, rows):
    model = load_causal_lm(str(teacher_folder), dtype="float32").eval()
    sampling = SamplingConfig(head=2, draws=12, seed=3)
    teacher = LocalTeacher(model, temperatures=(1.0,), sampling=sampling, sampling_temperature=1.0)
    nameless = PackedRows(torch.full((2,), -1), rows.input_ids, rows.doc_ids)
    twice = PackedRows(torch.full((2,), -1), rows.input_ids[:1].repeat(2, 1), rows.doc_ids[:1].repeat(2, 1))
    same, found = teacher.targets(twice), teacher.targets(nameless)
    assert torch.equal(same.token_ids[0], same.token_ids[1])
    assert torch.equal(found.token_ids[0], same.token_ids[0])
    swapped = PackedRows(nameless.row_ids, nameless.input_ids.flip(0), nameless.doc_ids)
    assert torch.equal(teacher.targets(swapped).token_ids[1], found.token_ids[0])
    # Equal distributions at different rows would share their draws, had they one seed.
    model.get_input_embeddings().weight.data.zero_()
    flat = teacher.targets(nameless)
    assert not torch.equal(flat.token_ids[0], flat.token_ids[1])


def test_the_commands_bounds_are_keys():
    done = limbeck("teacher", "serve", "--help-all")
    assert "--teacher_server.max_connections" in done.stdout
    recipe = Recipe.model_validate({"teacher_server": {"max_connections": 7}})
    assert recipe.teacher_server.max_connections == 7
