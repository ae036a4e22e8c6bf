"""Perplexity and fidelity in one pass over held-out rows.

The one idea: every score is a sum over the positions that carry loss, divided once at the end, so batch
size and row order do not matter. Against a teacher in this process the KL is over the whole vocabulary;
against a cache it is that of the (K+1)-partition, a lower bound.

    bits/byte = Σ nats / ln 2 / Σ bytes of the predicted tokens

Shapes: B rows, T positions, N scored positions, V vocabulary.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from limbeck.console import progress
from limbeck.data.dataset import IGNORE, PackedDataset, PackedRows
from limbeck.errors import LimbeckError
from limbeck.losses.divergences import same_width, whole_kl
from limbeck.models import OutputHead, last_hidden_states

_CHUNK_BYTES = 8 << 20
_TOTALS = 8  # CE, bytes, tokens, seconds, KL, top-1 matches, teacher mass, student mass


@dataclass(frozen=True)
class Scores:
    """Held-out scores of one model; the last four are None without a teacher.

    Attributes:
        loss: cross-entropy in nats per token.
        perplexity: exp(loss).
        bits_per_byte: cross-entropy in bits per byte of text; None where the scored tokens stand for no bytes.
        tokens: positions scored.
        tokens_per_second: this model's forward passes and log-probabilities alone.
        kl_to_teacher: KL(teacher ‖ model) in nats per token, whole vocabulary, temperature 1.
        top1_agreement: share of positions where both prefer the same id.
        teacher_mass, student_mass: probability the two give to the teacher's `top_k` likeliest ids.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    tokens_per_second: float
    kl_to_teacher: float | None = None
    top1_agreement: float | None = None
    teacher_mass: float | None = None
    student_mass: float | None = None


@torch.no_grad()
def evaluate(
    model: Any,
    rows: PackedDataset,
    byte_lengths: np.ndarray,
    *,
    teacher: Any = None,
    top_k: int = 64,
    attention: str = "per_document",
    batch_size: int = 8,
    label: str = "evaluating",
    dummy_prefix: tuple[int, int] | None = None,
) -> Scores:
    """Score `model` on held-out rows, against the causal LM `teacher` if there is one.

    Args:
        model: a causal LM.
        rows: the held-out rows.
        byte_lengths: `[V]` bytes that each id of the tokenizer stands for.
        teacher: a causal LM; its ids beyond the tokenizer's are padding and get probability 0.
        top_k: ids of the masses.
        attention: per_document or packed.
        batch_size: rows in a forward pass.
        label: of the progress bar.
        dummy_prefix: begin-of-text id and the bytes that the tokenizer puts behind it without their being in the text
            (`LoadedTokenizer.dummy_prefix`).

    Raises:
        LimbeckError: no position of the rows is scored.
    """
    model.eval()
    count = len(rows)
    lengths = torch.from_numpy(byte_lengths)
    totals = torch.zeros(_TOTALS, dtype=torch.float64)
    with progress(label, count) as bar:
        for start in range(0, count, batch_size):
            batch = rows.rows(range(start, min(start + batch_size, count)))
            totals += _score_batch(model, teacher, batch, lengths, top_k, attention)
            totals[1] -= _prefix_bytes(batch, dummy_prefix)
            bar.advance(len(batch.input_ids))
    ce, size, tokens, seconds, kl, matches, teacher_mass, student_mass = totals.tolist()
    if not tokens:
        raise LimbeckError(
            f"none of the {count} held-out rows has a position to score: every document there is one token long. Hold "
            "out other documents (dataset.validation_fraction)."
        )
    loss = ce / tokens
    scores: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": ce / math.log(2.0) / size if size > 0 else None,
        "tokens": int(tokens),
        "tokens_per_second": tokens / seconds,
    }
    if teacher is not None:
        scores |= {
            "kl_to_teacher": max(kl / tokens, 0.0),
            "top1_agreement": matches / tokens,
            "teacher_mass": teacher_mass / tokens,
            "student_mass": student_mass / tokens,
        }
    return Scores(**scores)


def _score_batch(
    model: Any, teacher: Any, rows: PackedRows, lengths: torch.Tensor, top_k: int, attention: str
) -> torch.Tensor:
    labels = rows.labels.reshape(-1)
    valid = (labels != IGNORE).nonzero().squeeze(-1)
    labels = labels[valid]
    totals = torch.zeros(_TOTALS, dtype=torch.float64)
    clock = _now(model)
    hidden, head = _hidden(model, rows, attention), OutputHead(model)
    totals[3] += _now(model) - clock
    other = None
    if teacher is not None and teacher is not model:
        other = (_hidden(teacher, rows, attention), OutputHead(teacher, len(lengths)))
    step = max(1, _CHUNK_BYTES // (4 * head.vocab_size))
    for start in range(0, len(valid), step):
        part = valid[start : start + step]
        clock = _now(model)
        log_q = head.log_probs(hidden[part.to(hidden.device)])
        totals[3] += _now(model) - clock
        target = labels[start : start + step]
        totals[0] += float(-log_q.gather(1, target.to(log_q.device)[:, None]).sum(dtype=torch.float64))
        totals[1] += float(lengths[target].sum())
        totals[2] += len(part)
        if teacher is not None:
            log_p = log_q
            if other is not None:
                log_p = other[1].log_probs(other[0][part.to(other[0].device)]).to(log_q.device)
            totals[4:] += _fidelity(log_p, log_q, top_k)
    return totals


def _prefix_bytes(rows: PackedRows, dummy_prefix: tuple[int, int] | None) -> int:
    """Bytes of scored tokens that are not in the text: one prefix after each begin-of-text."""
    if dummy_prefix is None:
        return 0
    bos, size = dummy_prefix
    return size * int(((rows.input_ids == bos) & (rows.labels != IGNORE) & (rows.labels != bos)).sum())


def _now(model: Any) -> float:
    """The clock, once the model's device has done what was asked of it."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _fidelity(log_p: torch.Tensor, log_q: torch.Tensor, top_k: int) -> torch.Tensor:
    """[4]: KL(p ‖ q), top-1 matches, and the two masses on p's likeliest ids, summed over positions."""
    log_p, log_q = same_width(log_p, log_q)
    kl = whole_kl(log_p, log_q)
    matches = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum()
    support = log_p.topk(min(top_k, log_p.shape[1]), dim=-1).indices
    masses = [x.gather(1, support).exp().sum(dtype=torch.float64) for x in (log_p, log_q)]
    return torch.tensor([float(kl), float(matches), *map(float, masses)], dtype=torch.float64)


def _hidden(model: Any, rows: PackedRows, attention: str) -> torch.Tensor:
    """Last hidden states, flattened to [B·T, D]."""
    device = next(model.parameters()).device
    hidden: torch.Tensor = last_hidden_states(model, **rows.to(device).model_inputs(attention))
    return hidden.reshape(-1, hidden.shape[-1])
