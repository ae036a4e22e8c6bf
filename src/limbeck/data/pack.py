"""Documents to rows of exactly `max_length` tokens, in Parquet.

The one idea: a row is a cut of the concatenated documents of its split, so the place where a row starts,
(document number, token offset), is all the state there is. It is written beside each finished shard; a
killed run drops its unfinished shard, goes back to that place and produces the same bytes.

Rows hold `input_ids` and `doc_ids` (fixed-size lists of int32). A document ends with the tokenizer's
end-of-text id; the last row of a split is filled with it, its `doc_ids` there being -1.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config import DatasetConfig
from limbeck.console import progress, say
from limbeck.data.dataset import SHARD_FACTS, shard_facts
from limbeck.data.holdout import Holdout
from limbeck.data.sources import Document, Source, open_source
from limbeck.data.tokenize import tokenize_documents
from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.errors import LimbeckError
from limbeck.folders import StageFolder
from limbeck.manifests import PackedManifest, PackedShard, PackedSplit, TokenizerRecord
from limbeck.storage import commit_file, read_json, sha256_file, temporary_for, write_json

SPLITS = ("train", "validation")
_PROGRESS = ".progress.json"


@dataclass
class _Split:
    """Tokens of one split on their way to shards."""

    name: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    document: int = 0  # the first row that is not in a shard starts in this document,
    offset: int = 0  # at this token of it
    begun: tuple[int, int] = (0, 0)  # the same when this run began
    current: tuple[int, int] = (-1, 0)  # the document that is coming in, and how many of its tokens have come
    pending: int = 0
    segments: deque[tuple[int, int, np.ndarray]] = field(default_factory=deque)  # document, offset, ids

    def add(self, number: int, ids: np.ndarray) -> None:
        """Append (a piece of) a document; of the one a continued run starts in, only what no shard holds yet."""
        start = self.current[1] if number == self.current[0] else 0
        self.current = (number, start + len(ids))
        known = max(self.begun[1] - start, 0) if number == self.begun[0] else 0
        if len(ids) > known:
            self.segments.append((number, start + known, ids[known:]))
            self.pending += len(ids) - known

    def take(self, rows: int, length: int, filler: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut `rows` rows off the front; `filler` fills up a last, shorter row."""
        tokens = np.full(rows * length, filler, dtype=np.int32)
        owners = np.full(rows * length, -1, dtype=np.int32)
        place = 0
        while place < len(tokens) and self.segments:
            number, offset, ids = self.segments.popleft()
            used = min(len(ids), len(tokens) - place)
            tokens[place : place + used], owners[place : place + used] = ids[:used], number
            place += used
            self.document, self.offset = number, offset + used
            if used < len(ids):
                self.segments.appendleft((number, offset + used, ids[used:]))
        if self.segments:
            self.document, self.offset, _ = self.segments[0]
        self.pending -= place
        return tokens.reshape(rows, length), owners.reshape(rows, length)


