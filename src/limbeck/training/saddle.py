"""Saddle interventions: notice a stall, act, wait, and say what came of it.

The one idea: detection is a small state machine over (loss, gradient norm) that a checkpoint carries along;
acting is either a higher learning rate for a while or, with a proof of negative curvature, one move. Curvature
alone never triggers: at a model's random initialisation it is strongly negative and nothing is wrong.
"""

import json
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from limbeck.config import SaddleConfig
from limbeck.console import say, warn
from limbeck.errors import ConfigError
from limbeck.storage import atomic_write_text, read_json_lines
from limbeck.training.curvature import escape

_HISTORY = 2000


class SaddleMonitor:
    """Tells a stall from progress: low gradient norm, no improvement, loss still high."""

    def __init__(self, config: SaddleConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.patience_steps)
        self._norms: deque[float] = deque(maxlen=config.patience_steps)
        self._history: deque[float] = deque(maxlen=_HISTORY)
        self._quiet_until = 0

    def observe(self, step: int, loss: float, norm: float) -> str | None:
        """Count one step; why it is a stall, or None."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._history.append(norm)
        config = self.config
        if len(self._losses) < config.patience_steps or step < self._quiet_until:
            return None
        half = config.patience_steps // 2
        losses = list(self._losses)
        earlier, later = statistics.fmean(losses[:half]), statistics.fmean(losses[half:])
        improved = (earlier - later) / max(abs(earlier), 1e-12)
        threshold = 0.1 * statistics.median(self._history) if config.gradient_norm == "auto" else config.gradient_norm
        recent = statistics.fmean(self._norms)
        if recent >= threshold or improved >= config.min_improvement or later <= config.min_loss:
            return None
        return (
            f"loss {later:.4f} improved by {improved:.2%} in {config.patience_steps} steps, "
            f"gradient norm {recent:.3g} is below {threshold:.3g}"
        )

    def rest(self, until: int) -> None:
        """No stall before step `until`; the window starts anew."""
        self._quiet_until = until
        self._losses.clear()
        self._norms.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "history": list(self._history),
            "quiet_until": self._quiet_until,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name in ("losses", "norms", "history"):
            values = getattr(self, f"_{name}")
            values.clear()
            values.extend(state[name])
        self._quiet_until = state["quiet_until"]


class SaddleCallback(TrainerCallback):
    """Watches a DistillationTrainer and intervenes; every intervention and its effect goes to the log.

    `saddle.jsonl` in the run's folder holds a line each.

    Raises:
        ConfigError: curvature is wanted of a sharded model.
    """

    def __init__(self, trainer: Any, config: SaddleConfig) -> None:
        self._trainer, self.config = trainer, config
        self.monitor = SaddleMonitor(config)
        self._path = Path(trainer.args.output_dir) / "saddle.jsonl"
        self._count = 0
        self._boost: dict[str, Any] | None = None
        self._rates: list[float] = []
        self._recent: deque[float] = deque(maxlen=10)
        if config.curvature and trainer.is_fsdp_enabled:
            raise ConfigError("saddle.curvature is true and the model is sharded (FSDP); set it to false.")

    @property
    def factor(self) -> float:
        """What the learning rates are multiplied by now."""
        return float(self._boost["factor"]) if self._boost is not None else 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of steps that a killed run took and this one takes again."""
        if state.is_world_process_zero and self._path.exists():
            kept = [entry for entry in read_json_lines(self._path) if entry["step"] <= state.global_step]
            atomic_write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise the rates for this step while a boost lasts."""
        groups = self._trainer.optimizer.param_groups
        self._rates = [group["lr"] for group in groups]
        if self._boost is not None:
            for group in groups:
                group["lr"] = group["lr"] * self._boost["factor"]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the schedule its rates back."""
        for group, rate in zip(self._trainer.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step just taken."""
        loss, step = self._trainer.step_loss, state.global_step
        self._recent.append(loss)
        boost = self._boost
        if boost is not None:
            if step < boost["until"]:
                return
            self._boost = None
            self._report(step, "boost ended", boost["loss"], statistics.fmean(self._recent), factor=boost["factor"])
            return
        reason = self.monitor.observe(step, loss, self._trainer.last_grad_norm)
        if reason is None:
            return
        if self.config.curvature:
            self._escape(step, reason)
            self.monitor.rest(step + self.config.cooldown_steps)
        else:
            factor = self.config.boosts[min(self._count, len(self.config.boosts) - 1)]
            until = step + self.config.boost_steps
            before = statistics.fmean(self._recent)
            self._boost = {"factor": factor, "until": until, "loss": before}
            self._report(step, "boost", before, None, factor=factor, reason=reason, until=until)
            self.monitor.rest(until + self.config.cooldown_steps)
        self._count += 1

    def _escape(self, step: int, reason: str) -> None:
        trainer = self._trainer
        parameters = [p for p in trainer.accelerator.unwrap_model(trainer.model).parameters() if p.requires_grad]
        found = escape(parameters, lambda: trainer.probe_loss(self.config.probe_rows), self.config.lanczos_steps, step)
        if trainer.args.world_size > 1:  # the last bit may differ between devices
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, 0)
        what = {"none": "no negative curvature", "move": "moved along it", "noise": "a ball of noise"}[found.kind]
        self._report(
            step, what, found.before, found.after, reason=reason,
            smallest_curvature=found.curvature.smallest, largest_curvature=found.curvature.largest,
        )  # fmt: skip

    def _report(self, step: int, event: str, before: float, after: float | None, **details: Any) -> None:
        if not self._trainer.is_world_process_zero():
            return
        effect = "" if after is None else f": loss {before:.4f} → {after:.4f}"
        shown = ", ".join(
            f"{key.replace('_', ' ')} {value if isinstance(value, str) else format(value, '.4g')}"
            for key, value in details.items()
        )
        say(f"saddle, step {step}: {event}{effect} ({shown})")
        record = {"step": step, "event": event, "loss_before": before, "loss_after": after, **details}
        try:
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk must not end the training
            warn(f"{self._path} cannot be written ({error})")

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "monitor": self.monitor.state(),
            "count": self._count,
            "boost": self._boost,
            "recent": list(self._recent),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.monitor.restore(state["monitor"])
        self._count, self._boost = state["count"], state["boost"]
        self._recent = deque(state["recent"], maxlen=10)
