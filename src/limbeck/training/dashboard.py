"""A live panel of the run on a terminal; elsewhere the plain lines say the same.

The one idea: everything shown is what the Trainer logs, so the panel can never know more than `training.log`,
TensorBoard or W&B.
"""

import sys
import time
from collections import deque
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from limbeck.training.callbacks import evaluation_text

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48
_MESSAGES = 6  # the newest ones are in the panel, all of them in training.log


def wants_dashboard(setting: str) -> bool:
    """True when the panel is to be shown: asked for, or `auto` on a terminal."""
    return setting == "on" or (setting == "auto" and sys.stderr.isatty())


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """The values as one line of bars, the newest `width` of them, scaled to their own range."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((value - low) / span * len(_BARS)))] for value in shown)


class Dashboard(TrainerCallback):
    """Progress, loss parts, rates, masses, expert load and the last evaluation."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._losses: list[float] = []
        self._logs: dict[str, float] = {}
        self._evaluation = ""
        self._began = (0.0, 0)
        self._messages: deque[tuple[str, str]] = deque(maxlen=_MESSAGES)
        self._last: tuple[Any, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the panel."""
        self._began, self._last = (time.perf_counter(), state.global_step), (args, state)
        self._live = Live(self._render(args, state), console=self._console, refresh_per_second=4)
        self._live.start()

    def tell(self, message: str) -> None:
        """Show a message, the newest last; at once."""
        self._messages.append((time.strftime("%H:%M:%S"), message))
        if self._last is not None:
            self._update(*self._last)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._update(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Take over what is logged."""
        if logs and "loss" in logs:
            self._logs = dict(logs)
            self._losses.append(logs["loss"])
        elif logs and any(key.startswith("eval_") for key in logs):
            self._evaluation = f"step {state.global_step}: {evaluation_text(logs)}"
        self._update(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last panel standing."""
        self._update(args, state)
        self.close()

    def close(self) -> None:
        """Give the terminal back, also when training ends with an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _update(self, args: Any, state: Any) -> None:
        self._last = (args, state)
        if self._live is not None:
            self._live.update(self._render(args, state))

    def _render(self, args: Any, state: Any) -> RenderableType:
        seconds = time.perf_counter() - self._began[0]
        done = state.global_step - self._began[1]
        left = f"{_clock(seconds / done * (state.max_steps - state.global_step))} left" if done else "starting"
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"step {state.global_step:,} of {state.max_steps:,}",
            ProgressBar(total=max(state.max_steps, 1), completed=state.global_step, width=_WIDTH),
            f"{_clock(seconds)} gone, {left}",
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim")
        for label, text in [*self._lines(), *self._messages]:
            body.add_row(label, Text(text))
        return Panel(Group(head, body), title=str(args.output_dir), title_align="left")

    def _lines(self) -> list[tuple[str, str]]:
        logs = self._logs
        if not logs:
            return []
        lines = [("loss", f"{logs['loss']:.4f}  {sparkline(self._losses)}")]
        parts = {"ce_loss": "CE", "kl_loss": "KL", "load_balance_loss": "load balance", "router_aux_loss": "router aux"}
        shown = [f"{label} {logs[key]:.4f}" for key, label in parts.items() if key in logs]
        if "alpha" in logs:
            shown.append(f"α {logs['alpha']:.3g}, τ {logs['temperature']:.3g}")
        lines.append(("parts", "   ".join(shown)))
        rates = [f"{key.removeprefix('lr/')} {value:.3g}" for key, value in logs.items() if key.startswith("lr/")]
        lines.append(("learning rate", "   ".join(rates)))
        lines.append(
            (
                "speed",
                f"{logs['tokens_per_second']:,.0f} tok/s   gradient norm {logs.get('grad_norm', 0.0):.3g}   "
                f"memory {logs['memory_gb']:.2f} GB   waiting: data {logs['data_wait_share']:.0%}"
                + (f", teacher {logs['teacher_wait_share']:.0%}" if "teacher_wait_share" in logs else ""),
            )
        )
        if "teacher_mass" in logs:
            lines.append(
                (
                    "support",
                    f"teacher mass {logs['teacher_mass']:.3f}   student mass {logs['student_mass']:.3f}   "
                    f"same first choice {logs['top1_agreement']:.1%}",
                )
            )
        load = [value for key, value in sorted(logs.items()) if key.startswith("expert_load/")]
        if load:
            lines.append(("expert load", f"{sparkline(load, 128)}  {min(load):.1%} to {max(load):.1%}"))
        if self._evaluation:
            lines.append(("held out", self._evaluation))
        return lines


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {whole % 60:02d}s"
