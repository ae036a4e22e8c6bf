"""What every stage of a run is.

The one idea: a stage is a folder and what it is made from, which holds the hashes of the stages before it; the pipeline
knows nothing else, so it finds stages done, continues and orders them without knowing any by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from limbeck.config import Recipe
from limbeck.data.tokenizer import recipe_tokenizer
from limbeck.errors import ConfigError
from limbeck.folders import StageFolder

if TYPE_CHECKING:
    from limbeck.teachers.sources import TeacherSource


class Stage(ABC):
    """One stage of a run.

    Attributes:
        command: the command that makes it alone, for messages.
        shared: all ranks of a torchrun make it together; other stages are rank 0's.
        scores_held_out: it needs held-out rows.
        label: how the table of scores calls the model that it makes; "" where it makes none.
        recipe: what it is a stage of.
        name: as printed and in `--json`.
        path: the folder it writes.
        after: names of the stages it reads.
        backup: where its folder goes when it was made from other inputs; None for a folder the user named,
            which is refused instead.
    """

    command: ClassVar[str] = "run"
    shared: ClassVar[bool] = False
    scores_held_out: ClassVar[bool] = False
    label: str = ""

    def __init__(
        self, recipe: Recipe, name: str, path: Path, *, after: Sequence[str] = (), named: Path | None = None
    ) -> None:
        self.recipe, self.name, self.path, self.after = recipe, name, path, tuple(after)
        self.backup = recipe.root / "previous" if named is None else None

    @classmethod
    @abstractmethod
    def of(cls, recipe: Recipe, before: "Sequence[Stage]") -> "list[Stage]":
        """What of this stage a recipe asks for; `before` are the stages of the kinds before it."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Everything its result depends on; asked for once, when the stages before it are done."""

    @abstractmethod
    def make(self, folder: StageFolder, *, force: bool) -> object:
        """Make or continue it; with `force` start over. Ends with the folder's manifest."""

    @cached_property
    def folder(self) -> StageFolder:
        """Its folder with its inputs."""
        return StageFolder(self.path, self.command, self.inputs(), self.backup)

    def anew(self) -> StageFolder:
        """The folder when its result is made again whatever is there."""
        return self.folder

    @property
    def keeps_recipe(self) -> bool:
        """True when the run's folder keeps the recipe that this stage was begun with."""
        return False

    @property
    def again(self) -> bool:
        """True when the user asks for it although it is done."""
        return False

    def check(self) -> None:  # noqa: B027 (most have nothing to check)
        """Refuse at once what would be refused after hours of the stages before it."""

    def needs(self) -> str:
        """What it takes in and what it will take, for `--dry-run`."""
        return ""

    def replaces(self, folder: StageFolder) -> str:
        """Why what was made before no longer holds, for whoever sees it made again.

        Raises:
            LimbeckError: it may not be replaced.
        """
        return f"changed since {self.path} was made: {folder.differences()}"

    def kept_where(self, folder: StageFolder) -> str:
        """Where the earlier result goes, once another one begins."""
        return "" if folder.backup is None else f". The earlier one is kept in {folder.place_in_backup()}"

    def hint(self) -> str | None:
        """A way to spare the work that begins, if there is one."""
        return None

    def made(self, later: "Sequence[Stage]") -> None:  # noqa: B027
        """Look at the result before the stages that follow begin."""

    @property
    def model_folder(self) -> Path:
        """Where the model of `label` lies."""
        return self.path

    def weights(self) -> dict[str, str]:
        """Checksums of that model's files, once it is made."""
        return {}

    def read(self) -> dict[str, Any]:
        """What of the result the run's report shows, by key."""
        return {}

    def text(self, found: dict[str, Any]) -> str | None:
        """The same for a person; `found` is what `read` gave."""
        return None


def check_source(recipe: Recipe, source: "TeacherSource") -> None:
    """Find out whether a recipe's teacher can be had.

    Raises:
        ConfigError: the run trains a tokenizer of its own, which a local teacher cannot have.
    """
    own = recipe.tokenizer.train_vocab_size
    if own is None:
        source.check(recipe_tokenizer(recipe))
    elif recipe.teacher.model is not None and not recipe.teacher.is_remote:
        raise ConfigError(
            f"tokenizer.train_vocab_size is {own} and the teacher {recipe.teacher.model} has a tokenizer already, "
            "whose ids its targets are. Leave train_vocab_size out, or train without a teacher (--pretrain-ce-only)."
        )
