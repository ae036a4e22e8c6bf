"""Sections about text, tokenizer, teacher and student model."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from limbeck.config.base import Count, Fraction, Positive, Section, Seed
from limbeck.registry import PROTOCOLS, STUDENTS, OneOf

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Protocol = Annotated[str, OneOf(PROTOCOLS, "auto")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class DatasetConfig(Section):
    """The text, and how it is cut into rows of tokens."""

    name: str = Field(
        "stdlib",
        description="`stdlib` (the Python standard library's sources), a .txt/.jsonl/.parquet file, a folder of "
        "them, a local dataset folder, or a Hugging Face dataset id.",
    )
    config_name: str | None = Field(None, description="Configuration of a Hugging Face dataset.")
    revision: str | None = Field(None, description="Commit or tag of a Hugging Face dataset.")
    split: str = Field("train", description="Split of a Hugging Face dataset to read.")
    text_column: str = Field("text", description="Column or JSON key that holds the text.")
    streaming: bool = Field(True, description="Stream a Hugging Face dataset instead of downloading it whole.")
    recursive: bool = Field(False, description="Look for files in subfolders too.")
    max_samples: PositiveInt | None = Field(None, description="Stop after this many documents.")
    max_length: Annotated[int, Field(ge=2)] = Field(1024, description="Tokens in a packed row.")
    validation_fraction: Fraction = Field(
        0.02, description="Share of the documents, chosen by a hash of their name, held out of training."
    )
    attention: Literal["per_document", "packed"] = Field(
        "per_document",
        description="`per_document`: positions restart and attention stops at document borders; "
        "`packed`: plain causal attention over the whole row.",
    )
    packed_dir: Path | None = Field(None, description="Folder of the packed rows; default OUTPUT_DIR/data.")
    rows_per_shard: PositiveInt = Field(4096, description="Rows in one Parquet shard.")
    train_rows: PositiveInt | None = Field(
        None, description="Cache and train on this many rows, evenly spaced over the training split; default all."
    )
    num_proc: PositiveInt | None = Field(None, description="Tokenising processes; default one per core.")


class TokenizerConfig(Section):
    """The tokenizer: somebody's, or one trained on the dataset."""

    name: str | None = Field(None, description="Folder or hub id of a tokenizer; default the teacher's.")
    revision: str | None = Field(None, description="Commit or tag of a hub tokenizer.")
    train_vocab_size: Annotated[int, Field(ge=260)] | None = Field(
        None, description="Train a byte-level BPE of this many entries on the training documents."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "TokenizerConfig":
        if self.name is not None and self.train_vocab_size is not None:
            raise ValueError(
                f"tokenizer.name ({self.name}) and tokenizer.train_vocab_size ({self.train_vocab_size}) "
                "exclude each other; remove one"
            )
        return self


class SamplingConfig(Section):
    """Head + sampled tail (Random-Sampling KD, arXiv 2503.16870): unbiased sparse targets."""

    head: Annotated[int, Field(ge=0)] = Field(32, description="The most likely ids, kept exactly.")
    draws: PositiveInt = Field(32, description="Draws, with replacement, from the rest of the vocabulary.")
    seed: Seed = Field(0, description="Seed of the draws; the same rows always get the same draws.")


class TeacherConfig(Section):
    """The model that is distilled, where it runs, and what is kept of its predictions."""

    model: str | None = Field(
        None,
        description="Folder or hub id of a causal LM; `tiny-python` is the model in the package. Of a remote teacher "
        "only the tokenizer is taken from here (and by `teacher probe` the weights, to compare).",
    )
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run the model repository's own Python code.")
    use_cached_logits: bool | None = Field(
        None,
        description="Read targets from cache_dir (true) or ask the teacher during training (false); default true for a "
        "local teacher, false for a remote one.",
    )
    cache_dir: Path | None = Field(None, description="Folder of cached targets; default OUTPUT_DIR/cache.")
    top_k: PositiveInt | None = Field(64, description="Token ids kept per position; null keeps the vocabulary.")
    temperatures: list[Positive] | None = Field(
        None, description="Temperatures whose normaliser is stored; default 1 and loss.temperature."
    )
    sampling: SamplingConfig | None = Field(None, description="Replace top-k by head + sampled tail.")
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
    rows_per_shard: PositiveInt = Field(256, description="Packed rows in one HDF5 shard of the cache.")
    compression: Literal["gzip", "none"] = Field("gzip", description="HDF5's own filter on top of the codec.")
    max_kl: Positive = Field(1e-4, description="Largest mean KL (nats) the codec may cost; above it caching stops.")
    splits: list[Literal["train", "validation"]] = Field(
        ["train", "validation"], description="Splits of the packed data to cache.", min_length=1
    )
    endpoint: list[str] = Field(
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
    parallel: bool = Field(True, description="Ask for the next micro-batches while the student works.")
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
            if "@" in url.split("//", 1)[1].partition("/")[0]:
                raise ValueError("an endpoint must not hold a user or a key; name a variable in teacher.api_key_env")
        return [url.rstrip("/") for url in words] if isinstance(words, list) else words

    @model_validator(mode="after")
    def _one_place(self) -> "TeacherConfig":
        if self.endpoint and self.sampling is not None and self.protocol not in ("auto", "limbeck"):
            raise ValueError(
                f"teacher.sampling needs protocol limbeck and teacher.protocol is {self.protocol}; use teacher.top_k"
            )
        return self

    @property
    def is_remote(self) -> bool:
        """True when the teacher answers over HTTP."""
        return bool(self.endpoint)

    @property
    def reads_cache(self) -> bool:
        """True when training reads targets from `cache_dir`."""
        return not self.is_remote if self.use_cached_logits is None else self.use_cached_logits

    @model_validator(mode="after")
    def _sampling_replaces_top_k(self) -> "TeacherConfig":
        if self.sampling is not None and self.top_k is None:
            raise ValueError(
                "teacher.sampling draws a sparse support and teacher.top_k: null keeps the whole vocabulary; remove one"
            )
        return self


class TernaryConfig(Section):
    """Which weights of the student are ternary in use, and how."""

    preset: Literal["linears", "experts", "none"] = Field(
        "linears", description="`linears`: all matrices between hidden states; `experts`: those of routed experts."
    )
    patterns: list[str] = Field(default_factory=list, description="Regular expressions of further weights.")
    exclude: list[str] = Field(
        default_factory=list, description="Regular expressions of weights that stay as they are."
    )
    group_size: PositiveInt | Literal["row", "tensor"] = Field(
        128, description="Inputs that share a scale. 256 exports to TQ2_0 exactly, 128 to Q2_0 and Q4_0."
    )
    scale: Literal["absmean", "absmax"] = Field("absmean", description="What a group's scale is of its weights.")
    activation_bits: Literal[8] | None = Field(8, description="int8 activations per token; null leaves them.")
    warmup_steps: Count = Field(
        0, description="Steps in which weights go from themselves to their ternary form; 0: ternary from the start."
    )


class StudentConfig(Section):
    """The model that is trained: pretrained, or built from a config."""

    model: str | None = Field(None, description="Folder or hub id of pretrained weights to start from.")
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run the model repository's own Python code.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="A transformers config (with `model_type`) for a new model; over pretrained ones, keys to change.",
    )
    builder: Annotated[str, OneOf(STUDENTS)] | None = Field(
        None, description="What makes the model of `config`; default transformers."
    )
    ternary: TernaryConfig | None = Field(None, description="Ternary weights; default none.")

    @model_validator(mode="after")
    def _has_architecture(self) -> "StudentConfig":
        if self.model is None and self.builder is None and self.config and "model_type" not in self.config:
            raise ValueError("student.config needs `model_type` (say llama or qwen3) when student.model is not set")
        return self
