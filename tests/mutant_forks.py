"""The forks in which `mutants.py` runs tests: each in its own folder, on a copy of the source of its own.

The one idea: torch and transformers take seconds to import and no mutant changes them, so one parent does it
and every run is a fork of it. Limbeck and the tests are imported by the fork alone.
"""

import compileall
import contextlib
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from pathlib import Path

MEMORY = 16 << 30  # address space of a fork, and the largest file it may write


def import_the_heavy() -> None:
    """What limbeck and its tests import from elsewhere, before any fork; limbeck itself stays out."""
    import importlib
    import importlib.metadata

    names = (
        "numpy torch pytest hypothesis pyarrow.parquet h5py datasets accelerate safetensors.torch tokenizers gguf "
        "psutil pydantic yaml rich.progress httpx2 filelock huggingface_hub fastapi uvicorn prometheus_client peft "
        "torch._dynamo torch.utils.tensorboard torch.optim torch.func lion_pytorch llama_cpp "
        "transformers.trainer transformers.models.llama.modeling_llama transformers.models.qwen3_moe.modeling_qwen3_moe"
    )
    for name in names.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        with contextlib.suppress(ImportError):
            plugin.load() if "xdist" not in plugin.value else None
    import hypothesis
    import torch
    import transformers

    torch.set_num_threads(1)
    for kind in ("llama", "qwen3_moe"):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = transformers.AutoConfig.for_model(kind, vocab_size=8, num_key_value_heads=1, **sizes)
        transformers.AutoModelForCausalLM.from_config(config)
    checks = list(hypothesis.HealthCheck)
    hypothesis.settings.register_profile(
        "mutants", deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )
    hypothesis.settings.load_profile("mutants")
    gc.freeze()  # collections in the forks pass over all this


class Forks:
    """Runs jobs in forks, one per worker at a time.

    The queue has functions that return a job, or None. A job is (before, work, seconds allowed, done):
    `before(overlay)` changes the worker's copy of the source and returns what undoes that, `work(overlay, folder)`
    runs in the fork, `done(status, folder, seconds)` after it; the status of one that ran out of time is None.
    """

    def __init__(self, workers: int, root: Path, source: Path) -> None:
        self.root, self.number, self.running = root, 0, {}
        self.clean = root / "clean"  # the source as it was at the start, whatever is edited meanwhile
        shutil.copytree(source, self.clean / "limbeck", ignore=shutil.ignore_patterns("assets", "__pycache__"))
        (self.clean / "limbeck" / "assets").symlink_to(source / "assets")
        self.free = [root / f"worker{index}" for index in range(workers)]
        for folder in self.free:
            shutil.copytree(self.clean, folder, symlinks=True)
            compileall.compile_dir(folder / "limbeck", quiet=1)

    def run(self, queue: deque, until: float = float("inf")) -> None:
        """Start what is in the queue, and what is added meanwhile, while there is time; wait for all of it."""
        while self.running or (queue and time.monotonic() < until):
            while queue and self.free and time.monotonic() < until:
                job = queue.popleft()()
                if job:
                    self.start(*job)
            time.sleep(0.01)
            for pid in list(self.running):
                self.poll(pid)

    def close(self) -> None:
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def start(self, before, work, allowed: float, done) -> None:
        self.number += 1
        overlay, folder = self.free.pop(), self.root / f"job{self.number}"
        folder.mkdir()
        undo = before(overlay)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self.child(work, overlay, folder)
        self.running[pid] = (overlay, folder, undo, time.monotonic(), allowed, done)

    def child(self, work, overlay: Path, folder: Path) -> None:
        status = 70
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(folder)
            for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):  # an error must not take the machine along
                resource.setrlimit(limit, (MEMORY, MEMORY))
            os.environ.update(PYTHONPATH=str(overlay), TMPDIR=str(folder))
            tempfile.tempdir = str(folder)
            sys.path.insert(0, str(overlay))
            status = work(overlay, folder)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self, pid: int) -> None:
        overlay, folder, undo, began, allowed, done = self.running[pid]
        over = time.monotonic() - began > allowed
        if over:
            os.killpg(pid, signal.SIGKILL)
        ended, raw = os.waitpid(pid, 0 if over else os.WNOHANG)
        if not ended:
            return
        del self.running[pid]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # servers that the tests left behind
        undo()
        self.free.append(overlay)
        status = None if over else os.waitstatus_to_exitcode(raw)
        done(status, folder, time.monotonic() - began)
        shutil.rmtree(folder, ignore_errors=True)
