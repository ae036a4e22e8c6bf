"""What every section of a recipe is made of."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the recipe; refuses keys it does not define."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class _OrWords:
    """Annotation of a list of names: one text stands for those in it, with commas between them."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._words, handler(source))

    @staticmethod
    def _words(value: Any) -> Any:
        return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        listed = handler(schema)
        return {"anyOf": [{"type": "string"}, listed]}


#: For `Annotated[list[...], OR_WORDS]`.
OR_WORDS = _OrWords()


def default(section: type[Section], key: str) -> Any:
    """The default of a key, for functions that can be called without a recipe: it is written down once."""
    return section.model_fields[key].get_default(call_default_factory=True)


class ModelSource(NamedTuple):
    """A model or tokenizer by name.

    Attributes:
        name: a folder, a hub id, or the name of a model in the package.
        revision: commit or tag of a hub model.
        trust_remote_code: run the repository's own Python code.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


#: Keys that hold a named part: another name takes none of the former part's parameters with it.
PARTS = ("divergence",)


def merged(base: Any, over: Any, key: str = "") -> Any:
    """Nested mappings laid over one another; parameters are laid over a part that was given by its name alone."""
    if key in PARTS and isinstance(over, Mapping):
        base = {"name": base} if isinstance(base, str) else base
        if "name" in over and isinstance(base, Mapping) and over["name"] != base.get("name"):
            return over
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {name: merged(base.get(name), over[name], name) if name in over else base[name]
                for name in {**base, **over}}  # fmt: skip
    return over
