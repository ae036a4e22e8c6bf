"""Packing throughput beside `datasets.map` with the usual group-texts recipe, on the same text.

    python benchmarks/pack.py

Both start from the same JSON lines on disk and end with rows of 1,024 ids on disk, both with one process a
core; a repeat includes everything between, worker start-up too, as a user would see it.
"""

import json
import logging
import os
import tempfile
from itertools import chain
from pathlib import Path

from common import arguments, interleaved, report

LENGTH = 1024


def write_corpus(path: Path, megabytes: float) -> int:
    """Standard-library sources, repeated up to the size, one JSON line a module; returns its bytes."""
    from limbeck.data.sources import stdlib_source

    documents = list(stdlib_source().documents())
    size = 0
    with path.open("w") as lines:
        while size < megabytes * 1e6:
            for document in documents:
                lines.write(json.dumps({"text": document.text}) + "\n")
                size += len(document.text)
    return size


def pack_ours(corpus: Path, folder: Path, processes: int, tokenizer) -> int:
    from limbeck.config import DatasetConfig
    from limbeck.data.pack import pack

    config = DatasetConfig(name=str(corpus), max_length=LENGTH, validation_fraction=0.0, num_proc=processes)
    manifest = pack(config, tokenizer, folder)
    return manifest["splits"]["train"]["tokens"]


def pack_with_datasets(corpus: Path, folder: Path, processes: int, tokenizer) -> int:
    import datasets

    hf, eos = tokenizer.hf, tokenizer.hf.eos_token

    def tokenize(batch):
        return hf([text + eos for text in batch["text"]])

    def group_texts(batch):
        joined = {key: list(chain(*batch[key])) for key in batch}
        total = len(joined["input_ids"]) // LENGTH * LENGTH
        grouped = {key: [value[i : i + LENGTH] for i in range(0, total, LENGTH)] for key, value in joined.items()}
        grouped["labels"] = grouped["input_ids"].copy()
        return grouped

    cache = str(folder / "cache")
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=cache)
    rows = rows.map(tokenize, batched=True, num_proc=processes, remove_columns=["text"])
    rows = rows.map(group_texts, batched=True, num_proc=processes)
    rows.to_parquet(folder / "packed.parquet")
    return len(rows) * LENGTH


def main() -> None:
    options = arguments(__doc__).parse_args()
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    processes = len(os.sched_getaffinity(0))
    megabytes, repeats = (20, 1) if options.quick else (60, 3)
    counts = {}
    # Imports and the tokenizer itself are the same for both and not what is measured.
    import datasets

    from limbeck.data.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer("tiny-python")
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.jsonl"
        size = write_corpus(corpus, megabytes)

        def case(name, function):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                counts[name] = function(corpus, Path(folder) / "out", processes, tokenizer)

        seconds = interleaved(
            {
                "limbeck": lambda: case("limbeck", pack_ours),
                "datasets": lambda: case("datasets", pack_with_datasets),
            },
            repeats,
        )
    report(
        {
            "corpus_bytes": size,
            "processes": processes,
            "tokens": counts,
            "seconds": seconds,
            "tokens_per_s": {name: counts[name] / seconds[name] for name in seconds},
            "throughput_ratio_vs_datasets": (counts["limbeck"] / seconds["limbeck"])
            / (counts["datasets"] / seconds["datasets"]),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
