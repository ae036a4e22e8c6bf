"""Teachers over HTTP: what overlap saves, how long a student waits, bytes and positions a second on the wire.

    python benchmarks/remote.py
    python benchmarks/remote.py --quick --json

Overlap: a student trains here, its teacher is our server in another process whose model is replaced by a pause (2 and
0.5 times the student's step, many at once) and stored targets; HTTP, coding, checks and the trainer are the real ones.
Wire: K 64 of V 151,936, imitated language-model rows (see cache.py): our answer with float16 log-probabilities and
zstd, beside the same targets in the shape of vLLM's JSON (read by our own vLLM protocol) and whole logits as JSON.

Limits. Of an overlapped step: the same student with its targets at hand (overlapped over that is 1 at best), so of the
speed-up 1 + pause / that step. Of the wire: the answer's bytes through a plain socket of this machine. CPU time is this
process's, without the server's.
"""

import base64
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from cache import V as LARGE_V
from cache import lm_like_targets
from common import Comparison, Repeats, Span, arguments, interleaved, medians, now, ratio, report, since
from limbeck import DistillationArguments, DistillationTrainer
from limbeck.data.dataset import PackedRows
from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.http import Reply
from limbeck.teachers.protocols.base import WireSpec
from limbeck.teachers.protocols.vllm import VLLMProtocol
from limbeck.teachers.remote import RemoteTeacher
from limbeck.teachers.server.topk import topk_answer

K, TAUS, LENGTH, ROWS, QUICK_ROWS, STUDENT_V = 64, (1.0, 2.0), 256, 4, 1, 8192
STUDENT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": LENGTH}  # fmt: skip
OTHERS = 256  # positions in the other servers' forms
STORED = 1024  # different positions: no request repeats one, which zstd would profit from
VLLM_BYTES = 4716  # a position at k = 64, as published with the task's measurements


# -- the server in the other process ------------------------------------------------------------------------


class PausingEngine:
    """Stands where the model would: answers stored targets after a pause, however many ask."""

    waiting_tokens = 0

    def __init__(self, stored: SparseTargets, pause: Path) -> None:
        self._stored, self._pause = stored, pause

    def submit(self, rows, request):
        count, length = rows.input_ids.shape
        places = (torch.arange(count * length) % len(self._stored.token_ids)).reshape(count, length)
        future: Future = Future()
        targets = self._stored[places]

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(targets)

        threading.Timer(float(self._pause.read_text()), answer).start()
        return future

    def close(self):
        """Nothing runs."""


def serve(port: int, vocab: int, pause: Path) -> None:
    import uvicorn

    from limbeck.config.recipe import TeacherServerConfig
    from limbeck.teachers.server import app as module
    from limbeck.teachers.server.load import Served

    torch.set_num_threads(1)
    if vocab == LARGE_V:
        stored = lm_like_targets(STORED)
    else:
        stored = SparseTargets.from_logits(3.0 * torch.randn(512, vocab), K, TAUS)
    teacher = type("Shape", (), {"vocab_size": vocab})()
    module.engines.Engine = lambda *_: PausingEngine(stored, pause)
    served = Served(teacher, "stored", "ab" * 32, "cd" * 32, ("per_document", "packed"), 1 << 16)
    app = module.create_app(served, TeacherServerConfig(max_tokens=1 << 16), None, max_batch_tokens=1 << 16)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


class Server:
    """`serve` in a process of its own; `pause` can be set at any time."""

    def __init__(self, vocab: int) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.url, self._port = f"http://127.0.0.1:{port}", port
        self._folder = tempfile.TemporaryDirectory()
        self._pause = Path(self._folder.name) / "pause"
        self.pause(0.0)
        command = [sys.executable, __file__, "--serve", str(port), str(vocab), str(self._pause)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def pause(self, seconds: float) -> None:
        self._pause.write_text(str(seconds))

    def wait(self) -> None:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
                return
            time.sleep(0.05)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


# -- overlap --------------------------------------------------------------------------------------------------


class Waits(DistillationTrainer):
    """Keeps the waiting of the log lines."""

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "teacher_wait_share" in logs:
            self.waits = [*getattr(self, "waits", []), logs["teacher_wait_share"]]


class AtHand:
    """A teacher whose targets are in memory: what no overlap can beat."""

    temperatures, vocab_size, in_workers = TAUS, STUDENT_V, False

    def __init__(self) -> None:
        self._stored = SparseTargets.from_logits(3.0 * torch.randn(512, STUDENT_V), K, TAUS)

    def targets(self, rows: PackedRows) -> SparseTargets:
        count, length = rows.input_ids.shape
        return self._stored[(torch.arange(count * length) % 512).reshape(count, length)]

    def template(self) -> SparseTargets:
        return SparseTargets.empty(TAUS, STUDENT_V)


def train(teacher, rows: int, steps: int) -> tuple[Span, float]:
    """Mean time of a step and share of waiting, the first steps (which fill the queue) left out."""
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=STUDENT_V, **STUDENT))
    data = [{"input_ids": torch.randint(0, STUDENT_V, (LENGTH,))} for _ in range(rows * (steps + 12))]
    moments: list[Span] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            moments.append(now())
            if state.global_step == steps:
                self.span = since(moments[skipped]) / (steps - 1 - skipped)

    clock, skipped = Clock(), 3
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=rows, learning_rate=1e-4, logging_steps=1,
            report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, dashboard="off",
        )  # fmt: skip
        trainer = Waits(model=student, args=args, teacher=teacher, train_dataset=data, callbacks=[clock])
        trainer.train()
    return clock.span, statistics.mean(trainer.waits[skipped + 1 :])


