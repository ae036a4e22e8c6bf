"""What an endpoint is to a run: part of the inputs from which caches and weights are made.

The one idea: a fingerprint where the server tells one, else its signature, kept in the run's folder and compared
within tolerance. Where the server listens is no part of it, and finished work is found done when it is gone.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from limbeck.config.teacher import RemoteTeacherConfig
from limbeck.console import say, warn
from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.errors import ConfigError, MismatchError
from limbeck.folders import StageFolder
from limbeck.storage import read_json, write_json
from limbeck.teachers.discovery import Discovery, discover
from limbeck.teachers.http import EndpointError, TeacherClient
from limbeck.teachers.keys import environment_key
from limbeck.teachers.protocols.base import EndpointInfo, Signature
from limbeck.teachers.signature import from_record, same_signature, to_record

_MEMORY = "endpoints.json"
#: What is known of endpoints in this process, by the run's folder, and by endpoint and tokenizer.
_FOUND: dict[tuple[str, ...], Discovery] = {}
#: Who answered, and who is remembered where nobody did.
_ANSWERED: dict[tuple[str, ...], dict[str, Any]] = {}
_REMEMBERED: dict[tuple[str, ...], dict[str, Any]] = {}
#: Not empty while nothing is to be written (`nothing_written`).
_LOOKING: list[bool] = []


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
        """Who answers at the endpoint, and the vocabulary its targets will have; who did, where nobody answers now.

        Raises:
            UnreachableError: nobody answers, and nobody has before in this run's folder.
        """
        place = (str(self._path), self._key)
        held = _ANSWERED.get(place) or _REMEMBERED.get(place)
        if held is None:
            known = _read(self._path)["endpoints"].get(self._key)
            try:
                # One that was there before may be gone for good, and finished work needs it no more: little patience.
                found = self.discovery(tokenizer, **({"retries": 2} if known else {}))
            except (EndpointError, ConfigError) as error:
                if known is None:
                    raise
                url = self.section.endpoint[0]
                say(f"{url} cannot be asked; what is finished with it is used ({str(error)[:100]} …)")
                _REMEMBERED[place] = held = dict(known)
            else:
                held = self._record(found)
        return {**held, "vocab_size": held["vocab_size"] or self.section.vocab_size or tokenizer.vocab_size}

    def confirmed(self, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        """The identity of the endpoint that has just answered, which must be who is remembered, if anybody is.

        Raises:
            MismatchError: another model answers than the one that this process has taken it for.
        """
        place = (str(self._path), self._key)
        found = _ANSWERED.get(place) or self._record(self.discovery(tokenizer))
        if place in _REMEMBERED and _REMEMBERED[place] != found:
            raise MismatchError(
                f"{self.section.endpoint[0]} serves another model than when this run last asked it. Start the first "
                "one again and continue, or run the same command again for what the new one makes."
            )
        return self.identity(tokenizer)

    def is_available(self, tokenizer: LoadedTokenizer) -> bool:
        """True when the endpoint answers now; says why not. It is not waited for long."""
        try:
            self.discovery(tokenizer, retries=2)
            client = TeacherClient(self.section.endpoint[:1], **{**connection(self.section), "retries": 2})
            try:
                client.run(client.ask(client.endpoints[0], "/health"))
            finally:
                client.close()
        except (EndpointError, ConfigError) as error:
            url = self.section.endpoint[0]
            warn(f"the teacher at {url} is not there, and what compares with it is left out ({error})")
            return False
        return True

    def _record(self, found: Discovery) -> dict[str, Any]:
        """Keep who answered, in this process and in the run's folder."""
        if _LOOKING:
            return _identity(found.info, found.signature, _read(self._path)["signatures"] + self._recorded())
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{_MEMORY}.lock"):  # ranks ask at once, and must agree on a name
            held = _read(self._path)
            identity = _identity(found.info, found.signature, held["signatures"] + self._recorded())
            if "signature" in identity and identity["signature"] not in held["signatures"]:
                held["signatures"].append(identity["signature"])
            held["endpoints"][self._key] = identity
            write_json(self._path, held)
        _ANSWERED[str(self._path), self._key] = identity
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


@contextlib.contextmanager
def nothing_written() -> Iterator[None]:
    """Who answers is asked and not remembered: for who only wants to know what would be done."""
    _LOOKING.append(True)
    try:
        yield
    finally:
        _LOOKING.pop()


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
