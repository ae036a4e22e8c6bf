"""A transformers.Trainer whose checkpoints are whole, fit on the disk, and resume to the bit.

The one idea: a save is pieces written beside its place, agreed on by all ranks, and one rename; when it
fails the run goes on with the checkpoint before it. Weights are loaded through `from_pretrained`, because
the Trainer's own loading drops fused expert weights without a word (transformers #48805).
"""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, Trainer, TrainerCallback

from limbeck.console import say, warn
from limbeck.errors import LimbeckError
from limbeck.losses.objective import Objectives
from limbeck.models import require_whole
from limbeck.storage import read_json, write_json
from limbeck.students.weights_file import rename_weights
from limbeck.training.checkpoints import (
    BEST,
    PROGRESS,
    commit,
    first_failure,
    last_size,
    newest,
    other_groups,
    partial_folder,
    publish_model,
    room_for,
    rotate,
    what_remains,
)
from limbeck.training.guard import DivergedError
from limbeck.training.offload import ExpertOffload
from limbeck.training.own_parameters import load_own, save_own
from limbeck.training.private import check_attributes, check_trainer


class CheckpointingTrainer(Trainer):
    """Saves `step_N/`, keeps `best/` and `latest`, and resumes from them."""

    control: Any
    optimizer: Any
    lr_scheduler: Any
    tokenizer_to_save: Any = None
    objectives: Objectives
    offload: ExpertOffload | None = None

    def __init__(self, *, args: Any, **kwargs: Any) -> None:
        check_trainer(Trainer)
        # transformers knows no step_N; these checkpoints are rotated here.
        self._keep_checkpoints, args.save_total_limit = args.save_total_limit, None
        self._warned: set[str] = set()
        self._rates: dict[str, float] = {}
        self.last_grad_norm = 0.0
        #: Names the settings a checkpoint is made under; one made under others gives its moments, not its rates.
        self.settings_id: str | None = None
        self._settings_changed = False
        self._saved_progress: dict[str, Any] = {}
        #: The step at which the present settings began; ramps count from it.
        self.settings_began = 0
        self._saved_best: tuple[Any, Any, Any] = (None, None, None)
        super().__init__(args=args, **kwargs)
        self.add_callback(_RestoreProgress(self))

    def warn_once(self, key: str, message: str) -> None:
        """Tell the user something that would repeat itself."""
        if key not in self._warned:
            self._warned.add(key)
            warn(message)

    # -- saving ----------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, seal, rename, and only then delete older checkpoints: at every instant a whole one exists."""
        started = time.perf_counter()
        self._refuse_nan_weights()
        folder, step = Path(self.args.output_dir), self.state.global_step
        if self._refused(folder):
            self._forget_unsaved_best(step)
            return
        self.store_flos()
        best = self.state.best_global_step
        if best is not None and (best == step or (folder / f"step_{best}").is_dir()):  # where it will be
            self.state.best_model_checkpoint = str(folder / f"step_{best}")
        problem = self._first_of_any_rank(self._write(folder, step))
        if problem is None:  # the rename is rank 0's, and may still fail for want of room
            place = [lambda: commit(folder, step)] if self.args.should_save else []
            problem = self._first_of_any_rank(first_failure(place))
        if problem is not None:
            self._forget_unsaved_best(step)
            if self.args.should_save:
                self._tell_of_failure(folder, step, problem)
        elif self.args.should_save:
            self._committed(folder, step, time.perf_counter() - started)
        if problem is None:
            state = self.state
            self._saved_best = (state.best_global_step, state.best_metric, state.best_model_checkpoint)
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()
        self._took(time.perf_counter() - started)

    def _committed(self, folder: Path, step: int, seconds: float) -> None:
        final = folder / f"step_{step}"
        if self.state.best_global_step == step:
            self._publish_best(final)
        try:
            rotate(folder, self._keep_checkpoints, self.state.best_global_step)
        except OSError as error:
            warn(f"an older checkpoint in {folder} could not be removed ({error})")
        say(f"saved {final} ({_megabytes(last_size(folder) or 0)} in {seconds:.1f} s)")

    def _tell_of_failure(self, folder: Path, step: int, problem: str) -> None:
        shutil.rmtree(partial_folder(folder, step), ignore_errors=True)
        kept = newest(folder)
        warn(
            f"checkpoint step_{step} could not be written ({problem}). "
            + (f"{kept} is whole and stays the one to resume from; " if kept else "There is none yet; ")
            + "training goes on and tries again at the next save. Make room meanwhile."
        )

    def _forget_unsaved_best(self, step: int) -> None:
        """The best step is one whose weights are on disk: what a failed save leaves is the best before it."""
        if self.state.best_global_step == step:
            state = self.state
            state.best_global_step, state.best_metric, state.best_model_checkpoint = self._saved_best

    def _refuse_nan_weights(self) -> None:
        """Nothing is saved whose weights are not numbers."""
        held = [*self.model.parameters(), *self.objectives.parameters()]
        finite = all(bool(torch.isfinite(p.detach()).all()) for p in held)
        step = self.state.global_step
        problem = None if finite else f"after step {step} the weights are not finite"
        if (problem := self._first_of_any_rank(problem)) is not None:
            raise DivergedError(
                f"{problem}: the last update was too large, and nothing is saved over. training.learning_rate is "
                f"{self.args.learning_rate:g}, warm-up {self.args.warmup_steps} steps; lower the rate or lengthen the "
                f"warm-up, which starts over ({what_remains(self.args.output_dir)})."
            )

    def _took(self, seconds: float) -> None:
        """A save's time is no training time; for the throughput."""

    def _refused(self, folder: Path) -> bool:
        """True when a checkpoint of the last one's size does not fit; rank 0 looks, and all do as it says."""
        refusal = None
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            warning, refusal = room_for(folder, last_size(folder) or self._estimated_size())
            if warning is not None:
                warn(warning)
            if refusal is not None:
                warn(f"{refusal}. step_{self.state.global_step} is not saved; the checkpoints there stay as they are")
        if self.args.world_size > 1:
            (refusal,) = broadcast_object_list([refusal])
        return refusal is not None

    def _estimated_size(self) -> int:
        """Bytes of weights and optimizer state, for the first checkpoint."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        state = getattr(self.optimizer, "state", None) or {}
        tensors += [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _write(self, folder: Path, step: int) -> str | None:
        """This rank's pieces of the checkpoint; what went wrong with its files, if anything."""
        partial = partial_folder(folder, step)
        if self.args.should_save and partial.exists():
            shutil.rmtree(partial)
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()
        progress = self.progress_state()
        pieces = [
            lambda: self.save_model(str(partial), _internal_call=True),
            lambda: self._save_optimizer_and_scheduler(str(partial)),
            lambda: self._save_scaler(str(partial)),
            lambda: self._save_rng_state(str(partial)),
        ]
        if self.args.should_save:
            pieces += [
                lambda: save_own(self.objectives, partial),
                lambda: self.state.save_to_json(str(partial / "trainer_state.json")),
                lambda: write_json(partial / PROGRESS, progress),
            ]
        return first_failure(pieces)

    def _on_any_rank(self, here: bool) -> bool:
        """True when it is so on any rank."""
        if self.args.world_size == 1:
            return here
        told = torch.tensor(float(here), device=self.args.device)
        return bool(self.accelerator.reduce(told, reduction="sum") > 0)

    def _first_of_any_rank(self, problem: str | None) -> str | None:
        """What went wrong on any rank, so that all do the same."""
        found = gather_object([problem]) if self.args.world_size > 1 else [problem]
        return next((entry for entry in found if entry), None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, config and tokenizer; without `training_args.bin`, a pickle that nobody should have to trust."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.args.should_save and self.tokenizer_to_save is not None:
            self.tokenizer_to_save.save_pretrained(folder)
        if self.args.should_save and hasattr(self.accelerator.unwrap_model(self.model), "ternary_state"):
            rename_weights(folder)

    def _publish_best(self, checkpoint: Path) -> None:
        try:
            publish_model(checkpoint, Path(self.args.output_dir) / BEST)
        except OSError as error:
            warn(f"best/ could not be written ({error}); {checkpoint} holds the same weights")

    def save_final(self, folder: Path) -> None:
        """Write the trained model into `folder`; all ranks call it, as a sharded model is gathered here.

        Raises:
            LimbeckError: it could not be written; nothing half-written is left.
        """
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        if self.is_fsdp_enabled:  # checkpoints may be sharded, the result is one model
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self._refuse_nan_weights()
        problem = self._first_of_any_rank(first_failure([lambda: self.save_model(str(folder))]))
        if problem is not None:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise LimbeckError(
                f"the trained weights could not be written to {folder.parent} ({problem}). Make room; then "
                f"{what_remains(folder.parent)}."
            )

    # -- resuming --------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `True` resumes from the newest whole checkpoint of `output_dir`."""
        if resume_from_checkpoint is True:
            found = newest(Path(self.args.output_dir))
            resume_from_checkpoint = str(found) if found else None
        progress = Path(resume_from_checkpoint) / PROGRESS if resume_from_checkpoint else None
        self._saved_progress = read_json(progress) if progress is not None and progress.is_file() else {}
        self._settings_changed = bool(self._saved_progress) and self._saved_progress["settings"] != self.settings_id
        began = "step" if self._settings_changed else "settings_began"
        self.settings_began = self._saved_progress.get(began, 0)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The saved state; a best step whose checkpoint is not in this folder is another run's."""
        result: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        best = self.state.best_global_step
        if best is not None and not (Path(self.args.output_dir) / f"step_{best}").is_dir():
            self.state.best_global_step = self.state.best_metric = self.state.best_model_checkpoint = None
        state = self.state
        self._saved_best = (state.best_global_step, state.best_metric, state.best_model_checkpoint)
        return result

    def progress_state(self) -> dict[str, Any]:
        """What the Trainer forgets between two log lines."""
        total = self.accelerator.reduce(self._tr_loss.clone(), reduction="mean")
        return {
            "step": self.state.global_step,
            "loss": float(total),
            "last_logged": self._globalstep_last_logged,
            "settings": self.settings_id,
            "settings_began": self.settings_began,
            "groups": group_names(self.optimizer),
        }

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Go on with the running loss of the checkpoint."""
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The saved moments; where settings were changed on purpose, rates and decays are this run's.

        Raises:
            ConfigError: the checkpoint's optimizer has other groups.
        """
        optimizer = self.optimizer
        if checkpoint is not None:
            load_own(self.objectives, Path(checkpoint))
        own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        names = group_names(optimizer)
        try:
            with contextlib.nullcontext() if self.offload is None else self.offload.loading():
                super()._load_optimizer_and_scheduler(checkpoint)
            if self.offload is not None:
                self.offload.adopt_state(optimizer)
        except ValueError as error:  # torch counts tensors where names alone would pass
            raise other_groups(checkpoint, str(error), names) from None
        if group_names(optimizer) != names:
            raise other_groups(checkpoint, group_names(optimizer), names)
        if self._settings_changed:
            for group, fresh in zip(optimizer.param_groups, own, strict=True):
                group.update(fresh)
            self._retime_schedule([group.get("initial_lr", group["lr"]) for group in own])

    def _retime_schedule(self, peaks: list[float]) -> None:
        """The schedule of this run's own rates, at the step of the checkpoint."""
        schedule = self.lr_scheduler
        schedule.base_lrs = peaks
        rates = [peak * shape(schedule.last_epoch) for peak, shape in zip(peaks, schedule.lr_lambdas, strict=True)]
        for group, rate, peak in zip(self.optimizer.param_groups, rates, peaks, strict=True):
            group["lr"], group["initial_lr"] = rate, peak
        schedule._last_lr = rates

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights through `from_pretrained`, or a sharded model the Trainer's way."""
        self._load_weights(resume_from_checkpoint) or super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As `_load_from_checkpoint`, for the best checkpoint."""
        self._load_weights(self.state.best_model_checkpoint) or super()._load_best_model()

    def _load_weights(self, checkpoint: str | None) -> bool:
        """Load weights through `from_pretrained`; False for sharded models, which are the Trainer's business."""
        base = self.accelerator.unwrap_model(self.model)
        if checkpoint is None or not isinstance(base, PreTrainedModel) or self.is_fsdp_enabled:
            return False
        if self.offload is not None:
            self.offload.fill(base, Path(checkpoint))
            return True
        dtype = next(base.parameters()).dtype
        saved, report = type(base).from_pretrained(
            checkpoint, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        require_whole(f"checkpoint {checkpoint}", report, self.model)
        base.load_state_dict(saved.state_dict(), strict=True)
        return True


class _RestoreProgress(TrainerCallback):
    """Hands the checkpoint's running sums back once the Trainer has reset its own."""

    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore, unless this is a fresh start or a change of settings."""
        check_attributes(self._trainer)
        if self._trainer._saved_progress and not self._trainer._settings_changed:
            self._trainer.restore_progress(self._trainer._saved_progress)


def group_names(optimizer: Any) -> list[str]:
    """Names of an optimizer's groups, in order."""
    return [str(group.get("name")) for group in optimizer.param_groups]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
