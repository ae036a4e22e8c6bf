"""What a run says while it trains: one line a log.

combined    [  1000/ 100000] loss=2.3456 ce=2.1234 kl=0.4567 lr=0.020 gnorm=1.2 tok/s=8500 elapsed=2000s
throughput  [  1000/ 100000] loss=2.34 lr=0.020 gnorm=1.2 tok/s=8500 elapsed=2000s
parts       Step 1000: Total Loss: 2.3456, CE Loss: 2.1234, KL Loss: 0.4567
"""

import time
from typing import Any

from transformers import TrainerCallback

from limbeck.console import say


class LogLines(TrainerCallback):
    """Says the log lines of the main process.

    Args:
        form: combined, throughput, parts, or both of the last two.
    """

    def __init__(self, form: str = "combined") -> None:
        self._form = form
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of `elapsed`."""
        self._started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Format what the Trainer logs."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            if self._form != "parts":
                say(self._throughput_line(state, logs), step_line=True)
            if self._form in ("parts", "both"):
                say(parts_line(state.global_step, logs), step_line=True)
        elif any(key.startswith("eval_") for key in logs):
            where = f"[{state.global_step:6d}/{state.max_steps:7d}]"
            say(f"{where} evaluation: {evaluation_text(logs)}", step_line=True)

    def _throughput_line(self, state: Any, logs: dict[str, float]) -> str:
        rate = logs.get("learning_rate", 0.0)
        waited = logs.get("teacher_wait_share", 0.0)
        loss = f"loss={logs['loss']:.2f}"
        if self._form == "combined":
            found = ((key.removesuffix("_loss"), value) for key, value in logs.items() if key.endswith("_loss"))
            loss = " ".join([f"loss={logs['loss']:.4f}", *(f"{name}={value:.4f}" for name, value in found)])
        return (
            f"[{state.global_step:6d}/{state.max_steps:7d}] {loss} "
            f"lr={f'{rate:.3f}' if rate >= 1e-3 else f'{rate:.1e}'} gnorm={logs.get('grad_norm', 0.0):.1f} "
            f"tok/s={logs['tokens_per_second']:.0f} elapsed={time.perf_counter() - self._started:.0f}s"
            + (f" teacher={waited:.0%}" if waited >= 0.05 else "")
        )


def tag(name: str) -> str:
    """A name as trackers take it: without spaces."""
    return name.replace(" · ", ".").replace(" ", "_")


def parts_line(step: int, logs: dict[str, float]) -> str:
    """`Step 100: Total Loss: …` with every part there is: whatever the objectives measure as `NAME_loss`."""
    parts = [f"Total Loss: {logs['loss']:.4f}"]
    for key, value in logs.items():
        if key.endswith("_loss"):
            name = key.removesuffix("_loss")
            parts.append(f"{_LABELS.get(name) or name.replace('_', ' ').title()} Loss: {value:.4f}")
    return f"Step {step}: " + ", ".join(parts)


#: Abbreviations among the names of losses.
_LABELS = {"ce": "CE", "kl": "KL"}


def evaluation_text(logs: dict[str, float]) -> str:
    """The scores of an evaluation, one after the other."""
    return " ".join(f"{key.removeprefix('eval_')}={value:.4g}" for key, value in logs.items() if key != "epoch")
