"""Ctrl-C and SIGTERM while a run trains: the step in hand is finished, a checkpoint is saved, and the run leaves.

The one idea: a signal only sets a flag, which every rank looks at between two steps, so that all leave at the same one;
a second signal leaves at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from limbeck.errors import StoppedError
from limbeck.training.checkpoints import steps, what_remains

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """Watches for signals while it is entered.

    Args:
        any_rank: True when its argument is True on any rank of a torchrun.
    """

    def __init__(self, any_rank: Callable[[bool], bool]) -> None:
        self._any_rank = any_rank
        self._former: dict[int, Any] = {}
        self._number: int | None = None
        self.stopped_at: int | None = None
        self._folder = Path()

    def __enter__(self) -> "Interruption":
        self._number = self.stopped_at = None
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._noticed) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            sys.stderr.write("leaving at once; what was saved last is kept\n")
            sys.stderr.flush()
            os._exit(128 + number)
        self._number = number
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("stopping after this step, with a checkpoint; once more to leave at once\n")
            sys.stderr.flush()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between two steps: save and stop, on all ranks, when one of them was told to."""
        if state.global_step < state.max_steps and self._any_rank(self._number is not None):
            self.stopped_at, self._folder = int(state.global_step), Path(args.output_dir)
            control.should_save = control.should_training_stop = True

    def raise_if_stopped(self) -> None:
        """Leave, once the checkpoint is there.

        Raises:
            StoppedError: says how to go on.
        """
        if self.stopped_at is not None:
            saved = self.stopped_at in steps(self._folder)
            lost = "" if saved else ", which could not be saved"
            raise StoppedError(
                f"stopped after step {self.stopped_at}{lost}; {what_remains(self._folder)}",
                128 + (self._number or signal.SIGTERM),
            )
