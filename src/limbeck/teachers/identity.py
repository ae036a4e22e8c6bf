"""What an endpoint is to a run: part of the inputs from which caches and weights are made.

The one idea: a fingerprint where the server tells one, else its signature, kept in the run's folder and compared
within tolerance. Where the server listens is no part of it, and finished work is found done when it is gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from limbeck.config.teacher import RemoteTeacherConfig
from limbeck.console import say
from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.errors import ConfigError
from limbeck.folders import StageFolder
from limbeck.storage import read_json, write_json
from limbeck.teachers.discovery import Discovery, discover
from limbeck.teachers.http import RefusedError, TeacherClient, UnreachableError
from limbeck.teachers.keys import environment_key
from limbeck.teachers.protocols.base import EndpointInfo, Signature
from limbeck.teachers.signature import from_record, same_signature, to_record

_MEMORY = "endpoints.json"
#: What is known of endpoints in this process, by the run's folder, and by endpoint and tokenizer.
_FOUND: dict[tuple[str, ...], Discovery] = {}
_KNOWN: dict[tuple[str, ...], dict[str, Any]] = {}


def connection(section: RemoteTeacherConfig) -> dict[str, Any]:
    """Arguments of `TeacherClient` that the section gives."""
    return {
        "api_key": environment_key(section.api_key_env, "teacher.api_key_env"),
        "timeout": section.timeout,
        "retries": section.retries,
        "max_concurrent": section.max_concurrent,
    }


@dataclass(frozen=True)
class EndpointMemory:
    """What one run knows of its endpoint.

    Attributes:
        section: where it is and how it is asked.
        folder: of the run; `endpoints.json` in it outlives the server.
        made: folders of the run that may have been brought from elsewhere, with targets of a teacher they name.
    """

    section: RemoteTeacherConfig
    folder: Path
    made: Sequence[Path] = ()

    @property
    def _path(self) -> Path:
        return self.folder / _MEMORY

    @property
    def _key(self) -> str:
        section = self.section
        return " ".join([section.endpoint[0], section.protocol, section.served_model or ""]).strip()

    def was_asked(self) -> bool:
        """True when the endpoint has answered before in this run's folder."""
        return self._key in _read(self._path)["endpoints"]

    def discovery(self, tokenizer: LoadedTokenizer, **changes: Any) -> Discovery:
        """What the endpoint is; found out once in a process.

        Raises:
            UnreachableError, RefusedError: as `discover`.
        """
        key = (str(self._path), self._key, tokenizer.hash)
        if key not in _FOUND:
            section = self.section
            client = TeacherClient(section.endpoint[:1], **{**connection(section), **changes})
            try:
                _FOUND[key] = discover(client, section.protocol, tokenizer, section.served_model)
            finally:
                client.close()
        return _FOUND[key]

    def identity(self, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        """Who answers at the endpoint, and the vocabulary its targets will have.

        Raises:
            UnreachableError: nobody answers, and nobody has before in this run's folder.
        """
        place = (str(self._path), self._key)
        identity = _KNOWN.get(place) or self._asked(tokenizer)
        _KNOWN[place] = identity
        size = identity["vocab_size"] or self.section.vocab_size or tokenizer.vocab_size
        return {**identity, "vocab_size": size}

    def _asked(self, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        known = _read(self._path)["endpoints"].get(self._key)
        try:
            # One that was there before may be gone for good, and what is finished needs it no more: little patience.
            found = self.discovery(tokenizer, **({"retries": 2} if known else {}))
        except (UnreachableError, RefusedError, ConfigError) as error:
            if known is None:
                raise
            url = self.section.endpoint[0]
            say(f"{url} cannot be asked; what is finished with it is used ({str(error)[:100]} …)")
            return dict(known)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{_MEMORY}.lock"):  # ranks ask at once, and must agree on a name
            held = _read(self._path)
            identity = _identity(found.info, found.signature, held["signatures"] + self._recorded())
            if "signature" in identity and identity["signature"] not in held["signatures"]:
                held["signatures"].append(identity["signature"])
            held["endpoints"][self._key] = identity
            write_json(self._path, held)
        return identity

    def _recorded(self) -> list[dict[str, Any]]:
        """Signatures by which the run's cache and student, perhaps brought from elsewhere, know their teacher."""
        found = []
        for folder in self.made:
            teacher = StageFolder(folder, "run", {}).recorded_inputs().get("teacher")
            who = teacher.get("teacher", teacher) if isinstance(teacher, dict) else None
            if isinstance(who, dict) and isinstance(who.get("signature"), dict):
                found.append(who["signature"])
        return found


def _read(memory: Path) -> dict[str, Any]:
    return {"endpoints": {}, "signatures": [], **(read_json(memory) if memory.is_file() else {})}


def _identity(info: EndpointInfo, signature: Signature | None, known: list[dict[str, Any]]) -> dict[str, Any]:
    """The fingerprint, or the signature that is already known and alike, or the new one."""
    told: dict[str, Any] = {"protocol": info.protocol, "vocab_size": info.vocab_size}
    if signature is None:
        return {**told, "weights": info.fingerprint}
    told["model"] = info.model
    alike = (r for r in known if r["protocol"] == info.protocol and same_signature(from_record(r), signature))
    return {**told, "signature": next(alike, to_record(info.protocol, signature))}
