"""Perplexity and fidelity in one pass over held-out rows.

The one idea: every score is a sum over the positions that carry loss, divided once at the end, so batch
size and row order do not matter. Against a teacher that gives its whole distributions the KL is over the vocabulary;
against one that gives its likeliest ids alone it is that of the (K+1)-partition, a lower bound.

    bits/byte = Σ nats / ln 2 / Σ bytes of the predicted tokens

Shapes: B rows, T positions, N scored positions, V vocabulary.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from limbeck.config import TeacherConfig
from limbeck.config.base import default
from limbeck.console import progress
from limbeck.data.dataset import IGNORE, PackedDataset, PackedRows
from limbeck.errors import LimbeckError
from limbeck.losses.dense import dense_distillation_loss
from limbeck.losses.divergences import same_width, whole_kl
from limbeck.models import OutputHead, last_hidden_states
from limbeck.targets.reference import Reference
from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.base import Teacher, targets_in_turn

_CHUNK_BYTES = 8 << 20
_TOTALS = 8  # CE, bytes, tokens, seconds, KL, top-1 matches, teacher mass, student mass


@dataclass(frozen=True)
class Scores:
    """Held-out scores of one model; what compares with a teacher is None without one.

    Attributes:
        loss: cross-entropy in nats per token.
        perplexity: exp(loss).
        bits_per_byte: cross-entropy in bits per byte of text; None where the scored tokens stand for no bytes.
        tokens: positions scored.
        tokens_per_second: this model's forward passes and log-probabilities alone.
        kl_to_teacher: KL(teacher ‖ model) in nats per token, whole vocabulary, temperature 1.
        kl_to_teacher_at_least: the same over the teacher's stored ids and the rest as one: a lower bound.
        kl_to_teacher_estimate: the same from draws of the teacher's tail at temperature 1.
        top1_agreement: share of positions where both prefer the same id.
        teacher_mass, student_mass: probability the two give to the teacher's `top_k` likeliest ids (or the stored).
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    tokens_per_second: float
    kl_to_teacher: float | None = None
    kl_to_teacher_at_least: float | None = None
    kl_to_teacher_estimate: float | None = None
    top1_agreement: float | None = None
    teacher_mass: float | None = None
    student_mass: float | None = None


@torch.no_grad()
def score_model(
    model: Any,
    rows: PackedDataset,
    byte_lengths: np.ndarray,
    *,
    teacher: Teacher | None = None,
    top_k: int = default(TeacherConfig, "top_k"),
    attention: str = "per_document",
    batch_size: int = 8,
    label: str = "evaluating",
    dummy_prefix: tuple[int, int] | None = None,
) -> Scores:
    """Score `model` on held-out rows, against `teacher` if there is one.

    Args:
        model: a causal LM, or what has `predictions` like `ScoredGguf`.
        rows: the held-out rows.
        byte_lengths: `[V]` bytes that each id of the tokenizer stands for.
        teacher: any teacher that has targets for the rows.
        top_k: ids of the masses, where the teacher gives its whole distributions.
        attention: per_document or packed.
        batch_size: rows in a forward pass.
        label: of the progress bar.
        dummy_prefix: begin-of-text id and the bytes that the tokenizer puts behind it without their being in the text
            (`LoadedTokenizer.dummy_prefix`).

    Raises:
        LimbeckError: no position of the rows is scored.
    """
    model.eval()
    lengths = torch.from_numpy(byte_lengths)
    totals = torch.zeros(_TOTALS, dtype=torch.float64)
    kind = None
    with progress(label, len(rows)) as bar:
        for batch, view in _batches_with_teacher(model, rows, teacher, batch_size, top_k):
            totals += _score_batch(model, view, batch, lengths, attention)
            totals[1] -= _prefix_bytes(batch, dummy_prefix)
            kind = view.kind if view is not None else None
            bar.advance(len(batch.input_ids))
    return _scores(totals.tolist(), kind, len(rows))


