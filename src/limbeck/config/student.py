"""Sections about the student: its architecture and what of it is ternary."""

import copy
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from limbeck.config.base import Count, ModelSource, Section, merged
from limbeck.config.presets import PRESETS
from limbeck.registry import STUDENTS, OneOf


class TernaryConfig(Section):
    """Which weights of the student are ternary in use, and how."""

    preset: Literal["linears", "experts", "none"] = Field(
        "linears", description="`linears`: all matrices between hidden states; `experts`: those of routed experts."
    )
    patterns: list[str] = Field(default_factory=list, description="Regular expressions of further weights.")
    exclude: list[str] = Field(
        default_factory=list, description="Regular expressions of weights that stay as they are."
    )
    group_size: PositiveInt | Literal["row", "tensor"] = Field(
        128, description="Inputs that share a scale. 256 exports to TQ2_0 exactly, 128 to Q2_0 and Q4_0."
    )
    scale: Literal["absmean", "absmax"] = Field("absmean", description="What a group's scale is of its weights.")
    activation_bits: Literal[8] | None = Field(8, description="int8 activations per token; null leaves them.")
    warmup_steps: Count = Field(
        0, description="Steps in which weights go from themselves to their ternary form; 0: ternary from the start."
    )


class MHCConfig(Section):
    """mHC-lite: several residual streams, mixed by exactly doubly stochastic matrices (arXiv 2601.05732)."""

    streams: Annotated[int, Field(ge=1, le=4)] = Field(2, description="Residual streams.")
    form: Literal["dynamic", "static"] = Field(
        "dynamic", description="`dynamic`: mixing depends on the token; `static`: on trained biases alone."
    )


def _known_preset(name: str) -> str:
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f". Did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}{hint}")
    return name


class StudentConfig(Section):
    """The model that is trained: pretrained, or built from a config."""

    preset: Annotated[str, AfterValidator(_known_preset), Field(json_schema_extra={"enum": list(PRESETS)})] | None = (
        Field(None, description="A student by name; every other key of this section is laid over its own.")
    )
    model: str | None = Field(None, description="Folder or hub id of pretrained weights to start from.")
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run the model repository's own Python code.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="A transformers config (with `model_type`) for a new model; over pretrained ones, keys to change.",
    )
    builder: Annotated[str, OneOf(STUDENTS)] | None = Field(
        None, description="What makes the model of `config`; default transformers."
    )
    ternary: TernaryConfig | None = Field(None, description="Ternary weights; default none.")
    mhc: MHCConfig | None = Field(
        None, description="mHC-lite residual streams; a pretrained model computes at first what it did without them."
    )

    @model_validator(mode="before")
    @classmethod
    def _over_the_preset(cls, given: Any) -> Any:
        name = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return given
        if given.get("model") is not None:
            raise ValueError(
                f"student.preset is {name} and student.model is {given['model']}; a preset describes a new model, so "
                "give one of the two"
            )
        return merged(copy.deepcopy(PRESETS[name]), given)

    @property
    def source(self) -> ModelSource | None:
        """The pretrained weights; None for a new model."""
        return None if self.model is None else ModelSource(self.model, self.revision, self.trust_remote_code)

    @model_validator(mode="after")
    def _has_architecture(self) -> "StudentConfig":
        if self.model is None and self.builder is None and self.config and "model_type" not in self.config:
            raise ValueError("student.config needs `model_type` (say llama or qwen3) when student.model is not set")
        return self
