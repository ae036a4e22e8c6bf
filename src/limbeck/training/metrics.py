"""What a run measures between two log lines: what its objectives measure, waiting, memory, throughput.

The one idea: sums over positions by name, reduced over ranks once a log line; they travel with the checkpoint, so the
first line after a resume says what it would have said.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import torch

from limbeck.errors import ConfigError

Reduce = Callable[[torch.Tensor], torch.Tensor]
TOKENS = "tokens"


class StepMetrics:
    """Sums since the last log line; `drain` turns them into what is logged."""

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._seconds = {"teacher": 0.0, "data": 0.0}
        self._clock = time.perf_counter()

    def add(self, positions: torch.Tensor, metrics: Mapping[str, torch.Tensor]) -> None:
        """Count one micro-batch: its positions, and sums over them by name.

        Raises:
            ConfigError: it has other names than the ones before.
        """
        found = {TOKENS: positions, **metrics}
        if self._sums and self._sums.keys() != found.keys():
            differ = ", ".join(sorted(self._sums.keys() ^ found.keys()))
            raise ConfigError(f"objectives measured {differ} in one micro-batch and not in another; give 0 instead.")
        for name, value in found.items():
            value = value.detach().double()
            known = self._sums.get(name)
            self._sums[name] = value if known is None else known.to(value.device) + value

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

    def means(self, reduce: Reduce) -> tuple[float, dict[str, float]]:
        """Positions over all ranks, and each metric's mean over them; NAME/000/001 … of one with dimensions."""
        flat = torch.cat([value.reshape(-1) for value in self._sums.values()]) if self._sums else torch.zeros(0)
        values = iter(reduce(flat).tolist())  # one message for all
        sums: dict[str, float] = {}
        for name, value in self._sums.items():
            names = ["/".join([name, *(f"{number:03d}" for number in place)]) for place in np.ndindex(value.shape)]
            sums.update({key: next(values) for key in names})
        tokens = sums.pop(TOKENS, 0.0)
        means = {name: total / max(tokens, 1.0) for name, total in sums.items()}
        return tokens, means

    def drain(self, reduce: Reduce, *, distils: bool, targets_by_loader: bool) -> dict[str, float]:
        """What is logged, and start over.

        Args:
            reduce: sum over ranks.
            distils: a teacher takes part.
            targets_by_loader: its targets come with the data, so waiting for the data is waiting for it.
        """
        tokens, logs = self.means(reduce)
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        logs["tokens_per_second"] = tokens / seconds
        waited = dict(self._seconds)
        if distils:
            if targets_by_loader:
                waited = {"teacher": waited["teacher"] + waited["data"], "data": 0.0}
            logs["teacher_wait_share"] = waited["teacher"] / seconds
        logs["data_wait_share"] = waited["data"] / seconds
        logs["memory_gb"] = _memory_bytes() / 1e9
        self._start_over()
        return logs

    def state(self, reduce: Reduce) -> dict[str, Any]:
        """The sums over all ranks, for a checkpoint."""
        return {name: reduce(value).tolist() for name, value in self._sums.items()}

    def restore(self, state: dict[str, Any], *, main: bool) -> None:
        """Go on from a checkpoint; the main rank takes the sums of all."""
        if isinstance(state.get("sums"), list):  # an earlier limbeck's, of fixed names
            return
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64) * (1.0 if main else 0.0) for name, value in state.items()
        }


def _memory_bytes() -> float:
    """Peak of the GPU's memory, or this process's resident memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(psutil.Process().memory_info().rss)


def evaluation_metrics(means: Mapping[str, float], prefix: str, *, whole: bool, drawn: bool) -> dict[str, float]:
    """What an evaluation during training logs, from the means of what the objectives measured.

    Args:
        means: by name; `ce_loss` is among them.
        prefix: of the logged names.
        whole: the KL is over the teacher's whole distributions.
        drawn: it is an estimate from draws, which may be below 0.
    """
    found = dict(means)
    loss = found.pop("ce_loss")
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if "kl_to_teacher" in found:
        kl = found.pop("kl_to_teacher")
        name = "kl_to_teacher" if whole else "kl_to_teacher_estimate" if drawn else "kl_to_teacher_at_least"
        metrics[name] = kl if drawn else max(kl, 0.0)
    if "kl_loss" in found:
        metrics["divergence"] = found.pop("kl_loss")
    metrics |= {name: value for name, value in found.items() if "/" not in name}
    return {f"{prefix}_{name}": value for name, value in metrics.items()}
