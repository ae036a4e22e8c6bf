"""The server's requests and answers, as its OpenAPI shows them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1, strict=True)]
#: fail_fast: the first wrong element ends it; millions of wrong ones must not become millions of error objects.
Sequences = Annotated[
    list[Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]],
    Field(min_length=1, max_length=4096, fail_fast=True, description="Sequences of token ids; rows of a batch."),
]
Temperature = Annotated[float, Field(ge=0.01, le=100.0, allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TargetsRequest(_Body):
    """Rows and what is wanted of them."""

    input_ids: Sequences
    top_k: Annotated[int, Field(ge=0, strict=True, description="Ids a position (the exact head, with sampled_tail).")]
    temperatures: Annotated[list[Temperature], Field(min_length=1, max_length=8)] = [1.0]
    sampled_tail: Annotated[int, Field(ge=0, strict=True, description="Draws from the rest of the vocabulary.")] = 0
    sampling_temperature: Temperature | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31, strict=True)] = 0
    row_ids: Annotated[
        Annotated[list[Annotated[int, Field(ge=-1, lt=1 << 31, strict=True)]], Field(max_length=4096, fail_fast=True)]
        | None,
        Field(description="Numbers of the rows: the same seed and number give the same draws; -1: by content."),
    ] = None
    documents: Annotated[
        Annotated[
            list[Annotated[list[Annotated[int, Field(ge=1, strict=True)]], Field(max_length=1 << 20, fail_fast=True)]],
            Field(max_length=4096, fail_fast=True),
        ]
        | None,
        Field(description="For each row, lengths of the documents packed in it; they do not see each other."),
    ] = None
    logprobs: Literal["float16", "float32"] = "float16"
    reproducible: Annotated[
        bool, Field(description="Share no forward pass with other requests: the same rows give the same bits.")
    ] = False


class TopKRequest(_Body):
    """Sequences whose likeliest ids are wanted."""

    input_ids: Sequences
    topk: Annotated[int, Field(ge=1, strict=True)] = 128
    return_dtype: Literal["int8", "float16", "float32"] = "int8"
    temperature: Temperature = 1.0


class LogitsRequest(BaseModel):
    """Sequences whose whole logits are wanted."""

    input_ids: Sequences
    return_logits: Annotated[Literal[True], Field(description="This server gives logits and generates no text.")]


class TopKAnswer(BaseModel):
    """Ids and quantised values `[B][T][K]`, and what is left `[B][T]`.

    A value stands for values_int8 · scale (or itself); values and other_logit are logits up to a constant of the
    position.
    """

    indices: list[list[list[int]]]
    values_int8: list[list[list[int]]] | None = None
    scale: list[list[float]] | None = None
    values: list[list[list[float]]] | None = None
    other_logit: list[list[float]]
    other_mass: list[list[float]]
    batch_size: int
    num_positions: int
    k: int


class LogitsAnswer(BaseModel):
    """Logits `[B][T][V]`."""

    logits: list[list[list[float]]]


class Limits(BaseModel):
    """What one request may hold."""

    top_k: int
    sequences: int
    tokens: int
    length: int
    body_bytes: int
    reply_bytes: int


class TeacherAnswer(BaseModel):
    """Who answers here."""

    protocol: Literal["limbeck"] = "limbeck"
    version: int
    model: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    attention: list[str]
    limits: Limits


class HealthAnswer(BaseModel):
    """Alive, and how much waits."""

    status: Literal["ok"] = "ok"
    waiting_tokens: int


class Problem(BaseModel):
    """What was wrong."""

    message: str
    type: str


class ErrorAnswer(BaseModel):
    """Every error's shape."""

    error: Problem
