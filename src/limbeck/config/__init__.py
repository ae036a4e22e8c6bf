"""The recipe: every key limbeck knows, its type, its default and what it does.

The one idea: this package is the only place a key is defined. The YAML reader, the command-line flags, the
JSON schema and the help text are all derived from these models; an unknown key is an error, never ignored.
"""

from limbeck.config.base import ModelSource
from limbeck.config.data import DatasetConfig
from limbeck.config.recipe import Recipe
from limbeck.config.student import MHCConfig, StudentConfig, TernaryConfig
from limbeck.config.teacher import SamplingConfig, TeacherConfig
from limbeck.config.training import LossConfig, LRMultiplier, OptimizerConfig, SaddleConfig

__all__ = [
    "DatasetConfig",
    "LRMultiplier",
    "LossConfig",
    "MHCConfig",
    "ModelSource",
    "OptimizerConfig",
    "Recipe",
    "SaddleConfig",
    "SamplingConfig",
    "StudentConfig",
    "TeacherConfig",
    "TernaryConfig",
]
