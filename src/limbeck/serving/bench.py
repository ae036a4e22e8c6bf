"""How fast a GGUF file runs here, at each number of threads, and how much of the machine that uses.

The one idea: decoding reads every weight once a token, so its limit is the memory's bandwidth; reading a prompt
multiplies every weight with many tokens, so its limit is the arithmetic. Both limits are measured in the same process
with our own products, on weights that lie in memory and in cache.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config.engine import BenchConfig, EngineConfig
from limbeck.errors import ConfigError
from limbeck.kernels import native
from limbeck.serving.model import GgufModel

_MEMORY_BYTES = 512 << 20
_CACHED_ROWS = 2048


def time_file(path: Path, bench: BenchConfig, settings: EngineConfig) -> dict[str, Any]:
    """Rates by number of threads, and the machine's limits.

    Raises:
        ConfigError: prompt and text do not fit into the model's context.
    """
    most = settings.threads or len(os.sched_getaffinity(0))
    counts = sorted({1, *(2**power for power in range(1, 12) if 2**power < most), most})
    found: dict[str, Any] = {"model": str(path), "threads": {}}
    for threads in counts:
        started = time.perf_counter()
        model = GgufModel(path, settings.model_copy(update={"threads": threads}))
        loaded = time.perf_counter() - started
        engine = model.engine
        if engine.context and bench.prefill + bench.decode > engine.context:
            raise ConfigError(
                f"bench.prefill {bench.prefill} and bench.decode {bench.decode} are more than the model's context of "
                f"{engine.context}."
            )
        found |= {"architecture": engine.architecture, "parameters": engine.parameters}
        found["bytes_a_token"] = engine.weight_bytes_a_token
        found["level"] = _kernels().level()
        found["threads"][str(threads)] = {"load_seconds": round(loaded, 3), **_rates(model, bench, threads)}
    return found


def _kernels() -> Any:
    return native()


def _rates(model: GgufModel, bench: BenchConfig, threads: int) -> dict[str, Any]:
    """Tokens a second of one engine, as medians, and their share of what the machine can do."""
    rng = np.random.default_rng(0)
    prompt = [int(number) for number in rng.integers(0, model.engine.vocabulary, bench.prefill)]

    def prefill() -> float:
        line = model.line()
        return _seconds(lambda: line.extend(prompt))

    def decode() -> float:
        line = model.line()
        line.extend(prompt[:1])
        return _seconds(lambda: [line.extend([number % model.engine.vocabulary]) for number in range(bench.decode)])

    prefill()  # memory is touched for the first time
    read = bench.prefill / statistics.median(prefill() for _ in range(bench.repeats))
    write = bench.decode / statistics.median(decode() for _ in range(bench.repeats))
    moved, bandwidth, arithmetic = model.engine.weight_bytes_a_token * write, _bandwidth(threads), _arithmetic(threads)
    return {
        "prefill_tokens_per_second": round(read, 1),
        "decode_tokens_per_second": round(write, 1),
        "gigabytes_per_second": round(moved / 1e9, 2),
        "share_of_bandwidth": round(moved / bandwidth, 3),
        "share_of_arithmetic": round(2.0 * _prompt_weights(model) * read / arithmetic, 3),
        "machine": {"gigabytes_per_second": round(bandwidth / 1e9, 1), "gops": round(arithmetic / 1e9, 1)},
    }


def _prompt_weights(model: GgufModel) -> int:
    """Weights that a token of a prompt is multiplied with: all but the head, which reads the last one alone."""
    return int(model.engine.weights_a_token - model.engine.vocabulary * model.engine.width)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _bandwidth(threads: int) -> float:
    """Bytes a second that come from memory: 8-bit products of one token, which hardly compute."""
    kernels = _kernels()
    pool = kernels.Pool(threads, True)
    row_bytes = 4096 // 32 * 34
    blocks = np.zeros((max(1, _MEMORY_BYTES // (4096 * row_bytes)), 4096, row_bytes), np.uint8)
    weights = kernels.Weights("q8_0", blocks, pool)
    del blocks
    x = np.ones((1, 4096), np.float32)
    return float(max(weights.bytes / weights.time(x, weights.shape[0], pool) for _ in range(5)))


def _arithmetic(threads: int) -> float:
    """Operations a second of ternary products with many tokens, from cache."""
    kernels = _kernels()
    pool = kernels.Pool(threads, True)
    blocks = np.zeros((1, _CACHED_ROWS, _CACHED_ROWS // 256 * 66), np.uint8)
    weights = kernels.Weights("tq2_0", blocks, pool)
    x = np.ones((64, _CACHED_ROWS), np.float32)
    return float(max(2.0 * _CACHED_ROWS**2 * 64 * 10 / weights.time(x, 10, pool) for _ in range(5)))


def text(found: dict[str, Any]) -> str:
    """The result as a table."""
    head = (
        f"{found['model']}: {found['architecture']}, {found['parameters'] / 1e6:,.1f} M parameters, "
        f"{found['bytes_a_token'] / 1e6:,.1f} MB of weights a token, {found['level']}"
    )
    columns = {
        "prefill tok/s": ("prefill_tokens_per_second", ",.1f"),
        "decode tok/s": ("decode_tokens_per_second", ",.1f"),
        "GB/s": ("gigabytes_per_second", ".1f"),
        "of bandwidth": ("share_of_bandwidth", ".0%"),
        "of arithmetic": ("share_of_arithmetic", ".0%"),
    }
    lines = [head, "threads  " + "  ".join(columns)]
    for threads, rates in found["threads"].items():
        cells = [format(rates[key], form).rjust(len(title)) for title, (key, form) in columns.items()]
        lines.append("  ".join([threads.rjust(7), *cells]))
    return "\n".join(lines)
