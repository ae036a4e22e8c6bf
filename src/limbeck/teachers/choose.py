"""From a recipe to a teacher: the table of what `teacher` can mean.

Add a teacher with a class that fulfils `base.Teacher` and a line in `TEACHERS`.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from limbeck import ranks
from limbeck.config import Recipe
from limbeck.console import warn
from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import LoadedTokenizer, load_tokenizer, recipe_tokenizer, require_same
from limbeck.errors import ConfigError
from limbeck.manifests import CacheManifest
from limbeck.models import choose_dtype, load_causal_lm, model_identity
from limbeck.targets.store import TeacherCache
from limbeck.teachers.base import Teacher
from limbeck.teachers.identity import connection, remote_identity, was_asked
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.remote import RemoteTeacher, describe_connection


def open_local(recipe: Recipe, tokenizer: LoadedTokenizer, rows: PackedDataset | None = None) -> LocalTeacher:
    """The recipe's teacher model in this process.

    Raises:
        ConfigError: `teacher.model` is not set.
        MismatchError: its tokenizer is not the data's.
    """

    section = recipe.teacher
    if section.model is None:
        raise ConfigError("teacher.model is not set and the recipe distils. Name a model, or set training.mode: ce.")
    own = load_tokenizer(section.model, section.revision, section.trust_remote_code)
    require_same(own.hash, tokenizer.hash, f"teacher {section.model}", f"tokenizer {tokenizer.name}")
    device = choose_device(section.device or recipe.training.device)
    model = load_causal_lm(
        section.model,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        dtype=choose_dtype(section.dtype, device),
    )
    return LocalTeacher(
        model,
        top_k=section.top_k,
        temperatures=recipe.temperatures,
        attention=recipe.dataset.attention,
        sampling=section.sampling,
        sampling_temperature=recipe.loss.end("temperature") if section.sampling else None,
        max_batch_tokens=(section.batch_size or 0) * recipe.dataset.max_length or section.max_batch_tokens,
        device=device,
        vocab_size=tokenizer.vocab_size,
    )


def open_cached(recipe: Recipe, tokenizer: LoadedTokenizer, rows: PackedDataset) -> TeacherCache:
    """The recipe's cache, checked against the packed rows."""
    cache = TeacherCache(recipe.cache_dir, rows.split)
    require_same(cache.manifest.tokenizer, tokenizer.hash, f"cache {cache.folder}", f"tokenizer {tokenizer.name}")
    cache.check(rows, recipe.dataset.attention)
    missing = recipe.loss.undeclared(cache.temperatures)
    if missing is not None:
        raise ConfigError(
            f"loss.{missing[0]} is {missing[1]} and the cache {cache.folder} declares {list(cache.temperatures)}. "
            "Use one of these, or make a cache with teacher.temperatures."
        )
    return cache


def open_remote(
    recipe: Recipe, tokenizer: LoadedTokenizer, rows: PackedDataset | None = None, *, quiet: bool = False
) -> RemoteTeacher:
    """The recipe's teacher behind HTTP, found out about, checked and tested.

    Raises:
        UnreachableError, RefusedError, WrongAnswerError, MismatchError: as `RemoteTeacher.connect`.
    """
    section = recipe.teacher
    teacher = RemoteTeacher.connect(
        section.endpoint,
        protocol=section.protocol,
        top_k=section.top_k,
        temperatures=recipe.temperatures,
        attention=recipe.dataset.attention,
        tokenizer=tokenizer,
        vocab_size=section.vocab_size,
        model=section.served_model,
        sampling=section.sampling,
        sampling_temperature=recipe.loss.end("temperature") if section.sampling else None,
        full=section.logprobs == "float32",
        reproducible=section.reproducible,
        approximate=section.tail == "approximate",
        max_request_tokens=section.max_request_tokens,
        ahead=section.micro_batches if section.parallel else 0,
        **connection(recipe),
    )
    if quiet:
        return teacher
    describe_connection(teacher.facts, section.endpoint)
    open_urls = [url for url in section.endpoint if url.startswith("http://") and not _is_loopback(url)]
    if section.api_key_env is not None and open_urls:
        warn(f"the key of {section.api_key_env} goes to {open_urls[0]} unencrypted; use https:// or a tunnel")
    return teacher


def check_endpoint(recipe: Recipe) -> None:
    """Find out before hours of tokenising whether a remote teacher is there and can give what the recipe wants.

    One that has answered in this run before may be gone: what is finished needs it no more.
    """
    if not recipe.teacher.is_remote or ranks.rank() > 0:
        return
    if recipe.tokenizer.train_vocab_size is None and not was_asked(recipe):  # else its tokenizer is still to be made
        open_remote(recipe, recipe_tokenizer(recipe), quiet=True).close()


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


#: Where targets come from -> how the teacher is opened.
TEACHERS: dict[str, Callable[[Recipe, LoadedTokenizer, PackedDataset], Teacher]] = {
    "cache": open_cached,
    "local": open_local,
    "remote": open_remote,
}


def open_teacher(recipe: Recipe, tokenizer: LoadedTokenizer, rows: PackedDataset) -> Teacher:
    """The teacher that trains the recipe's student."""
    section = recipe.teacher
    kind = "cache" if section.reads_cache else "remote" if section.is_remote else "local"
    return TEACHERS[kind](recipe, tokenizer, rows)


def open_source(recipe: Recipe, tokenizer: LoadedTokenizer) -> LocalTeacher | RemoteTeacher:
    """The teacher that makes targets, not the cache that keeps them."""
    return open_remote(recipe, tokenizer) if recipe.teacher.is_remote else open_local(recipe, tokenizer)


def target_inputs(recipe: Recipe) -> dict[str, Any]:
    """What targets made by the recipe's teacher depend on, beside the rows; known without loading it.

    Raises:
        ConfigError: `teacher.model` is not set.
    """
    section = recipe.teacher
    sampling = section.sampling.model_dump() if section.sampling else None
    if section.is_remote:
        who: dict[str, Any] = {"teacher": remote_identity(recipe), "tail": section.tail, "logprobs": section.logprobs}
    elif section.model is None:
        raise ConfigError("teacher.model is not set. Name the model whose targets are wanted.")
    else:
        who = {"teacher": model_identity(section.model, section.revision), "dtype": section.dtype}
    return {
        **who,
        "attention": recipe.dataset.attention,
        "top_k": section.top_k,
        "temperatures": list(recipe.temperatures),
        "sampling": {**sampling, "temperature": recipe.loss.end("temperature")} if sampling else None,
    }


def teacher_inputs(recipe: Recipe) -> dict[str, Any] | None:
    """What the teacher adds to the inputs of a training run: nothing, the cache's fingerprint, or its own."""
    if not recipe.distils:
        return None
    if recipe.teacher.reads_cache:
        return {"cache": CacheManifest.read(recipe.cache_dir).fingerprint}
    return target_inputs(recipe)


def choose_device(wanted: str | None) -> str:
    """The device meant: cuda is this rank's own, and unset is cuda where there is one, else cpu.

    Raises:
        ConfigError: cuda is wanted and there is none.
    """
    import os

    import torch

    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {wanted} is wanted and torch sees no GPU here. Use cpu, or leave it unset.")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" else wanted
