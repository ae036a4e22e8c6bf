"""The normaliser at temperature 2 from top ids and their mass at 1: a power law through what is known, and its rivals.

    python benchmarks/tail.py

Mean absolute error of log Z in nats over 1,024 positions: ours (targets/tail.py), a tail spread evenly over the other
ids, and the tail as one lump. Imitated rows of a large vocabulary (see cache.py), and the shipped teacher on a module
of the standard library. It measures error and no time: the limit is 0, nothing is noise, and `--quick` changes nothing.
"""

import argparse
import math
import sys

import torch

from cache import V as LARGE_V
from cache import lm_like_targets
from common import arguments, report
from limbeck import LocalTeacher, SparseTargets
from limbeck.data.dataset import PackedRows
from limbeck.data.tokenizer import load_tokenizer
from limbeck.models import load_causal_lm
from limbeck.targets.tail import estimate_log_z

POSITIONS, TAU = 1024, 2.0


def shipped_targets() -> SparseTargets:
    """Top-64 targets of tiny-python on argparse's source, in rows of 256 tokens."""
    with open(argparse.__file__, encoding="utf-8") as source:  # noqa: PTH123
        ids = torch.tensor(load_tokenizer("tiny-python").hf(source.read())["input_ids"][:POSITIONS]).reshape(4, 256)
    teacher = LocalTeacher(load_causal_lm("tiny-python", dtype="float32"), top_k=64)
    return teacher.targets(PackedRows(torch.arange(4), ids, torch.zeros_like(ids))).flatten()


def errors(targets: SparseTargets, top_k: int) -> dict[str, float]:
    logprobs = targets.logprobs[:, :top_k]
    tail = (1.0 - logprobs.exp().sum(-1)).clamp_min(0.0).log()
    head, exact = (logprobs / TAU).logsumexp(-1), targets.log_z[:, targets.temperatures.index(TAU)]
    evenly = tail / TAU + (1.0 - 1.0 / TAU) * math.log(targets.vocab_size - top_k)
    found = {
        "power_law": estimate_log_z(logprobs, logprobs > -math.inf, targets.vocab_size, TAU),
        "uniform": torch.logaddexp(head, evenly),
        "lump": torch.logaddexp(head, tail / TAU),
    }
    return {name: float((value - exact).abs().mean()) for name, value in found.items()}


def main() -> int:
    options = arguments(__doc__).parse_args()
    result: dict = {"temperature": TAU, "positions": POSITIONS, "limit": 0.0}
    for name, targets in ((f"imitated_v{LARGE_V}", lm_like_targets(POSITIONS)), ("tiny_python", shipped_targets())):
        for top_k in (20, 64):
            result |= {f"{name}_k{top_k}_{kind}": value for kind, value in errors(targets, top_k).items()}
    return report(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