def _scores(totals: list[float], kind: str | None, rows: int) -> Scores:
    ce, size, tokens, seconds, kl, matches, teacher_mass, student_mass = totals
    if not tokens:
        raise LimbeckError(
            f"none of the {rows} held-out rows has a position to score: every document there is one token long. Hold "
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
    if kind is not None:
        estimated = kind == "kl_to_teacher_estimate"  # which may be below 0
        scores |= {
            "top1_agreement": matches / tokens,
            "teacher_mass": teacher_mass / tokens,
            "student_mass": student_mass / tokens,
            **({kind: kl / tokens if estimated else max(kl / tokens, 0.0)} if kind else {}),
        }
    return Scores(**scores)


@dataclass(frozen=True)
class _TeacherView:
    """What a teacher says of one batch: whole distributions, or targets; neither where the model is the teacher."""

    top_k: int
    reference: Reference | None = None
    targets: SparseTargets | None = None

    @property
    def kind(self) -> str:
        """The score that its KL is; empty when draws at another temperature say nothing of it."""
        if self.targets is None:
            return "kl_to_teacher"
        drawn_at = self.targets.sampling_temperature
        return "kl_to_teacher_at_least" if drawn_at is None else "kl_to_teacher_estimate" if drawn_at == 1.0 else ""

    def compare(self, log_q: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`[4]`: KL, top-1 matches and the two masses, summed over positions; `log_q` `[N, V]` is the model's."""
        if self.targets is not None:
            return self._against_targets(log_q, self.targets.flatten()[places].to(log_q.device))
        log_p = log_q if self.reference is None else self.reference.log_probs(places).to(log_q.device)
        log_p, log_q = same_width(log_p, log_q)
        support = log_p.topk(min(self.top_k, log_p.shape[1]), dim=-1).indices
        masses = [x.gather(1, support).exp().sum(dtype=torch.float64) for x in (log_p, log_q)]
        return _sums(whole_kl(log_p, log_q), log_p.argmax(dim=-1) == log_q.argmax(dim=-1), *masses)

    def _against_targets(self, log_q: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
        targets = targets.restrict_vocabulary(log_q.shape[-1])
        log_p = torch.where(targets.valid, targets.logprobs, -math.inf)
        ids = targets.token_ids.clamp_min(0).long()
        best = ids.gather(1, log_p.argmax(dim=-1, keepdim=True)).squeeze(1)
        student = torch.where(targets.valid, log_q.gather(1, ids), -math.inf)
        masses = [x.exp().sum(dtype=torch.float64) for x in (log_p, student)]
        kl = log_q.new_zeros((), dtype=torch.float64)
        if self.kind:
            every = torch.zeros(len(log_q), dtype=torch.long, device=log_q.device)  # α is 1: labels do not count
            mean = dense_distillation_loss(log_q, every, targets, alpha=1.0, temperature=1.0)
            kl = mean.double() * len(log_q)
        return _sums(kl, (best == log_q.argmax(dim=-1)) & targets.valid.any(dim=-1), *masses)


def _sums(*values: torch.Tensor) -> torch.Tensor:
    return torch.tensor([float(value.sum(dtype=torch.float64)) for value in values], dtype=torch.float64)


def _batches_with_teacher(
    model: Any, rows: PackedDataset, teacher: Teacher | None, batch_size: int, top_k: int
) -> Iterator[tuple[PackedRows, _TeacherView | None]]:
    """The rows in batches with what the teacher says of them."""
    count = len(rows)
    batches = (rows.rows(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size))
    if teacher is None or teacher.model is model:
        view = None if teacher is None else _TeacherView(top_k)
        yield from ((batch, view) for batch in batches)
        return
    for batch in batches:
        reference = teacher.reference(batch)
        if reference is None:  # it gives its stored ids alone, for this batch and the others
            for asked, targets in targets_in_turn(teacher, chain([batch], batches)):
                yield asked, _TeacherView(top_k, targets=targets)
            return
        yield batch, _TeacherView(top_k, reference)


def _score_batch(
    model: Any, view: _TeacherView | None, rows: PackedRows, lengths: torch.Tensor, attention: str
) -> torch.Tensor:
    labels = rows.labels.reshape(-1)
    valid = (labels != IGNORE).nonzero().squeeze(-1)
    totals = torch.zeros(_TOTALS, dtype=torch.float64)
    own = getattr(model, "predictions", None)  # of a model that is none of torch's
    for part, log_q, seconds in (own or partial(_predictions, model))(rows, valid, attention):
        totals[3] += seconds
        target = labels[part]
        totals[0] += float(-log_q.gather(1, target.to(log_q.device)[:, None]).sum(dtype=torch.float64))
        totals[1] += float(lengths[target].sum())
        totals[2] += len(part)
        if view is not None:
            totals[4:] += view.compare(log_q, part)
    return totals


def _predictions(
    model: Any, rows: PackedRows, valid: torch.Tensor, attention: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Flat positions a part at a time, their log-probabilities `[n, V]`, and the seconds that took."""
    clock = _now(model)
    hidden, head = _hidden(model, rows, attention), OutputHead(model)
    body = _now(model) - clock
    for part in torch.split(valid, head.positions_in(_CHUNK_BYTES)) if len(valid) else ():
        clock = _now(model)
        log_q = head.log_probs(hidden[part.to(hidden.device)])
        yield part, log_q, body + _now(model) - clock
        body = 0.0


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


def _hidden(model: Any, rows: PackedRows, attention: str) -> torch.Tensor:
    """Last hidden states, flattened to [B·T, D]."""
    device = next(model.parameters()).device
    hidden: torch.Tensor = last_hidden_states(model, **rows.to(device).model_inputs(attention))
    return hidden.reshape(-1, hidden.shape[-1])
