"""Trackers (TensorBoard, W&B, trackio): where a run's curves go, under which name, and that they continue.

The one idea: a resumed run says again, to the bit, what it said between its last checkpoint and its end; so a tracker
is told of each step once, the run keeps the id it began with, and the curves go on where they were.
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from limbeck.config.training import TrackingConfig
from limbeck.errors import ConfigError
from limbeck.storage import atomic_write_text, read_json

_FILE = "tracking.json"
_USERS_LOGGING_DIR = os.environ.get("TENSORBOARD_LOGGING_DIR")
_TRACKERS = {"TensorBoardCallback", "WandbCallback", "TrackioCallback"}


class Tracking:
    """What trackers know a training by.

    Args:
        section: project, name and tags.
        folder: of the training; `tracking.json` in it keeps the id and what has been told.
        name: the run's.
        fingerprint: of what is trained from; with another one the curves are others.
        recipe: the resolved recipe, which trackers show as the run's configuration.
        anew: what was told before is another run's: this one does not resume.
        main: the process is the one that tracks.
    """

    def __init__(
        self,
        section: TrackingConfig,
        folder: Path,
        name: str,
        fingerprint: str,
        recipe: dict[str, Any],
        *,
        main: bool,
        anew: bool = False,
    ) -> None:
        self.section, self.recipe, self._main = section, recipe, main
        self._started = False
        self._path = folder / _FILE
        held = read_json(self._path) if main and self._path.is_file() else {}
        known = held.get("fingerprint") == fingerprint and not anew
        fresh: dict[str, Any] = {"id": uuid.uuid4().hex[:8], "fingerprint": fingerprint, "told": {}}
        self._record = dict(held) if known else fresh
        self.id = str(self._record["id"])
        self.name = section.name or name
        later = bool(held)  # another training began in this folder before
        if not known:
            self._record["folder"] = self.id if later else None
        own = folder / "runs" / str(self._record["folder"] or "")
        os.environ["TENSORBOARD_LOGGING_DIR"] = _USERS_LOGGING_DIR or str(own)
        if main:
            self._keep()

    def _keep(self) -> None:
        atomic_write_text(self._path, json.dumps(self._record) + "\n")

    def start(self, report_to: Sequence[str]) -> None:
        """Begin, or go on with, the run of trackers that keep runs themselves.

        Raises:
            ConfigError: the tracker will not start.
        """
        if not self._main or "wandb" not in report_to:
            return
        import wandb

        self._started = True
        try:
            wandb.init(
                project=os.environ.get("WANDB_PROJECT", self.section.project),
                name=os.environ.get("WANDB_NAME", self.name),
                tags=self.section.tags or None,
                id=os.environ.get("WANDB_RUN_ID", self.id),
                resume="allow",
                config=self.recipe,
            )
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"training.report_to names wandb, which does not start: {said[0][:300]}. Log in (`wandb login`), set "
                "WANDB_MODE=offline, or leave it out of report_to."
            ) from None

    def end(self) -> None:
        """Close what `start` has begun."""
        if self._started:
            import wandb

            wandb.finish()
            self._started = False

    def attach(self, trainer: Any) -> None:
        """Let the trainer's trackers hear of each step once."""
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ in _TRACKERS:
                callback.on_log = self._once(type(callback).__name__, callback.on_log)
        trainer.add_callback(_Recipe(self))

    def _once(self, tracker: str, on_log: Callable[..., None]) -> Callable[..., None]:
        """The same, left out for steps that the tracker was told before the run was resumed."""

        def gated(args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            told, kind = self._record["told"].setdefault(tracker, {}), _kind(logs or {})
            if state.global_step > told.get(kind, -1):
                on_log(args, state, control, logs=logs, **kwargs)
                if self._main:
                    told[kind] = state.global_step
                    self._keep()

        return gated


def _kind(logs: dict[str, Any]) -> str:
    """Steps and evaluations are counted apart: both come at the same step."""
    if "loss" in logs:
        return "steps"
    return "evaluations" if any(key.startswith("eval_") for key in logs) else "ends"


class _Recipe(TrainerCallback):
    """The last callback, after the trackers' own: trackio learns the recipe, and what was begun is ended."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trackio has no run before its own callback has begun."""
        if "trackio" in (args.report_to or []) and state.is_world_process_zero:
            import trackio

            trackio.config.update({"recipe": self._tracking.recipe}, allow_val_change=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next training of this process is another run."""
        self._tracking.end()
