"""The recipe: every key limbeck knows, its type, its default and what it does.

The one idea: this package is the only place a key is defined. The YAML reader, the command-line flags, the
JSON schema and the help text are all derived from these models; an unknown key is an error, never ignored.
"""

from limbeck.config.base import Section
from limbeck.config.data import (
    DatasetConfig,
    SamplingConfig,
    StudentConfig,
    TeacherConfig,
    TernaryConfig,
    TokenizerConfig,
)
from limbeck.config.recipe import EvaluationConfig, ExportConfig, GenerationConfig, PipelineConfig, Recipe
from limbeck.config.training import (
    LossConfig,
    LRMultiplier,
    OptimizerConfig,
    SaddleConfig,
    Stage,
    StagesConfig,
    TrainingConfig,
)

__all__ = [
    "DatasetConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GenerationConfig",
    "LRMultiplier",
    "LossConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "Recipe",
    "SaddleConfig",
    "SamplingConfig",
    "Section",
    "Stage",
    "StagesConfig",
    "StudentConfig",
    "TeacherConfig",
    "TernaryConfig",
    "TokenizerConfig",
    "TrainingConfig",
]
