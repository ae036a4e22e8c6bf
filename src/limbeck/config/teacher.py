"""Sections about the teacher: who it is, what is kept of its predictions, and where these come from."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, PositiveInt, field_validator, model_validator
from pydantic_core import CoreSchema

from limbeck.config.base import OR_WORDS, Count, ModelSource, Positive, Section, Seed
from limbeck.registry import PROTOCOLS, OneOf

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Protocol = Annotated[str, OneOf(PROTOCOLS, "auto")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class SamplingConfig(Section):
    """Head + sampled tail (Random-Sampling KD, arXiv 2503.16870): unbiased sparse targets."""

    head: Annotated[int, Field(ge=0)] = Field(32, description="The most likely ids, kept exactly.")
    draws: PositiveInt = Field(32, description="Draws, with replacement, from the rest of the vocabulary.")
    seed: Seed = Field(0, description="Seed of the draws; the same rows always get the same draws.")


class LocalTeacherConfig(Section):
    """A teacher in this process."""

    dtype: Dtype = Field(
        "auto",
        description="Precision of the teacher's weights; `auto`: the checkpoint's own, but float32 on a CPU without "
        "bfloat16 instructions.",
    )
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] | None = Field(
        None, description="Device of the teacher (cpu, cuda, cuda:1); default the student's."
    )
    batch_size: PositiveInt | None = Field(None, description="Rows in one forward pass; default by max_batch_tokens.")
    max_batch_tokens: PositiveInt = Field(8192, description="Tokens in one forward pass of the teacher.")


class RemoteTeacherConfig(Section):
    """A teacher behind HTTP."""

    endpoint: Annotated[list[str], OR_WORDS] = Field(
        default_factory=list,
        description="URL of a remote teacher, or several (commas between them) that serve the same model.",
    )
    protocol: Protocol = Field("auto", description="What the endpoint speaks; `auto` asks it.")
    served_model: str | None = Field(None, description="Name to ask the endpoint for; default the first it lists.")
    api_key_env: EnvironmentName | None = Field(
        None, description="Environment variable that holds the endpoint's key (sent as a Bearer token)."
    )
    timeout: Positive = Field(120.0, description="Seconds that one request may take.")
    retries: Count = Field(
        14, description="Further tries of a failed request, with pauses that grow to 30 s: 14 wait about four minutes."
    )
    max_concurrent: PositiveInt = Field(8, description="Requests in flight at one endpoint.")
    max_request_tokens: PositiveInt = Field(8192, description="Tokens in one request; larger batches are cut.")
    parallel: bool = Field(
        True, description="Ask for the next micro-batches while the student works (and for the next shard of a cache)."
    )
    micro_batches: PositiveInt = Field(8, description="Micro-batches whose targets are asked for ahead.")
    logprobs: Literal["float16", "float32"] = Field(
        "float16", description="Precision of log-probabilities on the wire (protocol limbeck)."
    )
    reproducible: bool = Field(
        True,
        description="Rows share no forward pass with other requests at the server (protocol limbeck), so the same rows "
        "always get the same bits.",
    )
    tail: Literal["exact", "approximate"] = Field(
        "exact",
        description="What to do where a protocol cannot tell the mass outside the ids: refuse, or estimate it from the "
        "ids and their mass at temperature 1.",
    )
    vocab_size: PositiveInt | None = Field(
        None, description="Ids that a remote teacher's logits have; default what it says, or the tokenizer's."
    )

    @field_validator("endpoint", mode="before")
    @classmethod
    def _urls(cls, value: Any) -> Any:
        words = re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value
        for url in words if isinstance(words, list) else []:
            if not isinstance(url, str) or not re.match(r"^https?://[^/\s]+", url):
                raise ValueError(f"{url!r} is no URL; write http://HOST:PORT or https://HOST")
            if "?" in url:
                raise ValueError("an endpoint must not hold a query; name a key's variable in teacher.api_key_env")
            if "@" in url.split("//", 1)[1].partition("/")[0]:
                raise ValueError("an endpoint must not hold a user or a key; name a variable in teacher.api_key_env")
        return [url.rstrip("/") for url in words] if isinstance(words, list) else words


class CacheConfig(Section):
    """Targets on disk, made once and read in training."""

    dir: Path | None = Field(None, description="Folder of cached targets; default OUTPUT_DIR/cache.")
    rows_per_shard: PositiveInt = Field(256, description="Packed rows in one HDF5 shard of the cache.")
    compression: Literal["gzip", "none"] = Field("gzip", description="HDF5's own filter on top of the codec.")
    max_kl: Positive = Field(1e-4, description="Largest mean KL (nats) the codec may cost; above it caching stops.")
    splits: Annotated[list[Literal["train", "validation"]], OR_WORDS] = Field(
        ["train", "validation"], description="Splits of the packed data to cache.", min_length=1
    )


_PARTS: dict[str, type[Section]] = {"cache": CacheConfig, "local": LocalTeacherConfig, "remote": RemoteTeacherConfig}
#: Short name of a key of `teacher` -> the key of its part; `dir` alone would not say of what.
SHORT_NAMES = {
    f"{part}_{leaf}" if leaf == "dir" else leaf: f"{part}.{leaf}"
    for part, section in _PARTS.items()
    for leaf in section.model_fields
}


class TeacherConfig(Section):
    """The model that is distilled, and what is kept of its predictions."""

    model: str | None = Field(
        None,
        description="Folder or hub id of a causal LM; `tiny-python` and `tiny-moe` are in the package. Of a remote "
        "teacher only the tokenizer is taken from here (and by `teacher probe` the weights, to compare).",
    )
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run the model repository's own Python code.")
    use_cached_logits: bool | None = Field(
        None,
        description="Read targets from cache.dir (true) or ask the teacher during training (false); default true for a "
        "local teacher, false for a remote one.",
    )
    top_k: PositiveInt | None = Field(64, description="Token ids kept per position; null keeps the vocabulary.")
    temperatures: list[Positive] | None = Field(
        None, description="Temperatures whose normaliser is stored; default 1 and loss.temperature."
    )
    sampling: SamplingConfig | None = Field(None, description="Replace top-k by head + sampled tail.")
    local: LocalTeacherConfig = Field(default_factory=LocalTeacherConfig, description="A teacher in this process.")
    remote: RemoteTeacherConfig = Field(default_factory=RemoteTeacherConfig, description="A teacher behind HTTP.")
    cache: CacheConfig = Field(default_factory=CacheConfig, description="Targets on disk.")

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With the short names of the parts' keys, which recipes may use."""
        found = handler(schema)
        properties = handler.resolve_ref_schema(found)["properties"]
        for part, section in _PARTS.items():
            inner = handler.resolve_ref_schema(handler(section.__pydantic_core_schema__))["properties"]
            own = {short: key for short, key in SHORT_NAMES.items() if key.startswith(f"{part}.")}
            properties.update({short: inner[key.partition(".")[2]] for short, key in own.items()})
        return found

    @property
    def source(self) -> ModelSource | None:
        """The model by name; None when there is none."""
        return None if self.model is None else ModelSource(self.model, self.revision, self.trust_remote_code)

    @property
    def is_remote(self) -> bool:
        """True when the teacher answers over HTTP."""
        return bool(self.remote.endpoint)

    @property
    def reads_cache(self) -> bool:
        """True when training reads targets from the cache."""
        return not self.is_remote if self.use_cached_logits is None else self.use_cached_logits

    @model_validator(mode="after")
    def _sampling_fits(self) -> "TeacherConfig":
        if self.sampling is None:
            return self
        if self.top_k is None:
            raise ValueError(
                "teacher.sampling draws a sparse support and teacher.top_k: null keeps the whole vocabulary; remove one"
            )
        if self.is_remote and self.remote.protocol not in ("auto", "limbeck"):
            raise ValueError(
                f"teacher.sampling needs protocol limbeck and teacher.protocol is {self.remote.protocol}; use "
                "teacher.top_k"
            )
        return self