def overlap(server: Server, quick: bool) -> tuple[dict, dict[str, Comparison]]:
    rows, steps, repeats = (QUICK_ROWS, 8, 5) if quick else (ROWS, 24, 5)
    server.wait()

    def remote(ahead: int, pause: float) -> tuple[Span, float]:
        server.pause(pause)
        teacher = RemoteTeacher.connect([server.url], top_k=K, temperatures=TAUS, ahead=ahead)
        try:
            return train(teacher, rows, steps)
        finally:
            teacher.close()

    def fast() -> Span:
        span, share = remote(8, 0.5 * step)
        waits.append(share)
        return span

    at_hand, waits = AtHand(), []
    remote(8, 0.0)  # warm: threads, allocator
    step = statistics.median(train(at_hand, rows, steps)[0].wall for _ in range(3))
    found = interleaved(
        {
            "at_hand": lambda: train(at_hand, rows, steps)[0],
            "sequential": lambda: remote(0, 2.0 * step)[0],
            "parallel": lambda: remote(8, 2.0 * step)[0],
            "fast": fast,
        },
        repeats,
    )
    server.close()
    return {
        "overlap_repeats": repeats,
        "student_step_s": found["at_hand"].seconds,
        "teacher_pause_s": 2.0 * step,
        "sequential_step_s": found["sequential"].seconds,
        "parallel_step_s": found["parallel"].seconds,
        "teacher_pause_over_parallel_step": 2.0 * step / found["parallel"].seconds,  # 2, if the machine kept its pace
        "limit_overlap_speedup": 1.0 + 2.0 * step / found["at_hand"].seconds,
        "wait_share_fast_teacher": statistics.median(waits),
        "overlap_times": medians(found),
    }, {
        "overlap_speedup_slow_teacher": ratio(found["sequential"], found["parallel"]),
        "parallel_step_over_limit": ratio(found["parallel"], found["at_hand"]),
    }


# -- wire -------------------------------------------------------------------------------------------------------


def vllm_json(targets: SparseTargets) -> bytes:
    """One choice in the shape of vLLM's answer; texts as long as a large vocabulary's."""
    positions: list = [None]
    for ids, values in zip(targets.token_ids.tolist(), targets.logprobs.tolist(), strict=True):
        positions.append({
            str(i): {"logprob": v, "rank": r + 1, "decoded_token": f" t{i % 997}"}
            for r, (i, v) in enumerate(zip(ids, values, strict=True))
        })  # fmt: skip
    return json.dumps({"choices": [{"index": 0, "prompt_logprobs": positions}]}, separators=(",", ":")).encode()


def other_forms(targets: SparseTargets) -> dict[str, bytes]:
    """One sequence `[T]` as the other protocols answer it."""
    length, rows = len(targets.token_ids), zip(targets.token_ids.tolist(), targets.logprobs.tolist(), strict=True)
    lists = [[[value, token, None] for token, value in zip(ids, values, strict=True)] for ids, values in rows]
    batch = targets.with_tensors({name: tensor.unsqueeze(0) for name, tensor in targets.tensors().items()})
    return {
        **{f"topk_{kind}": topk_answer(batch, [length], 2.0, kind) for kind in ("int8", "float16", "float32")},
        "sglang": json.dumps(lists, separators=(",", ":")).encode(),
        "trl": base64.b64encode(bytes(8 * targets.token_ids.numel())),
    }


