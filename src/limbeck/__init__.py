"""limbeck distils large language models into small ones that run anywhere.

The public names are imported on first use, so that `import limbeck` (and with it `limbeck --help`)
does not pay for torch and transformers.
"""

from typing import TYPE_CHECKING

from limbeck.lazy import lazy_names
from limbeck.registration import register

if TYPE_CHECKING:
    from limbeck.losses.fused import fused_distillation_loss
    from limbeck.targets.sparse import SparseTargets
    from limbeck.teachers.cached import TeacherCache
    from limbeck.teachers.local import LocalTeacher
    from limbeck.teachers.remote import RemoteTeacher
    from limbeck.training.arguments import DistillationArguments
    from limbeck.training.trainer import DistillationTrainer

__version__ = "0.1.0"

register()  # transformers then loads our ternary checkpoints

_EXPORTS = {
    "SparseTargets": "limbeck.targets.sparse",
    "fused_distillation_loss": "limbeck.losses.fused",
    "TeacherCache": "limbeck.teachers.cached",
    "LocalTeacher": "limbeck.teachers.local",
    "RemoteTeacher": "limbeck.teachers.remote",
    "DistillationArguments": "limbeck.training.arguments",
    "DistillationTrainer": "limbeck.training.trainer",
}

__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "LocalTeacher",
    "RemoteTeacher",
    "SparseTargets",
    "TeacherCache",
    "fused_distillation_loss",
]

__getattr__ = lazy_names(__name__, _EXPORTS)
