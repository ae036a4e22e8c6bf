"""The private names of `transformers.Trainer` that limbeck overrides or calls, and a check that they are as known.

The one idea: a Trainer of another version that has renamed one would train and save in its own way without a word; so
the names and their parameters stand here once, and a trainer refuses to be built when one has changed.
"""

import inspect
from typing import Any

from limbeck.errors import LimbeckError

#: Method -> the parameters by which it is called or overridden here.
METHODS: dict[str, tuple[str, ...]] = {
    # overridden: what a checkpoint is, when it is written, and how it is read
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "_init_training_state": (),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    # overridden: the last moment before a step, and an epoch that has nothing left to do
    "_get_grad_norm": ("model", "grad_norm"),
    "_run_epoch": (),
    # called: the pieces of a checkpoint, and a batch on its device
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_scaler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    "_prepare_inputs": ("inputs",),
    "compute_loss_context_manager": (),
}
#: Attributes of a trainer in training: the running loss, and the step of the last log line.
ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")


def check_trainer(trainer: type) -> None:
    """Refuse a Trainer whose private methods are not as known.

    Raises:
        LimbeckError: names the first that differs, and the versions.
    """
    for name, parameters in METHODS.items():
        method = getattr(trainer, name, None)
        known = list(inspect.signature(method).parameters) if method is not None else None
        if known is None or any(parameter not in known for parameter in parameters):
            _refuse_version(f"Trainer.{name}({', '.join(parameters)})")


def check_attributes(trainer: Any) -> None:
    """The same of what a trainer in training holds.

    Raises:
        LimbeckError: one is missing.
    """
    for name in ATTRIBUTES:
        if not hasattr(trainer, name):
            _refuse_version(f"an attribute {name} of a Trainer in training")


def _refuse_version(what: str) -> None:
    import transformers

    raise LimbeckError(
        f"transformers {transformers.__version__} has no {what}, on which checkpoints and resuming rely. Install the "
        "version that constraints.txt names."
    )
