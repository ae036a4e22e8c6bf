"""Sections about the text and the tokenizer."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from limbeck.config.base import Fraction, Section


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
        0.02,
        description="Share of the documents, chosen by a hash of their name, held out of training; of the rows, where "
        "documents are too few.",
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
