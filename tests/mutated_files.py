"""Loads mutated GGUF files, one after another: each is one clear error or a model that runs.

    python tests/mutated_files.py FILE.gguf... --count 2000 --seed 0

A mutant is a good file that was cut off, or in which some bytes, numbers of the header or whole stretches are others.
The process ends by a signal where one crashes it or takes more than ten seconds, and with status 1 where memory grows
by more than twice the file.
"""

import argparse
import signal
import sys
from pathlib import Path

import numpy as np

from limbeck.errors import LimbeckError
from limbeck.kernels import native
from limbeck.serving.tokenizer import GgufTokenizer

SPARE = 12 << 20  # of memory: huge pages, the allocator's own, a step's work, the tokenizer


def mutant(good: bytes, header: int, rng: np.random.Generator) -> bytes:
    """A changed copy; most changes are in the header, where lengths, types and offsets stand."""
    kind = rng.integers(0, 6)
    if kind == 0:
        return good[: int(rng.integers(0, len(good)))]
    data = bytearray(good)
    reach = header if rng.random() < 0.8 else len(data)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(0, reach - 8))
        if kind == 1:
            data[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2:
            data[place] = int(rng.integers(0, 256))
        elif kind == 3:
            extremes = (0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
            data[place : place + 8] = int(rng.choice(np.array(extremes, np.uint64))).to_bytes(8, "little")
        elif kind == 4:
            data[place : place + 4] = int(rng.integers(0, 300)).to_bytes(4, "little")
        else:
            size = int(rng.integers(1, 64))
            other = int(rng.integers(0, reach - 8))
            data[place : place + size] = data[other : other + size]
    return bytes(data)


def memory(peak: bool) -> int:
    """Resident bytes of this process, now or at most since the last reset."""
    wanted = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(wanted):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Run; prints how many mutants loaded and the kinds of errors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--any-memory", action="store_true", help="for sanitizers, which take some of their own")
    given = parser.parse_args()
    kernels = native()
    rng = np.random.default_rng(given.seed)
    good = {path: path.read_bytes() for path in given.files}
    headers = {
        path: len(data) - sum(size for *_, size in kernels.GgufFile(str(path)).tensors()) for path, data in good.items()
    }
    loaded, errors = 0, 0
    for number in range(given.count):
        path = given.files[number % len(given.files)]
        changed = path.with_suffix(".mutant")
        changed.write_bytes(mutant(good[path], min(headers[path], len(good[path])), rng))
        signal.alarm(10)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory(peak=False)
        try:
            engine = kernels.Engine(str(changed), 1)
            GgufTokenizer(engine.metadata(), "the mutant")
            line = engine.create()
            engine.forward([(line, [0, 1, 2], True)])
            loaded += 1
        except (kernels.FileError, LimbeckError) as error:
            errors += bool(str(error).strip())
        engine = None
        grown = memory(peak=True) - before
        if grown > 2 * len(good[path]) + SPARE and not given.any_memory:
            sys.stderr.write(f"mutant {number} of {path} took {grown} bytes, the file has {len(good[path])}\n")
            return 1
    if loaded + errors != given.count:
        sys.stderr.write(f"{given.count - loaded - errors} errors had no words\n")
        return 1
    print(f"{given.count} mutants: {loaded} loaded, {errors} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