def through_socket(content: bytes) -> None:
    """The bytes from one end of a TCP connection of this machine to the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = socket.create_connection(listener.getsockname())
        writer, _ = listener.accept()
        sender = threading.Thread(target=writer.sendall, args=(content,))
        sender.start()
        left = len(content)
        while left:
            left -= len(reader.recv(min(left, 1 << 20)))
        sender.join()
        reader.close()
        writer.close()


def wire(server: Server, quick: bool) -> tuple[dict, dict[str, Comparison]]:
    import httpx2

    from limbeck.teachers.server.app import _logits_json

    repeats = 9 if quick else 15
    server.wait()
    rows = PackedRows(torch.arange(2), torch.randint(0, LARGE_V, (2, STORED // 2)), torch.zeros(2, STORED // 2).long())
    teacher = RemoteTeacher.connect([server.url], top_k=K, temperatures=TAUS, max_request_tokens=STORED)
    teacher.targets(rows)
    positions = rows.input_ids.numel()
    body = {"input_ids": rows.input_ids.tolist(), "top_k": K, "temperatures": list(TAUS)}
    sizes = {}
    for name, accepted in (("zstd", "zstd"), ("plain", "identity")):
        reply = httpx2.post(server.url + "/v1/targets", json=body, headers={"Accept-Encoding": accepted}, timeout=60)
        sizes[name] = int(reply.headers["content-length"]) / positions
    exact = lm_like_targets(OTHERS)  # not rounded to float16: other servers write all digits
    document = vllm_json(exact)
    others = {name: len(content) / OTHERS for name, content in other_forms(exact).items()}
    logits = sum(len(part) for part in _logits_json(torch.randn(1, 2, LARGE_V), [2])) / 2
    protocol, spec = VLLMProtocol(), WireSpec(K, (1.0,), vocab_size=LARGE_V)
    query = protocol.query([[*rows.input_ids[0, :OTHERS].tolist(), 0]], spec)
    answer = bytes(round(sizes["zstd"] * positions))
    found: dict[str, Repeats] = interleaved(
        {
            "ours": lambda: teacher.targets(rows),
            "reading_vllm_json": lambda: query.parse(Reply(200, {}, document)),
            "socket": lambda: through_socket(answer),
        },
        repeats,
    )
    teacher.close()
    server.close()
    return {
        "bytes_per_position": sizes["zstd"],
        "bytes_per_position_without_zstd": sizes["plain"],
        "bytes_per_position_vllm_json": len(document) / OTHERS,
        "bytes_per_position_json_logits": logits,
        **{f"bytes_per_position_{name}": size for name, size in others.items()},
        "bytes_ratio_vs_vllm_json": VLLM_BYTES / sizes["zstd"],
        "bytes_ratio_vs_own_vllm_json": len(document) / OTHERS / sizes["zstd"],
        "bytes_ratio_vs_json_logits": logits / sizes["zstd"],
        "positions_per_s": positions / found["ours"].seconds,
        "positions_per_s_reading_vllm_json": OTHERS / found["reading_vllm_json"].seconds,
        "limit_positions_per_s_socket": positions / found["socket"].seconds,
        "limit_positions_per_s_gigabit": 125e6 / sizes["zstd"],
        "wire_repeats": repeats,
        "wire_times": medians(found),
    }, {
        "positions_ratio_vs_reading_vllm_json": ratio(found["reading_vllm_json"], found["ours"], positions / OTHERS),
        "wire_time_over_limit": ratio(found["ours"], found["socket"]),
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--serve", nargs=3, help="(the other process)")
    options = parser.parse_args()
    if options.serve:
        port, vocab, pause = options.serve
        serve(int(port), int(vocab), Path(pause))
        return 0
    torch.set_num_threads(1)  # the other core is the server's
    with contextlib.redirect_stdout(sys.stderr):  # transformers prints; stdout is the result's
        large, small = Server(LARGE_V), Server(STUDENT_V)
        wired, wire_comparisons = wire(large, options.quick)
        overlapped, overlap_comparisons = overlap(small, options.quick)
    tokens = (QUICK_ROWS if options.quick else ROWS) * LENGTH
    return report(
        {"shape": {"vocab": LARGE_V, "top_k": K, "student_tokens_a_step": tokens}, **wired, **overlapped},
        options.json,
        wire_comparisons | overlap_comparisons,
        headline=["overlap_speedup_slow_teacher", "positions_ratio_vs_reading_vllm_json"],
    )


if __name__ == "__main__":
    sys.exit(main())
