"""Our engine beside llama.cpp on the same ternary models: prefill, decoding, memory, start, eight sequences at once.

    python benchmarks/engine.py
    python benchmarks/engine.py --quick --json

Models are Llama-shaped with random ternary weights: 1B (width 2048, 16 layers) and 125M (768, 12), vocabulary 32,000,
head Q8_0. Ours reads the TQ2_0 file; llama.cpp reads it, and the same codes as Q4_0; its best of both counts, each for
itself. Every timing is a process of its own, engines taking turns: 128 single tokens from an empty context, then 512 of
prefill in another sequence and 64 single tokens behind them. "Loaded" is the peak of resident memory that a model and
its first token add. `--quick` is the 125M model with one thread. Files are kept in outputs/engine-benchmark.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Repeats, arguments, ratio, report

SHAPES = {"125M": (768, 2560, 12, 12), "1B": (2048, 6912, 16, 16)}  # width, inside, layers, heads
VOCABULARY, PREFILL, DECODED, BEHIND = 32000, 512, 128, 64
FOLDER = Path("outputs/engine-benchmark")


@dataclass(frozen=True)
class LlamaShape:
    """A Llama: its widths and counts, the longest text, the vocabulary."""

    width: int
    inside: int
    layers: int
    heads: int
    context: int = 4096
    vocabulary: int = VOCABULARY


def model_file(name: str, kind: str) -> Path:
    """A GGUF file of a shape and type; the codes of one shape are the same in every type."""
    path = FOLDER / f"{name}-{kind}.gguf"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_llama(path.with_suffix(".partial"), LlamaShape(*SHAPES[name]), kind)
        path.with_suffix(".partial").rename(path)
    return path


def write_llama(path: Path, shape: LlamaShape, kind: str) -> None:
    """A Llama of random ternary weights as GGUF."""
    import gguf

    from limbeck.kernels import reference

    width, inside = shape.width, shape.inside
    rng, types = np.random.default_rng(0), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inside)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_rope_dimension_count(width // shape.heads)
    writer.add_tokenizer_model("no_vocab")

    def ternary(tensor: str, rows: int, columns: int) -> None:
        codes = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
        scale = np.float16(0.7 / np.sqrt(columns))
        block = reference.BLOCKS[kind].columns
        scales = np.full((rows, columns // block), scale, np.float16).view(np.uint16)
        writer.add_tensor(tensor, reference.pack_blocks(kind, codes, scales), raw_dtype=getattr(types, kind.upper()))

    table = rng.normal(0.0, 0.02, (shape.vocabulary, width)).astype(np.float32)
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(table, types.Q8_0), raw_dtype=types.Q8_0)
    for layer in range(shape.layers):
        stem = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{stem}{norm}.weight", np.ones(width, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            ternary(f"{stem}{part}.weight", width, width)
        ternary(f"{stem}ffn_gate.weight", inside, width)
        ternary(f"{stem}ffn_up.weight", inside, width)
        ternary(f"{stem}ffn_down.weight", width, inside)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- one timing, in a process of its own ----------------------------------------------------------------------------


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def time_ours(path: str, threads: int, sequences: int) -> dict[str, float]:
    """Seconds of each part with our engine."""
    from limbeck.kernels import native

    kernels = native()
    before = _peak()
    start = time.perf_counter()
    engine = kernels.Engine(path, threads, True)
    first = engine.create()
    engine.forward([(first, [1], False)])
    ready, loaded = time.perf_counter() - start, _peak() - before
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, VOCABULARY, PREFILL)]
    lines = [engine.create() for _ in range(sequences)]

    def decode(count: int, lines: list[int]) -> float:
        start = time.perf_counter()
        for number in range(count):
            engine.forward([(line, [tokens[number]], False) for line in lines])
        return time.perf_counter() - start

    seconds = decode(DECODED, lines)
    start = time.perf_counter()
    engine.forward([(first, tokens, False)])
    prefill = time.perf_counter() - start
    return {"ready": ready, "decode": seconds, "prefill": prefill, "decode_behind": decode(BEHIND, [first]),
            "loaded": loaded, "peak": _peak() - before, "bytes_a_token": engine.weight_bytes_a_token}  # fmt: skip


def time_llama(path: str, threads: int, sequences: int) -> dict[str, float]:
    """The same with llama.cpp, by its C interface."""
    import llama_cpp as api

    api.llama_backend_init()
    before = _peak()
    start = time.perf_counter()
    options = api.llama_model_default_params()
    options.n_gpu_layers = 0
    model = api.llama_model_load_from_file(path.encode(), options)
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024 * max(1, sequences), 512, 512
    settings.n_threads = settings.n_threads_batch = threads
    settings.n_seq_max = sequences
    context = api.llama_init_from_model(model, settings)

    def run(tokens: list[int], lines: list[int], positions: list[int]) -> None:
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, line, position) in enumerate(zip(tokens, lines, positions, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = line
            batch.logits[i] = i + 1 == len(tokens) or len(set(lines)) > 1
        assert api.llama_decode(context, batch) == 0
        api.llama_batch_free(batch)

    run([1], [0], [0])
    ready, loaded = time.perf_counter() - start, _peak() - before
    memory = api.llama_get_memory(context)
    api.llama_memory_clear(memory, True)
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, VOCABULARY, PREFILL)]

    def decode(count: int, length: int, lines: list[int]) -> float:
        start = time.perf_counter()
        for number in range(count):
            run([tokens[number]] * len(lines), lines, [length + number] * len(lines))
        return time.perf_counter() - start

    seconds = decode(DECODED, 0, list(range(sequences)))
    api.llama_memory_clear(memory, True)
    start = time.perf_counter()
    run(tokens, [0] * PREFILL, list(range(PREFILL)))
    prefill = time.perf_counter() - start
    return {"ready": ready, "decode": seconds, "prefill": prefill, "decode_behind": decode(BEHIND, PREFILL, [0]),
            "loaded": loaded, "peak": _peak() - before}  # fmt: skip


def child(engine: str, path: str, threads: int, sequences: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--child", engine, path, str(threads), str(sequences)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- all of them ------------------------------------------------------------------------------------------------------


def measure(name: str, threads: int, repeats: int, sequences: int = 1) -> dict[str, dict[str, Repeats]]:
    """Each engine's repeats of each part, the engines taking turns."""
    cases = {"ours": ("ours", "tq2_0"), "llama.cpp TQ2_0": ("llama", "tq2_0"), "llama.cpp Q4_0": ("llama", "q4_0")}
    found: dict[str, dict[str, Repeats]] = {case: {} for case in cases}
    for _ in range(repeats):
        for case, (engine, kind) in cases.items():
            for part, seconds in child(engine, str(model_file(name, kind)), threads, sequences).items():
                held = found[case].setdefault(part, Repeats())
                held.wall.append(seconds)
                held.cpu.append(seconds)
    return found


