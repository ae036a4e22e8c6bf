"""Keys of the CPU engine: how GGUF files are run, and how `limbeck bench` times them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from limbeck.config.base import OR_WORDS, Positive, Section
from limbeck.config.teacher import EnvironmentName


class EngineConfig(Section):
    """How a GGUF file is run."""

    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="Threads; 0: one for each processor.")
    pin: bool = Field(False, description="Keep each thread on one processor.")
    numa_aware: bool = Field(
        False, description="Spread threads over the memory nodes, each reading weights that lie in its own."
    )
    cache: Literal["f16", "f32", "int8"] = Field("f16", description="Precision of cached keys and values.")
    batch_tokens: Annotated[int, Field(ge=1, le=65536)] = Field(512, description="Tokens of one pass at most.")
    draft: Path | None = Field(
        None, description="A smaller GGUF file of the same tokenizer that proposes tokens; the text is as without it."
    )
    draft_tokens: Annotated[int, Field(ge=1, le=64)] = Field(4, description="Tokens that the draft proposes at once.")


class BenchConfig(Section):
    """What `limbeck bench` times."""

    model: Path | None = Field(None, description="The GGUF file.")
    prefill: PositiveInt = Field(512, description="Tokens that are read at once.")
    decode: PositiveInt = Field(128, description="Tokens that are written one by one.")
    repeats: PositiveInt = Field(3, description="Repeats; the median is told.")


class ServerConfig(Section):
    """`limbeck serve`: where it listens, and what it takes in at most."""

    model: Path | None = Field(None, description="The GGUF file, or a run with one.")
    name: str | None = Field(None, description="What the API calls the model; default the file's name.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port; 0 takes a free one and says which.")
    api_key_env: EnvironmentName | None = Field(
        None, description="Environment variable with the key that callers must send; default no key."
    )
    allowed_hosts: Annotated[list[str], OR_WORDS] = Field(
        default_factory=list, description="Names, beside the address, that callers may use; pages of them may call."
    )
    max_concurrent: PositiveInt = Field(8, description="Texts that are written at once.")
    max_waiting: PositiveInt = Field(64, description="Texts that wait before new requests are sent away.")
    max_texts: PositiveInt = Field(16, description="Texts of one request: prompts times n.")
    ctx_size: Annotated[int, Field(ge=0)] = Field(0, description="Longest text in tokens; 0: the model's own.")
    max_body_mb: Positive = Field(4.0, description="Size of a request's body.")
    max_connections: PositiveInt = Field(
        512, description="Connections at once; for one more, the one longest without a request is closed."
    )
    drain_seconds: Positive = Field(30.0, description="Time that running requests have when the server is stopped.")