def pack_inputs(config: DatasetConfig, source: Source, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """Everything the packed rows depend on; its hash is their fingerprint."""
    return {
        "format": 3,  # shards say which rows they hold; few documents are divided by row
        "source": source.identity(),
        "text_column": config.text_column,
        "max_samples": config.max_samples,
        "max_length": config.max_length,
        "validation_fraction": config.validation_fraction,
        "rows_per_shard": config.rows_per_shard,
        "tokenizer": tokenizer.hash,
    }


def pack(
    config: DatasetConfig, tokenizer: LoadedTokenizer, folder: Path | StageFolder, *, force: bool = False
) -> PackedManifest:
    """Tokenise and pack a dataset into `folder`; returns the manifest.

    A complete folder made from the same inputs is returned as it is; an unfinished one is continued.

    Args:
        config: the text and the shape of the rows.
        tokenizer: its tokenizer.
        folder: where the rows go; as a `StageFolder` with its inputs where the caller knows them.
        force: start over.

    Raises:
        LimbeckError: the source has no text, or the folder was made from other inputs, `force` is not given and it has
            no backup folder.
    """
    source = open_source(config)
    if isinstance(folder, Path):
        folder = StageFolder(folder, PackedManifest.command, pack_inputs(config, source, tokenizer))
    if folder.is_done() and not force:
        return PackedManifest.read(folder.path)
    _refuse_empty(source, config)
    with folder.lock():
        folder.begin(replace=force)
        return _pack(config, source, tokenizer, folder)


def _pack(config: DatasetConfig, source: Source, tokenizer: LoadedTokenizer, stage: StageFolder) -> PackedManifest:
    started = time.perf_counter()
    folder = stage.path
    splits = _resume(folder)
    holdout = Holdout.of(config, source)
    total_documents = _pack_all(config, source, tokenizer, _Writer(folder, splits, holdout))
    if source.without_text:
        say(f"{source.without_text} rows hold no text (null) and are left out")
    manifest = _packed_manifest(config, tokenizer, stage, splits, total_documents, holdout.by_row)
    if not manifest.splits["train"].rows:
        stage.clear()
        raise LimbeckError(f"dataset {config.name!r} gave no training rows; it has {total_documents} documents.")
    (folder / _PROGRESS).unlink(missing_ok=True)
    manifest.write(folder)
    if holdout.by_row:
        rows = manifest.splits["validation"].rows
        say(
            f"{total_documents} documents are too few to hold out whole ones, so {rows} rows are held out: their "
            "neighbours are trained on, and scores on them are better than on a new text"
        )
    tokens = sum(split.tokens for split in manifest.splits.values())
    seconds = time.perf_counter() - started
    say(f"packed {total_documents} documents, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)")
    return manifest


def _refuse_empty(source: Source, config: DatasetConfig) -> None:
    """Fail on a bad first document (wrong column, no text) before anything is written."""
    if next(iter(source.documents()), None) is None:
        raise LimbeckError(f"dataset {config.name!r} holds no documents.")


def _resume(folder: Path) -> dict[str, _Split]:
    splits = {name: _Split(name) for name in SPLITS}
    path = folder / _PROGRESS
    if path.exists():
        for name, state in read_json(path).items():
            split = splits[name]
            split.shards, split.document, split.offset = state["shards"], state["document"], state["offset"]
            split.begun = (split.document, split.offset)
        finished = sum(len(split.shards) for split in splits.values())
        say(f"continuing after {finished} finished shards in {folder}")
    return splits


@dataclass(frozen=True)
class _Writer:
    """Where rows go: to the split they were taken from, or row by row to the two of them."""

    folder: Path
    splits: dict[str, _Split]
    holdout: Holdout

    def write(self, name: str, tokens: np.ndarray, owners: np.ndarray, *, is_last: bool = False) -> None:
        """Write rows `[n, T]` of a split; the record of where packing goes on comes after all of their files."""
        parts = {name: (tokens, owners)}
        if self.holdout.by_row:
            before = sum(shard["rows"] for split in self.splits.values() for shard in split.shards)
            chosen = self.holdout.of_rows(before, len(tokens), is_last=is_last)
            halves = {"train": ~chosen, "validation": chosen}
            parts = {half: (tokens[mask], owners[mask]) for half, mask in halves.items() if mask.any()}
        records = {half: _write_shard(self.folder, self.splits[half], *part) for half, part in parts.items()}
        for half, record in records.items():
            self.splits[half].shards.append(record)
        state = {
            key: {"shards": value.shards, "document": value.document, "offset": value.offset}
            for key, value in self.splits.items()
        }
        write_json(self.folder / _PROGRESS, state)


def _pack_all(config: DatasetConfig, source: Source, tokenizer: LoadedTokenizer, writer: _Writer) -> int:
    """Feed every document to its split; returns the number of documents of the source."""
    count, splits = 0, writer.splits

    def wanted() -> Iterator[tuple[int, str, Document]]:
        nonlocal count
        for number, document in enumerate(source.documents()):
            if config.max_samples is not None and number >= config.max_samples:
                return
            count = number + 1
            name = "validation" if writer.holdout.of_document(document.key) else "train"
            if number >= splits[name].begun[0]:
                yield number, name, document

    with progress("packing documents", config.max_samples) as bar:
        for number, name, ids, is_last in tokenize_documents(wanted(), tokenizer, config.num_proc):
            split = splits[name]
            split.add(number, ids)
            while split.pending >= config.rows_per_shard * config.max_length:
                rows = split.take(config.rows_per_shard, config.max_length, tokenizer.eos_id)
                writer.write(name, *rows)
            bar.advance(is_last)
    for name, split in splits.items():
        if split.pending:
            last = -(-split.pending // config.max_length)
            writer.write(name, *split.take(last, config.max_length, tokenizer.eos_id), is_last=True)
    return count


def _write_shard(folder: Path, split: _Split, tokens: np.ndarray, owners: np.ndarray) -> dict[str, Any]:
    """Write a shard of a split; returns its record."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = f"{split.name}-{len(split.shards):05d}.parquet"
    facts = shard_facts(split.name, sum(shard["rows"] for shard in split.shards), *tokens.shape)
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(a.ravel()), tokens.shape[1]) for a in (tokens, owners)]
    temporary = temporary_for(folder / file)
    table = pa.table(columns, names=["input_ids", "doc_ids"]).replace_schema_metadata({SHARD_FACTS: json.dumps(facts)})
    pq.write_table(table, temporary, compression="snappy", row_group_size=64)
    commit_file(temporary, folder / file)
    return {
        "file": file,
        "rows": len(tokens),
        "tokens": int(np.count_nonzero(owners >= 0)),
        "sha256": sha256_file(folder / file),
    }


def _packed_manifest(
    config: DatasetConfig,
    tokenizer: LoadedTokenizer,
    stage: StageFolder,
    splits: dict[str, _Split],
    documents: int,
    by_row: bool,
) -> PackedManifest:
    return PackedManifest(
        fingerprint=stage.fingerprint,
        documents=documents,
        held_out="rows" if by_row else "documents",
        max_length=config.max_length,
        tokenizer=TokenizerRecord(name=tokenizer.name, hash=tokenizer.hash, vocab_size=tokenizer.vocab_size),
        splits={
            name: PackedSplit(
                rows=sum(shard["rows"] for shard in split.shards),
                tokens=sum(shard["tokens"] for shard in split.shards),
                shards=[PackedShard(**shard) for shard in split.shards],
            )
            for name, split in splits.items()
        },
    )