def best(found: dict[str, dict[str, Repeats]], part: str) -> str:
    return min(("llama.cpp TQ2_0", "llama.cpp Q4_0"), key=lambda case: found[case][part].seconds)


def bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads: our 8-bit product over 600 MB, which is bound by nothing else."""
    from limbeck.kernels import native

    kernels = native()
    pool = kernels.Pool(threads, True)
    blocks = np.zeros((36, 4096, 4096 // 32 * 34), np.uint8)
    weights = kernels.Weights("q8_0", blocks, pool)
    x = np.ones((1, 4096), np.float32)
    return max(weights.bytes / weights.time(x, 36, pool) for _ in range(5))


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        engine, path, threads, sequences = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
        print(json.dumps((time_ours if engine == "ours" else time_llama)(path, threads, sequences)))
        return 0
    given = arguments(__doc__.splitlines()[0]).parse_args()
    comparisons, rates, memory = {}, {}, {}
    runs = [("125M", 1)] if given.quick else [(name, threads) for name in SHAPES for threads in (1, 2)]
    shares = {}
    for name, threads in runs:
        found = measure(name, threads, 5)
        key = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
        for case, parts in found.items():
            counts = {"prefill": PREFILL, "decode": DECODED, "decode_behind": BEHIND}
            rates[f"{key}, {case}"] = {part: round(n / parts[part].seconds, 1) for part, n in counts.items()}
        for part in ("prefill", "decode", "decode_behind"):
            peer = best(found, part)
            comparisons[f"{key}, {part}: ours / {peer}"] = ratio(found[peer][part], found["ours"][part])
        size = model_file(name, "tq2_0").stat().st_size
        memory[key] = {
            "loaded_over_file": round(found["ours"]["loaded"].seconds / size, 3),
            "peak_over_llama_cpp": round(found["ours"]["peak"].seconds / found["llama.cpp TQ2_0"]["peak"].seconds, 3),
            "seconds_to_first_token": round(found["ours"]["ready"].seconds, 3),
        }
        read = found["ours"]["bytes_a_token"].seconds * DECODED / found["ours"]["decode"].seconds
        shares[key] = round(read / bandwidth(threads), 3)
    if not given.quick:
        for threads in (1, 2):
            found = measure("125M", threads, 5, sequences=8)
            rates[f"125M, {threads} threads, 8 sequences"] = {
                case: round(8 * DECODED / parts["decode"].seconds, 1) for case, parts in found.items()
            }
    names = list(comparisons)
    headline = {"prefill_ratio_vs_llama_cpp": comparisons[names[0]], "decode_ratio_vs_llama_cpp": comparisons[names[1]]}
    result = {
        "tokens_a_second": rates,
        "memory": memory,
        "share_of_bandwidth": shares,
        "decode_share_of_bandwidth": next(iter(shares.values())),
    }
    return report(result, given.json, {**headline, **comparisons}, list(headline))


if __name__ == "__main__":
    sys.exit(main())
