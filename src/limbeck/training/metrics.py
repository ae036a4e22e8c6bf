"""What a run measures between two log lines: loss parts, masses, expert load, waiting, memory, throughput.

The one idea: sums over positions, reduced over ranks once a log line; they travel with the checkpoint, so the
first line after a resume says what it would have said.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]
_PARTS = ("ce", "divergence", "teacher_mass", "student_mass", "top1", "tokens", "load_balance", "router_aux")


class StepMetrics:
    """Sums since the last log line; `drain` turns them into what is logged."""

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._sums = torch.zeros(len(_PARTS), dtype=torch.float64)
        self._load: torch.Tensor | None = None
        self._seconds = {"teacher": 0.0, "data": 0.0}
        self._clock = time.perf_counter()

    def add(self, outputs: Any) -> None:
        """Count one micro-batch: a `LossOutput`."""
        parts, router = outputs.parts, outputs.router
        zero = torch.zeros((), device=parts.ce_sum.device)
        values = [
            parts.ce_sum,
            parts.divergence_sum,
            parts.teacher_mass,
            parts.student_mass,
            parts.top1_matches,
            parts.num_valid,
            router.load_balance * parts.num_valid if router is not None else zero,
            router.aux * parts.num_valid if router is not None else zero,
        ]
        self._sums = self._sums.to(zero.device) + torch.stack([v.detach().double() for v in values])
        if router is not None:
            load = router.load.detach().double() * parts.num_valid
            self._load = load if self._load is None else self._load.to(load.device) + load

    @contextmanager
    def waiting(self, what: str, device: torch.device | None = None) -> Iterator[None]:
        """Count the time inside as waiting for `teacher` or `data`; on a GPU until it is really done."""
        started = time.perf_counter()
        yield
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds[what] += time.perf_counter() - started

    def skip(self, seconds: float) -> None:
        """Take time that was not training (an evaluation, a save) out of the throughput."""
        self._clock += seconds

    def sums(self, reduce: Reduce) -> dict[str, float]:
        """Totals over the ranks, by name."""
        return dict(zip(_PARTS, reduce(self._sums).tolist(), strict=True))

    def drain(self, reduce: Reduce, *, distils: bool, targets_by_loader: bool) -> dict[str, float]:
        """What is logged, and start over.

        Args:
            reduce: sum over ranks.
            distils: a teacher takes part.
            targets_by_loader: its targets come with the data, so waiting for the data is waiting for it.
        """
        sums = self.sums(reduce)
        tokens, seconds = max(sums["tokens"], 1.0), max(time.perf_counter() - self._clock, 1e-9)
        logs = {"ce_loss": sums["ce"] / tokens, "tokens_per_second": sums["tokens"] / seconds}
        waited = dict(self._seconds)
        if distils:
            logs["kl_loss"] = sums["divergence"] / tokens
            logs["teacher_mass"] = sums["teacher_mass"] / tokens
            logs["student_mass"] = sums["student_mass"] / tokens
            logs["top1_agreement"] = sums["top1"] / tokens
            if targets_by_loader:
                waited = {"teacher": waited["teacher"] + waited["data"], "data": 0.0}
            logs["teacher_wait_share"] = waited["teacher"] / seconds
        logs["data_wait_share"] = waited["data"] / seconds
        if self._load is not None:
            logs["load_balance_loss"] = sums["load_balance"] / tokens
            logs["router_aux_loss"] = sums["router_aux"] / tokens
            load = (reduce(self._load) / tokens).tolist()
            logs.update({f"expert_load/{expert:03d}": share for expert, share in enumerate(load)})
        logs["memory_gb"] = _memory_bytes() / 1e9
        self._start_over()
        return logs

    def state(self, reduce: Reduce) -> dict[str, Any]:
        """The sums over all ranks, for a checkpoint."""
        load = reduce(self._load).tolist() if self._load is not None else None
        return {"sums": reduce(self._sums).tolist(), "load": load}

    def restore(self, state: dict[str, Any], *, main: bool) -> None:
        """Go on from a checkpoint; the main rank takes the sums of all."""
        if main:
            self._sums = torch.tensor(state["sums"], dtype=torch.float64)
            self._load = torch.tensor(state["load"], dtype=torch.float64) if state["load"] is not None else None


def _memory_bytes() -> float:
    """Peak of the GPU's memory, or this process's resident memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(psutil.Process().memory_info().rss)
