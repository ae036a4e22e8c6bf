"""Our ternary products beside llama.cpp's TQ2_0, in one run: one token from cache and from DRAM, and many tokens.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --quick --json

GOPS are 2 operations a weight and token. llama.cpp's side is ggml's own library (of llama-cpp-python, extra `verify`)
called by ctypes: one graph of products with equal shapes. "Cache" is one matrix again and again, "DRAM" 600 MB of
them in turn. Both sides quantise their activations once a product on their side of the call; ours takes them per token.
The AVX2 case is this benchmark's own process a second time with LIMBECK_KERNELS=avx2. `--quick` is one thread.
"""

import ctypes
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from common import Span, arguments, interleaved, ratio, report
from limbeck.kernels import native

SHAPES = {"4096x4096": (4096, 4096), "2048x2048": (2048, 2048), "11008x4096": (11008, 4096)}
TQ2_0, F32 = 35, 0
DRAM_BYTES = 600_000_000
MANY = 64  # tokens of a product of many


class Ours:
    """Seconds of products with `copies` matrices in turn."""

    def __init__(self, rows: int, columns: int, copies: int, tokens: int, threads: int) -> None:
        kernels = native()
        self.pool = kernels.Pool(threads, True)
        rng = np.random.default_rng(0)
        codes = rng.integers(-1, 2, (rows, columns)).astype(np.int16)
        scales = np.full((rows, columns // 256), 0.01, np.float16).view(np.uint16)
        blocks = kernels.pack_blocks("tq2_0", codes, scales)
        self.weights = kernels.Weights("tq2_0", np.broadcast_to(blocks, (copies, *blocks.shape)).copy(), self.pool)
        self.x = rng.normal(0.0, 1.0, (tokens, columns)).astype(np.float32)

    def seconds(self, repeats: int) -> float:
        return self.weights.time(self.x, repeats, self.pool)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The same by ggml: a graph of products, one after another."""

    def __init__(self, rows: int, columns: int, copies: int, tokens: int, threads: int, products: int) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        for name, result, types in (
            ("ggml_init", pointer, [_InitParams]),
            ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, whole, whole]),
            ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            ("ggml_new_graph", pointer, [pointer]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_get_data", pointer, [pointer]),
            ("ggml_nbytes", ctypes.c_size_t, [pointer]),
        ):
            function = getattr(base, name)
            function.restype, function.argtypes = result, types
        self.cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
        self.cpu.ggml_cpu_init()
        size = rows * columns // 256 * 66
        memory = (size + 1024) * copies + products * (rows * tokens * 4 + 1024) + columns * tokens * 8 + (64 << 20)
        self.context = base.ggml_init(_InitParams(memory, None, False))
        self.threads, self.products = threads, products
        blocks = native().pack_blocks(
            "tq2_0",
            np.random.default_rng(0).integers(-1, 2, (rows, columns)).astype(np.int16),
            np.full((rows, columns // 256), 0.01, np.float16).view(np.uint16),
        )
        x = base.ggml_new_tensor_2d(self.context, F32, columns, tokens)
        values = np.random.default_rng(0).normal(0.0, 1.0, (tokens, columns)).astype(np.float32)
        ctypes.memmove(base.ggml_get_data(x), values.ctypes.data, values.nbytes)
        weights = []
        for _ in range(copies):
            tensor = base.ggml_new_tensor_2d(self.context, TQ2_0, columns, rows)
            assert base.ggml_nbytes(tensor) == blocks.nbytes
            ctypes.memmove(base.ggml_get_data(tensor), blocks.ctypes.data, blocks.nbytes)
            weights.append(tensor)
        self.graph = base.ggml_new_graph(self.context)
        for number in range(products):
            product = base.ggml_mul_mat(self.context, weights[number % copies], x)
            base.ggml_build_forward_expand(self.graph, product)

    def run(self) -> None:
        self.cpu.ggml_graph_compute_with_ctx(self.context, self.graph, self.threads)


def child(words: list[str]) -> None:
    """Answers each line of stdin with the seconds of one timing."""
    rows, columns, copies, tokens, threads, repeats = map(int, words)
    case = Ours(rows, columns, copies, tokens, threads)
    for _ in sys.stdin:
        print(case.seconds(repeats), flush=True)


class OursAvx2:
    """Our products in a process that is told to use AVX2."""

    def __init__(self, *sizes: int) -> None:
        words = [sys.executable, __file__, "--child", *map(str, sizes)]
        env = {**os.environ, "LIMBECK_KERNELS": "avx2"}
        self.process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, _: int) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _seconds(case, products: int) -> Span:
    seconds = case.seconds(products)
    return Span(seconds, seconds)  # what is timed keeps its threads busy throughout


def measure(name: str, threads: int, repeats: int, found: dict, comparisons: dict) -> None:
    """One shape: from cache, from DRAM, many tokens."""
    rows, columns = SHAPES[name]
    size = rows * columns // 256 * 66
    for place, copies, tokens, products in (
        ("cache", 1, 1, 100), ("dram", max(1, DRAM_BYTES // size), 1, 100), ("gemm", 1, MANY, 4),
    ):  # fmt: skip
        products = max(products, copies) if place == "dram" else products
        ours, theirs = (
            Ours(rows, columns, copies, tokens, threads),
            Ggml(rows, columns, copies, tokens, threads, products),
        )
        cases = {"ours": partial(_seconds, ours, products), "tq2_0": theirs.run}
        avx2 = OursAvx2(rows, columns, copies, tokens, threads, products) if place == "cache" else None
        if avx2:
            cases["ours_avx2"] = partial(_seconds, avx2, products)
        for case in cases.values():
            case()
        runs = interleaved(cases, repeats)
        work = 2e-9 * rows * columns * tokens * products
        key = f"{name}, {place}, {threads} thread{'s' if threads > 1 else ''}"
        found[key] = {case: round(work / run.seconds, 1) for case, run in runs.items()}
        comparisons[f"{key}: ours / tq2_0"] = ratio(runs["tq2_0"], runs["ours"])
        if avx2:
            comparisons[f"{key}: ours with AVX2 / tq2_0"] = ratio(runs["tq2_0"], runs["ours_avx2"])
            avx2.close()


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return 0
    given = arguments(__doc__.splitlines()[0]).parse_args()
    found: dict = {}
    comparisons: dict = {}
    repeats = 9 if given.quick else 15
    names = ["4096x4096"] if given.quick else list(SHAPES)
    for threads in (1,) if given.quick else (1, 2):
        for name in names:
            measure(name, threads, repeats, found, comparisons)
    key = "4096x4096, {}, 1 thread: ours{} / tq2_0"
    named = {
        "gemv_cache_ratio_vs_tq2_0": comparisons[key.format("cache", "")],
        "gemv_dram_ratio_vs_tq2_0": comparisons[key.format("dram", "")],
        "gemv_avx2_ratio_vs_tq2_0": comparisons[key.format("cache", " with AVX2")],
        "gemm_ratio_vs_tq2_0": comparisons[key.format("gemm", "")],
    }
    result = {"gops": found, "gops_cache_1t": found["4096x4096, cache, 1 thread"]["ours"], "level": native().level()}
    if not given.quick:
        named.update(comparisons)
    return report(result, given.json, named, list(named)[:4])


if __name__ == "__main__":
    sys.exit(main())
