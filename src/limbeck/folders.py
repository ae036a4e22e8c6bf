"""Folders that a stage owns: what they are made from, whether they are finished, and what replaces them.

The one idea: a folder limbeck writes is complete exactly when it holds `manifest.json`, and that file is
written last and atomically. `inputs.json` is written first and says what the folder is being made from;
so a folder with inputs but no manifest is unfinished work that the same inputs may continue. A folder made from other
inputs is moved to a backup folder, and moved back when its inputs are wanted again.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from limbeck.errors import CorruptError, IncompleteError, LimbeckError, MismatchError
from limbeck.storage import canonical_json, fingerprint, folder_lock, read_json, remove_leftovers, write_json

MANIFEST = "manifest.json"
INPUTS = "inputs.json"
#: A run's recipe as its user wrote it, flags included: what the folder of a run stands for on the command line.
RECIPE = "recipe.yaml"
#: Key of `inputs.json` for the checkpoint of another run or mode that a training started from.
STARTED = "started_from"
SCHEMA_VERSION = 1


class Manifest(BaseModel):
    """What a complete folder says of itself; a kind of folder is a subclass with a `kind` and its own fields.

    Attributes:
        command: the command that makes such folders.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: ClassVar[str] = "run"

    schema_version: int = SCHEMA_VERSION
    kind: str
    fingerprint: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a complete folder of this kind.

        Raises:
            IncompleteError: the folder is absent or has no manifest; the message names the command to run.
            MismatchError: it is of another kind.
            CorruptError: it was written by another schema version, is not JSON, or lacks something.
        """
        path, again = folder / MANIFEST, f"Make the folder again with `limbeck {cls.command}`."
        if not path.exists():
            what = "is unfinished" if folder.exists() else "does not exist"
            raise IncompleteError(
                f"{folder} {what} (no {MANIFEST}). Run `limbeck {cls.command}` to make or continue it."
            )
        found = read_json(path)
        if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
            version = found.get("schema_version") if isinstance(found, dict) else None
            raise CorruptError(f"{path} has schema version {version}, this limbeck reads {SCHEMA_VERSION}. {again}")
        wanted = cls.model_fields["kind"].default
        if found.get("kind") != wanted:
            raise MismatchError(
                f"{folder} holds {found.get('kind')!r} and {wanted!r} is wanted. Name the folder that "
                f"`limbeck {cls.command}` wrote."
            )
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise CorruptError(f"{path} is damaged: {where}: {problem['msg']}. {again}") from None

    def write(self, folder: Path) -> Self:
        """Mark `folder` complete. Call it after every other file is in place."""
        write_json(folder / MANIFEST, self.model_dump(mode="json"))
        return self


@dataclass(frozen=True)
class StageFolder:
    """A folder owned by one stage, and what it is made from.

    Attributes:
        path: where it is.
        command: the command that makes it, for messages.
        inputs: everything its content depends on.
        backup: where `begin` moves a folder made from other inputs; None refuses it.
    """

    path: Path
    command: str
    inputs: dict[str, Any]
    backup: Path | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of everything the folder's content depends on."""
        return fingerprint(self.inputs)

    def recorded(self) -> str | None:
        """Fingerprint of the inputs the folder was begun with, or None for a new folder."""
        path = self.path / INPUTS
        return str(read_json(path)["fingerprint"]) if path.exists() else None

    def recorded_inputs(self) -> dict[str, Any]:
        """The inputs the folder was begun with; none for a new folder."""
        path = self.path / INPUTS
        return dict(read_json(path)["inputs"]) if path.exists() else {}

    def record(self, **more: Any) -> None:
        """Write down what the folder is made from, and whatever its stage adds to that."""
        write_json(self.path / INPUTS, {"fingerprint": self.fingerprint, "inputs": self.inputs, **more})

    def is_done(self) -> bool:
        """True when the folder is complete and made from exactly these inputs."""
        return (self.path / MANIFEST).exists() and self.recorded() == self.fingerprint

    def is_kept(self) -> bool:
        """True when it is done, or a finished result of these inputs is in the backup folder."""
        earlier = self._in_backup()
        return self.is_done() or (earlier is not None and earlier.is_done())

    def found_done(self) -> bool:
        """True when it is done; an earlier result of these very inputs, finished or not, is put back for that."""
        if self.recorded() != self.fingerprint and (earlier := self._in_backup()) is not None:
            if self.path.exists():
                self.set_aside()
            earlier.path.rename(self.path)
        return self.is_done()

    def differences(self, most: int = 4) -> str:
        """The first inputs that differ from the recorded ones, as `key: recorded -> wanted`."""
        return differences(self.recorded_inputs(), json.loads(canonical_json(self.inputs)), most)

    def begin(self, *, clean: bool = True, replace: bool = False) -> None:
        """Create the folder and record its inputs; continuing the same inputs changes nothing.

        `replace` starts over even from the same inputs: what is there goes to the backup folder, or without one is
        deleted.

        `clean` deletes a killed writer's temporary files; not while other ranks may be writing theirs.

        Raises:
            LimbeckError: the folder was begun with other inputs (names what differs), or holds files
                that limbeck did not write.
        """
        recorded = self.recorded()
        if recorded is not None and self.backup is not None and (replace or recorded != self.fingerprint):
            self.set_aside()
            recorded = None
        elif recorded is not None and replace:
            self.clear()
            recorded = None
        if recorded is None:
            self.refuse_foreign_files()
            self.path.mkdir(parents=True, exist_ok=True)
            self.record()
        elif recorded != self.fingerprint:
            raise LimbeckError(
                f"{self.path} was made from other inputs ({self.differences()}). "
                "Use another output folder, or --force to replace it."
            )
        if clean:
            remove_leftovers(self.path)

    def refuse_foreign_files(self) -> None:
        """Refuse a folder that holds files and no record of ours: it is somebody else's."""
        if self.recorded() is not None or not self.path.exists():
            return
        foreign = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if foreign:
            raise LimbeckError(
                f"{self.path} is not empty and was not written by `limbeck {self.command}` "
                f"(it holds {foreign[0]}). Choose another folder."
            )

    @contextmanager
    def lock(self, name: str = ".lock") -> Iterator[None]:
        """`folder_lock` of this folder, unless it is somebody else's."""
        self.refuse_foreign_files()
        with folder_lock(self.path, name):
            yield

    def clear(self) -> None:
        """Empty a folder limbeck wrote, keeping its lock; a folder it did not write is left alone.

        The manifest goes first and the record of the inputs last, so that a kill in between leaves an
        unfinished folder that still says what it was.
        """
        if self.recorded() is None:
            return
        (self.path / MANIFEST).unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name in (".lock", INPUTS):
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        (self.path / INPUTS).unlink()

    def set_aside(self) -> None:
        """Move the folder away, named by what it was made from: a changed key never deletes a result."""
        place = self.place_in_backup()
        place.parent.mkdir(parents=True, exist_ok=True)
        self.path.rename(place)

    def place_in_backup(self) -> Path:
        """Where the folder goes when another one takes its place."""
        assert self.backup is not None
        name = f"{self.path.name}-{str(self.recorded())[:12]}"
        held = self.backup.iterdir() if self.backup.is_dir() else ()
        taken = sum(1 for path in held if path.name == name or path.name.startswith(f"{name}."))
        return self.backup / (f"{name}.{taken}" if taken else name)

    def _in_backup(self) -> "StageFolder | None":
        """The folder of these very inputs, finished or not, that an earlier `begin` moved away."""
        if self.backup is None:
            return None
        found = StageFolder(self.backup / f"{self.path.name}-{self.fingerprint[:12]}", self.command, self.inputs)
        return found if found.recorded() == self.fingerprint else None


def differences(old: Any, new: Any, most: int = 4) -> str:
    """The first dotted keys in which two trees of JSON differ, as `key: old -> new`."""
    found = list(_differing(old, new, ""))
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(f"{key}: {_short(before)} -> {_short(after)}" for key, before, after in found[:most]) + more


def _differing(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differing(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 80 else text[:60] + f"…({len(text)} characters)"
