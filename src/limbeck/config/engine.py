"""Keys of the CPU engine: how GGUF files are run, and how `limbeck bench` times them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from limbeck.config.base import Section


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
