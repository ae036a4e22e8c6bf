"""Where a recipe's targets come from: known before anything is loaded, opened when they are needed.

The one idea: a source says what its targets depend on (for fingerprints) and whether they can be had (before hours of
other work), and opens the teacher that gives them. Add one with a class that fulfils `TeacherSource` and a line in
`SOURCES`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from limbeck import ranks
from limbeck.config import ModelSource, Recipe
from limbeck.config.teacher import LocalTeacherConfig, RemoteTeacherConfig
from limbeck.console import warn
from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import LoadedTokenizer, load_tokenizer, require_same
from limbeck.errors import ConfigError, LimbeckError
from limbeck.manifests import CacheManifest
from limbeck.models import load_frozen, model_config, model_identity, require_causal, require_context
from limbeck.targets.spec import TargetSpec
from limbeck.teachers.base import Teacher
from limbeck.teachers.cached import TeacherCache
from limbeck.teachers.identity import EndpointMemory, connection
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.remote import RemoteTeacher, describe_connection


class TeacherSource(ABC):
    """A recipe's teacher before it is opened."""

    @abstractmethod
    def inputs(self, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        """What its targets depend on, beside the rows; known without loading it."""

    @abstractmethod
    def open(self, tokenizer: LoadedTokenizer, rows: PackedDataset) -> Teacher:
        """The teacher, fit for these rows.

        Raises:
            LimbeckError: it cannot be had, or is another than the rows and the recipe want.
        """

    def check(self, tokenizer: LoadedTokenizer) -> None:  # noqa: B027 (most are looked at when they are opened)
        """Find out, before hours of other work, whether it can be had."""

    def is_available(self, tokenizer: LoadedTokenizer) -> bool:
        """False, with a warning, when it has gone away; what can do without it then does."""
        return True


@dataclass(frozen=True)
class LocalSource(TeacherSource):
    """A model in this process.

    Attributes:
        model: which.
        settings: how it is run.
        spec: what is kept.
        max_length: tokens in a row.
        device: the student's, where the settings name none.
    """

    model: ModelSource
    settings: LocalTeacherConfig
    spec: TargetSpec
    max_length: int
    device: str | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "LocalSource":
        """The recipe's; ConfigError when it names no model."""
        section = recipe.teacher
        if section.source is None:
            raise ConfigError(
                "teacher.model is not set and the recipe distils. Name a model, or set training.mode: ce."
            )
        length = recipe.dataset.max_length
        return cls(section.source, section.local, target_spec(recipe), length, recipe.training.device)

    def inputs(self, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        """Weights, precision, and what is kept."""
        return {"teacher": self._identity, "dtype": self.settings.dtype, **spec_record(self.spec)}

    @property
    def _identity(self) -> dict[str, Any]:
        return dict(model_identity(self.model.name, self.model.revision))

    def check(self, tokenizer: LoadedTokenizer) -> None:
        """Its context is as long as the rows, and its tokenizer is the data's."""
        require_context(model_config(self.model, "teacher"), self.max_length, f"teacher {self.model.name}")
        self._require_tokenizer(tokenizer)

    def _require_tokenizer(self, tokenizer: LoadedTokenizer) -> None:
        require_same(load_tokenizer(*self.model), tokenizer, f"teacher {self.model.name}", "the data")

    def open(self, tokenizer: LoadedTokenizer, rows: PackedDataset) -> LocalTeacher:
        """Load it; refuses another tokenizer than the data's."""
        self._require_tokenizer(tokenizer)
        model = load_frozen(self.model, self.settings.dtype, self.settings.device or self.device)
        require_causal(model, "teacher")
        budget = (self.settings.batch_size or 0) * rows.max_length or self.settings.max_batch_tokens
        return LocalTeacher(
            model, max_batch_tokens=budget, vocab_size=tokenizer.vocab_size, identity=self._identity, **vars(self.spec)
        )


@dataclass(frozen=True)
class RemoteSource(TeacherSource):
    """A model behind HTTP.

    Attributes:
        settings: where it is and how it is asked.
        spec: what is kept.
        memory: what the run knows of the endpoint.
    """

    settings: RemoteTeacherConfig
    spec: TargetSpec
    memory: EndpointMemory

    @classmethod
    def of(cls, recipe: Recipe) -> "RemoteSource":
        """The recipe's."""
        made = (recipe.cache_dir, recipe.student_dir)
        section = recipe.teacher.remote
        return cls(section, target_spec(recipe), EndpointMemory(section, recipe.root, made))

    def inputs(self, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        """Who answers, how precisely, and what is kept; remembered when nobody answers any more."""
        settings = self.settings
        who = {"teacher": self.memory.identity(tokenizer), "tail": settings.tail, "logprobs": settings.logprobs}
        return {**who, **spec_record(self.spec)}

    def open(self, tokenizer: LoadedTokenizer, rows: PackedDataset | None = None) -> RemoteTeacher:
        """Connect to it and say who it is.

        Raises:
            UnreachableError, RefusedError, WrongAnswerError, MismatchError: as `RemoteTeacher.connect`.
        """
        settings, teacher = self.settings, self._connect(tokenizer)
        describe_connection(teacher.info, settings.endpoint)
        open_urls = [url for url in settings.endpoint if url.startswith("http://") and not _is_loopback(url)]
        if settings.api_key_env is not None and open_urls:
            warn(f"the key of {settings.api_key_env} goes to {open_urls[0]} unencrypted; use https:// or a tunnel")
        return teacher

    def is_available(self, tokenizer: LoadedTokenizer) -> bool:
        """Asked with little patience."""
        return self.memory.is_available(tokenizer)

    def _connect(self, tokenizer: LoadedTokenizer) -> RemoteTeacher:
        settings = self.settings
        found = self.memory.discovery(tokenizer)
        teacher = RemoteTeacher.connect(
            settings.endpoint,
            **vars(self.spec),
            tokenizer=tokenizer,
            vocab_size=settings.vocab_size,
            model=settings.served_model,
            full=settings.logprobs == "float32",
            reproducible=settings.reproducible,
            approximate=settings.tail == "approximate",
            max_request_tokens=settings.max_request_tokens,
            ahead=settings.micro_batches if settings.parallel else 0,
            found=found,
            **connection(settings),
        )
        try:  # remembered once it is known to be what is wanted
            teacher.identity = self.memory.confirmed(tokenizer)
        except BaseException:
            teacher.close()
            raise
        return teacher

    def check(self, tokenizer: LoadedTokenizer) -> None:
        """It is there and can give what the recipe wants.

        One that has answered in this run before may be gone: what is finished needs it no more.
        """
        if ranks.rank() == 0 and not self.memory.was_asked():
            self._connect(tokenizer).close()


@dataclass(frozen=True)
class CacheSource(TeacherSource):
    """Targets on disk.

    Attributes:
        folder: where.
        top_k: ids that are read of each position; None: all that are there.
        temperatures: the declared ones that are used; None: all that are there.
    """

    folder: Path
    top_k: int | None = None
    temperatures: tuple[float, ...] | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "CacheSource":
        """The recipe's; of a cache whose teacher is not named, all that it has, unless keys ask for less."""
        section = recipe.teacher
        brought = section.model is None and not section.is_remote
        given = section.model_fields_set
        top_k = None if section.sampling is not None or (brought and "top_k" not in given) else section.top_k
        temperatures = None if brought and "temperatures" not in given else recipe.temperatures
        return cls(recipe.cache_dir, top_k, temperatures)

    def inputs(self, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        """The cache's fingerprint, which says everything, and what of it is left out."""
        held = CacheManifest.read(self.folder)
        found: dict[str, Any] = {"cache": held.fingerprint}
        if self.top_k is not None and self.top_k != held.codec["top_k"]:
            found["top_k"] = self.top_k
        if self.temperatures is not None and list(self.temperatures) != held.codec["temperatures"]:
            found["temperatures"] = list(self.temperatures)
        return found

    def open(self, tokenizer: LoadedTokenizer, rows: PackedDataset) -> TeacherCache:
        """The targets of the rows' split, checked against them."""
        cache = TeacherCache(self.folder, rows.split).for_rows(rows)
        return cache.narrowed(self.top_k, self.temperatures)

    def holds(self, split: str) -> bool:
        """True when the cache is finished and has that split."""
        try:
            return split in CacheManifest.read(self.folder).splits
        except LimbeckError:
            return False


#: Where targets come from.
SOURCES: dict[str, type[LocalSource] | type[RemoteSource] | type[CacheSource]] = {
    "local": LocalSource,
    "remote": RemoteSource,
    "cache": CacheSource,
}


def target_spec(recipe: Recipe) -> TargetSpec:
    """What a recipe keeps of its teacher's predictions."""
    section = recipe.teacher
    drawn_at = recipe.loss.end("temperature") if section.sampling else None
    return TargetSpec(section.top_k, recipe.temperatures, recipe.dataset.attention, section.sampling, drawn_at)


def spec_record(spec: TargetSpec) -> dict[str, Any]:
    """The same as inputs of a fingerprint."""
    sampling = spec.sampling
    return {
        "attention": spec.attention,
        "top_k": spec.top_k,
        "temperatures": list(spec.temperatures),
        "sampling": {**sampling.model_dump(), "temperature": spec.sampling_temperature} if sampling else None,
    }


def producing_source(recipe: Recipe) -> TeacherSource:
    """The teacher that makes targets, not the cache that keeps them."""
    return SOURCES["remote" if recipe.teacher.is_remote else "local"].of(recipe)


def training_source(recipe: Recipe) -> TeacherSource:
    """The teacher that trains the recipe's student."""
    return SOURCES["cache"].of(recipe) if recipe.teacher.reads_cache else producing_source(recipe)


def scoring_source(recipe: Recipe) -> TeacherSource | None:
    """The teacher that finished students are compared with, if there is one.

    A model in this process gives its whole distributions; else a cache that holds the held-out rows is there without
    its teacher; else the endpoint is asked.
    """
    section = recipe.teacher
    if section.model is not None and not section.is_remote:
        own = LocalSource.of(recipe)
        return replace(own, spec=TargetSpec(1, (1.0,), own.spec.attention))  # whole distributions: no ids are stored
    if not recipe.distils:
        return None
    cache = CacheSource.of(recipe)
    if section.reads_cache and cache.holds("validation"):
        return cache
    return RemoteSource.of(recipe) if section.is_remote else None


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
