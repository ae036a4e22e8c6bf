"""What an endpoint is to a run: part of the inputs from which caches and weights are made.

The one idea: a fingerprint where the server tells one, else its signature, kept in the run's folder and compared
within tolerance. Where the server listens is no part of it, and finished work is found done when it is gone.
"""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from limbeck.config import Recipe
from limbeck.console import say
from limbeck.data.tokenizer import LoadedTokenizer, recipe_tokenizer
from limbeck.errors import ConfigError
from limbeck.folders import StageFolder
from limbeck.storage import read_json, write_json
from limbeck.teachers.http import RefusedError, TeacherClient, UnreachableError
from limbeck.teachers.protocols.base import Ask, Facts, Session, Signature
from limbeck.teachers.remote import find_facts
from limbeck.teachers.signature import from_record, same_signature, signature_of, to_record

_MEMORY = "endpoints.json"
#: What endpoints said in this process: a run asks several times, and `RemoteTeacher` watches for a change itself.
_ASKED: dict[tuple[str, str], dict[str, Any]] = {}


def environment_key(name: str | None, key: str) -> str | None:
    """The value of an environment variable that holds a key for HTTP.

    Raises:
        ConfigError: the variable is not set, or holds what no header can; its value is never shown.
    """
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{key} names {name}, and that variable is not set. Set it to the key, or unset {key}.")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(
            f"{key} names {name}, whose value is no key: it has spaces, line ends or characters beyond ASCII."
        )
    return value


def connection(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `TeacherClient` that the recipe gives."""
    section = recipe.teacher
    return {
        "api_key": environment_key(section.api_key_env, "teacher.api_key_env"),
        "timeout": section.timeout,
        "retries": section.retries,
        "max_concurrent": section.max_concurrent,
    }


def remote_identity(recipe: Recipe) -> dict[str, Any]:
    """Who answers at the recipe's endpoint, and the vocabulary its targets will have.

    Raises:
        UnreachableError: nobody answers, and nobody has before in this run's folder.
    """
    section, memory, key = recipe.teacher, recipe.root / _MEMORY, _key(recipe)
    tokenizer = recipe_tokenizer(recipe)
    identity = _ASKED.get((str(memory), key))
    if identity is None:
        known = _read(memory)["endpoints"].get(key)
        try:
            # One that was there before may be gone for good, and what is finished needs it no more: little patience.
            facts, signature = _ask(recipe, tokenizer, {"retries": 2} if known else {})
        except (UnreachableError, RefusedError, ConfigError) as error:
            if known is None:
                raise
            identity = dict(known)
            say(f"{section.endpoint[0]} cannot be asked; what is finished with it is used ({str(error)[:100]} …)")
        else:
            recipe.root.mkdir(parents=True, exist_ok=True)
            with FileLock(recipe.root / f".{_MEMORY}.lock"):  # ranks ask at once, and must agree on a name
                held = _read(memory)
                identity = _identity(facts, signature, held["portraits"] + _recorded(recipe))
                if "portrait" in identity and identity["portrait"] not in held["portraits"]:
                    held["portraits"].append(identity["portrait"])
                held["endpoints"][key] = identity
                write_json(memory, held)
        _ASKED[str(memory), key] = identity
    size = identity["vocab_size"] or section.vocab_size or tokenizer.vocab_size
    return {**identity, "vocab_size": size}


def _read(memory: Path) -> dict[str, Any]:
    return dict(read_json(memory)) if memory.is_file() else {"endpoints": {}, "portraits": []}


def _recorded(recipe: Recipe) -> list[dict[str, Any]]:
    """Signatures by which the recipe's cache and student, perhaps brought from elsewhere, know their teacher."""
    found = []
    for folder in (recipe.cache_dir, recipe.student_dir):
        teacher = StageFolder(folder, "run", {}).recorded_inputs().get("teacher")
        who = teacher.get("teacher", teacher) if isinstance(teacher, dict) else None
        if isinstance(who, dict) and isinstance(who.get("portrait"), dict):
            found.append(who["portrait"])
    return found


def was_asked(recipe: Recipe) -> bool:
    """True when the recipe's endpoint has answered before in this run's folder."""
    return _key(recipe) in _read(recipe.root / _MEMORY)["endpoints"]


def _key(recipe: Recipe) -> str:
    section = recipe.teacher
    return " ".join([section.endpoint[0], section.protocol, section.served_model or ""]).strip()


def _ask(recipe: Recipe, tokenizer: LoadedTokenizer, changes: dict[str, Any]) -> tuple[Facts, Signature | None]:
    section = recipe.teacher
    client = TeacherClient(section.endpoint[:1], **{**connection(recipe), **changes})
    try:
        spoken, facts = client.run(find_facts(client, section.protocol, tokenizer, section.served_model))
        session = Session(client, client.endpoints[0], facts.model)
        ask = Ask(top_k=4, temperatures=(1.0,), vocab_size=facts.vocab_size or 1 << 24, model=facts.model)
        return facts, client.run(signature_of(spoken, session, ask, facts))
    finally:
        client.close()


def _identity(facts: Facts, signature: Signature | None, known: list[dict[str, Any]]) -> dict[str, Any]:
    """The fingerprint, or the signature that is already known and alike, or the new one."""
    told: dict[str, Any] = {"protocol": facts.protocol, "vocab_size": facts.vocab_size}
    if signature is None:
        return {**told, "weights": facts.fingerprint}
    told["model"] = facts.model
    alike = (r for r in known if r["protocol"] == facts.protocol and same_signature(from_record(r), signature))
    return {**told, "portrait": next(alike, to_record(facts.protocol, signature))}
