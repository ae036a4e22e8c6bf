"""Named parts that a recipe chooses among: one table a kind, and each the only list of its names.

The one idea: the rooms that hold the parts put them in with `@TABLE.register("name")`, and a table imports its rooms
the first time it is asked; so the command line starts without torch, and a file outside the package adds a part in the
same way as the package's own.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import core_schema

from limbeck.errors import ConfigError

T = TypeVar("T")


class Choice(BaseModel):
    """A part by its name, or `{name: NAME, parameter: value}`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        fields = type(self).model_fields.items()
        own = {key: getattr(self, key) for key, field in fields if getattr(self, key) != field.default}
        return own | self.parameters if own.keys() != {"name"} or self.parameters else self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """What is given beside the name."""
        return dict(self.model_extra or {})


class Registry(Generic[T]):
    """The parts of one kind, by name.

    Args:
        what: the kind, as a message calls it.
        key: the recipe key that chooses one.
        rooms: modules that register the package's own.
    """

    def __init__(self, what: str, key: str, *rooms: str) -> None:
        self.what, self.key, self._rooms = what, key, rooms
        self._parts: dict[str, T] = {}
        self._filled = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a part under `name`.

        Raises:
            ConfigError: another part has the name.
        """

        def add(part: T) -> T:
            known = self._parts.get(name)
            if known is not None and _defined_at(known) != _defined_at(part):
                raise ConfigError(
                    f"two parts register as {self.what} {name!r}: {_defined_at(known)} and {_defined_at(part)}."
                )
            self._parts[name] = part
            return part

        return add

    def get(self, name: str) -> T:
        """The part of that name.

        Raises:
            ConfigError: there is none; lists those there are.
        """
        self._fill()
        if name not in self._parts:
            near = difflib.get_close_matches(name, self._parts, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{self.key}: unknown {self.what} {name!r}; choose one of {', '.join(self._parts)}.{hint}"
            )
        return self._parts[name]

    def build(self, choice: Choice | str) -> Any:
        """The part of a choice, made with its parameters; their types are checked.

        Raises:
            ConfigError: no part has the name, or it has no such parameter, or the value does not fit.
        """
        choice = Choice.model_validate(choice) if isinstance(choice, str) else choice
        part: Any = self.get(choice.name)
        known = [field.name for field in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
        for name in choice.parameters:
            if name not in known:
                has = f"its parameters are {', '.join(known)}" if known else "it has none"
                raise ConfigError(f"{self.key}: {choice.name} has no parameter {name!r}; {has}.")
        try:
            return TypeAdapter(part).validate_python(choice.parameters)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"])) or choice.name
            reason = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{self.key}: {choice.name}.{name}: {reason} (found {problem['input']!r})") from None

    def check(self, choice: Choice | str) -> None:
        """Refuse a choice that cannot be made, without what only a run knows.

        Raises:
            ConfigError: as `build`.
        """
        name = choice if isinstance(choice, str) else choice.name
        if dataclasses.is_dataclass(self.get(name)):
            self.build(choice)

    def __iter__(self) -> Iterator[str]:
        """Names, in the order in which they were registered."""
        self._fill()
        return iter(list(self._parts))

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._parts

    def items(self) -> list[tuple[str, T]]:
        """Names and parts, in order."""
        self._fill()
        return list(self._parts.items())

    def _fill(self) -> None:
        if not self._filled:
            self._filled = True
            for room in self._rooms:
                import_module(room)


class OneOf:
    """Annotation of a recipe's field: a name, or a `Choice`, that the registry knows.

    Args:
        registry: the table of names.
        also: names beside those.
        default: the name that stands where none is given; it is not looked up, because that imports the parts.
    """

    def __init__(self, registry: Registry[Any], *also: str, default: str | None = None) -> None:
        self.registry, self._also, self._default = registry, also, default

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def names(self) -> list[str]:
        """All names, in order."""
        return [*self._also, *self.registry]

    def _known(self, value: Any) -> Any:
        try:
            if value not in self._also and not self._is_default(value):
                self.registry.check(value)
        except ConfigError as error:  # pydantic adds the key
            raise ValueError(str(error).removeprefix(f"{self.registry.key}: ")) from None
        return value

    def _is_default(self, value: Any) -> bool:
        return isinstance(value, Choice) and value.name == self._default and not value.parameters

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        names = {"type": "string", "enum": self.names()}
        if handler(schema).get("type") == "string":
            return names
        named = {"type": "object", "required": ["name"], "properties": {"name": names}}
        return {"anyOf": [names, named]}


def _defined_at(part: Any) -> str:
    """Where a part is defined: the same file imported twice registers the same part."""
    return f"{getattr(part, '__module__', '?')}.{getattr(part, '__qualname__', part)}"


DIVERGENCES: Registry[Any] = Registry("divergence", "loss.divergence", "limbeck.losses.divergences")
PROTOCOLS: Registry[Any] = Registry("protocol", "teacher.protocol", "limbeck.teachers.protocols")
STUDENTS: Registry[Any] = Registry("student builder", "student.builder", "limbeck.students.build")
SUITES: Registry[Any] = Registry("suite", "evaluation.suites", "limbeck.evaluation.suites")
ARCHITECTURES: Registry[Any] = Registry("architecture", "model_type", "limbeck.export.architectures")
STAGES: Registry[Any] = Registry("stage", "plugins", "limbeck.stages")
OBJECTIVES: Registry[Any] = Registry(
    "objective", "loss.objectives", "limbeck.losses.objectives", "limbeck.losses.halting", "limbeck.losses.router_kd"
)
