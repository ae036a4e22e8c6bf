"""The cache's codec on LM-like targets: bytes a token, round-trip KL, positions a second on one core.

    python benchmarks/cache.py

V 151,936, K 64. The rows imitate a language model's: a Zipfian unigram over shuffled ids, half of the rows
sharpened by a few strongly likely continuations. Beside it: the size and KL of DistillKit's published layout
as measured on synthetic rows (127 bytes at k = 50 with 1.4e-1 nats; 344 bytes at k = 128 with 7.2e-2).
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common import arguments, report
from limbeck.targets.codec import CodecSpec, decode, encode, measure
from limbeck.targets.sparse import SparseTargets, concatenate
from limbeck.targets.store import write_shard

V, K, TEMPERATURES = 151936, 64, (1.0, 2.0)


def lm_like_targets(positions: int, seed: int = 0) -> SparseTargets:
    """Top-64 targets `[N, 64]` of Zipfian distributions with context-dependent peaks."""
    generator = torch.Generator().manual_seed(seed)
    unigram = -1.05 * torch.log(torch.arange(1, V + 1) + 2.7)
    # A tokenizer's frequent ids are not its first ones: spread them over the whole vocabulary.
    unigram = unigram[torch.randperm(V, generator=generator)]
    parts = []
    for start in range(0, positions, 256):
        count = min(256, positions - start)
        logits = unigram + 1.5 * torch.randn(count, V, generator=generator)
        likely = torch.randint(0, V, (count, 40), generator=generator)
        boost = 14.0 * torch.rand(count, 1, generator=generator) * torch.rand(count, 40, generator=generator)
        logits.scatter_add_(1, likely, boost)
        parts.append(SparseTargets.from_logits(logits, K, TEMPERATURES))
    return concatenate(parts)


def timed(action, repeats: int) -> float:
    """Median seconds of an action."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    positions = 4096 if options.quick else 16384
    targets = lm_like_targets(positions)
    spec = CodecSpec(K, V, TEMPERATURES)
    sections = encode(targets, spec)
    loss = measure(targets, decode(sections, spec))
    repeats = 5 if options.quick else 9
    encode_seconds = timed(lambda: encode(targets, spec), repeats)
    decode_seconds = timed(lambda: decode(sections, spec), repeats)
    rows = targets.with_tensors({n: t.reshape(-1, 512, t.shape[-1]) for n, t in targets.tensors().items()})
    sizes, write_seconds = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for compression in ("none", "gzip"):
            started = time.perf_counter()
            record, _ = write_shard(Path(folder) / f"{compression}.h5", rows, spec, compression=compression)
            write_seconds = time.perf_counter() - started
            sizes[compression] = record["bytes"] / positions
    log_p, _ = targets.at_temperature(1.0)
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    report(
        {
            "shape": {"positions": positions, "vocab": V, "top_k": K, "temperatures": list(TEMPERATURES)},
            "teacher_mass": float(log_p.exp().sum(-1).mean()),
            "head_entropy_nats": entropy,
            "bytes_per_token": sizes["gzip"],
            "bytes_per_token_uncompressed": sizes["none"],
            "roundtrip_kl": loss.worst_kl,
            "mean_abs_logprob_error": loss.mean_abs_error,
            "encode_positions_per_s": positions / encode_seconds,
            "decode_positions_per_s": positions / decode_seconds,
            "write_shard_positions_per_s": positions / write_seconds,
            "numpy": np.__version__,
            "distillkit_published": {"k50": {"bytes": 127, "kl": 0.14}, "k128": {"bytes": 344, "kl": 0.072}},
        },
        options.json,
    )


if __name__ == "__main__":
    main()
