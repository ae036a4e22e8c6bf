"""`/v1/topk`'s answer: values quantised to int8 around the middle of their range, and the rest as one logit."""

import json
import math
from typing import Any

import torch

from limbeck.targets.sparse import SparseTargets


def topk_answer(targets: SparseTargets, lengths: list[int], temperature: float, dtype: str) -> bytes:
    """The answer's JSON (`schema.TopKAnswer`) from targets `[B, T, K]`.

    Values are log-probabilities at the temperature, moved by a constant of the position so that int8 reaches both
    ends: scale is (largest − smallest) / 254 and no value is off by more than half of it. `other_logit` is moved alike.
    """
    log_p, log_tail = targets.at_temperature(temperature)
    used = targets.valid
    low = torch.where(used, log_p, math.inf).amin(dim=-1)
    high = log_p.amax(dim=-1)
    middle, scale = (low + high) / 2.0, ((high - low) / 254.0).clamp_min(1e-8)
    values = torch.where(used, log_p - middle.unsqueeze(-1), -math.inf)
    other = (log_tail - middle).clamp_min(-1e4)  # JSON has no infinity
    answer: dict[str, Any] = {"indices": _lists(targets.token_ids, lengths)}
    if dtype == "int8":
        levels = (values / scale.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        answer |= {"values_int8": _lists(levels, lengths), "scale": _lists(scale, lengths)}
    else:
        kept = values.half().float() if dtype == "float16" else values
        answer["values"] = _lists(kept, lengths)
    answer |= {
        "other_logit": _lists(other, lengths),
        "other_mass": _lists(log_tail.exp().clamp(0.0, 1.0), lengths),
        "batch_size": len(lengths),
        "num_positions": sum(lengths),
        "k": targets.top_k,
    }
    return json.dumps(answer, separators=(",", ":")).encode()


def _lists(values: torch.Tensor, lengths: list[int]) -> list[Any]:
    return [row[:length].tolist() for row, length in zip(values, lengths, strict=True)]
