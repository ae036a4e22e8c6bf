"""The cache's codec on LM-like targets: bytes a token, round-trip KL, positions a second on one core.

    python benchmarks/cache.py
    python benchmarks/cache.py --quick --json

V 151,936, K 64. The rows imitate a language model's: a Zipfian unigram over shuffled ids, half of the rows
sharpened by a few strongly likely continuations. Beside it: the size and KL of DistillKit's published layout
as measured on synthetic rows (127 bytes at k = 50 with 1.4e-1 nats; 344 bytes at k = 128 with 7.2e-2).

Limits. Of size: the ids as one of all sets of K, the 8-bit levels by their histogram, range and tails as they are.
Of speed: the same raw arrays (int32 ids, float32 log-probabilities and normalisers) copied in memory; gzip of them at
its fastest level is the peer.
"""

import math
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from common import arguments, interleaved, medians, ratio, report
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


def limit_bytes(levels: np.ndarray) -> dict[str, float]:
    """Bytes a position of the best code that knows neither which ids are frequent nor how levels follow each other."""
    chosen = (math.lgamma(V + 1) - math.lgamma(K + 1) - math.lgamma(V - K + 1)) / math.log(2.0)
    share = np.bincount(levels.ravel(), minlength=256) / levels.size
    entropy = -float((share[share > 0] * np.log2(share[share > 0])).sum())
    parts = {"ids": chosen / 8, "levels": K * entropy / 8, "range_and_tails": 2.0 + 2.0 * len(TEMPERATURES)}
    return {**parts, "all": sum(parts.values())}


def main() -> int:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    positions, repeats = (4096, 9) if options.quick else (16384, 15)
    targets = lm_like_targets(positions)
    spec = CodecSpec(K, V, TEMPERATURES)
    sections = encode(targets, spec)
    loss = measure(targets, decode(sections, spec))
    rows = targets.with_tensors({n: t.reshape(-1, 512, t.shape[-1]) for n, t in targets.tensors().items()})
    raw = [tensor.numpy() for tensor in targets.tensors().values()]
    zipped = [zlib.compress(array, 1) for array in raw]
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:

        def shard(compression: str) -> None:
            record, _ = write_shard(Path(folder) / f"{compression}.h5", rows, spec, compression=compression)
            sizes[compression] = record["bytes"] / positions

        shard("none")
        found = interleaved(
            {
                "encode": lambda: encode(targets, spec),
                "decode": lambda: decode(sections, spec),
                "write_shard": lambda: shard("gzip"),
                "copy_raw": lambda: [array.copy() for array in raw],
                "gzip_raw": lambda: [zlib.compress(array, 1) for array in raw],
                "gunzip_raw": lambda: [zlib.decompress(content) for content in zipped],
            },
            repeats,
        )
    log_p, _ = targets.at_temperature(1.0)
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    limits = limit_bytes(sections["levels"])
    return report(
        {
            "shape": {"positions": positions, "vocab": V, "top_k": K, "temperatures": list(TEMPERATURES)},
            "repeats": repeats,
            "teacher_mass": float(log_p.exp().sum(-1).mean()),
            "head_entropy_nats": entropy,
            "bytes_per_token": sizes["gzip"],
            "bytes_per_token_uncompressed": sizes["none"],
            "bytes_per_token_raw": sum(array.nbytes for array in raw) / positions,
            "bytes_per_token_raw_gzip": sum(map(len, zipped)) / positions,
            "limit_bytes_per_token": limits,
            "bytes_over_limit": sizes["gzip"] / limits["all"],
            "roundtrip_kl": loss.worst_kl,
            "mean_abs_logprob_error": loss.mean_abs_error,
            "encode_positions_per_s": positions / found["encode"].seconds,
            "decode_positions_per_s": positions / found["decode"].seconds,
            "write_shard_positions_per_s": positions / found["write_shard"].seconds,
            "limit_copy_positions_per_s": positions / found["copy_raw"].seconds,
            **medians(found),
            "numpy": np.__version__,
            "distillkit_published": {"k50": {"bytes": 127, "kl": 0.14}, "k128": {"bytes": 344, "kl": 0.072}},
        },
        options.json,
        {
            "encode_time_vs_gzip_of_raw": ratio(found["encode"], found["gzip_raw"]),
            "decode_time_vs_gunzip_of_raw": ratio(found["decode"], found["gunzip_raw"]),
            "encode_time_over_copy": ratio(found["encode"], found["copy_raw"]),
            "decode_time_over_copy": ratio(found["decode"], found["copy_raw"]),
        },
        headline=["encode_time_vs_gzip_of_raw"],
    )


if __name__ == "__main__":
    sys.exit(main())
