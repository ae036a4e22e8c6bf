"""Packing throughput beside `datasets.map` with the usual group-texts recipe, on the same text.

    python benchmarks/pack.py
    python benchmarks/pack.py --quick --json

Both start from the same JSON lines on disk and end with rows of 1,024 ids on disk, both with one process a
core; a repeat includes everything between, worker start-up too, as a user would see it. (Below 8 MB ours starts no
workers, so `--quick` has a little more.)

The limit is the tokenizers library alone: `encode_batch_fast` on a quarter of the same texts, which lie in memory, in
as many processes, its time taken per token; nothing is read, joined or written.
"""

import json
import logging
import multiprocessing
import os
import sys
import tempfile
from itertools import chain
from pathlib import Path

from common import arguments, interleaved, medians, ratio, report

LENGTH, PART = 1024, 4  # the limit's share of the texts is one in PART
_texts: list[str] = []  # what the limit's processes inherit


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
                if size >= megabytes * 1e6:
                    break
    return size


def pack_ours(corpus: Path, folder: Path, processes: int, tokenizer) -> int:
    from limbeck.config import DatasetConfig
    from limbeck.data.pack import pack

    config = DatasetConfig(name=str(corpus), max_length=LENGTH, validation_fraction=0.0, num_proc=processes)
    manifest = pack(config, tokenizer, folder)
    return manifest.splits["train"].tokens


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


def encode_part(job: tuple[str, int, int]) -> int:
    """Every `step`-th batch of the texts through the library; returns the number of ids."""
    from tokenizers import Tokenizer

    content, first, step = job
    tokenizer = Tokenizer.from_str(content)
    starts = range(64 * first, len(_texts), 64 * step)
    return sum(len(found) for start in starts for found in tokenizer.encode_batch_fast(_texts[start : start + 64]))


def encode_alone(corpus: Path, folder: Path, processes: int, tokenizer) -> int:
    jobs = [(tokenizer.json, first, processes * PART) for first in range(processes)]
    pool = multiprocessing.get_context("fork").Pool(processes)
    try:
        return sum(pool.map(encode_part, jobs, chunksize=1))
    finally:
        pool.close()
        pool.join()  # a process that has ended counts as CPU time


def main() -> int:
    options = arguments(__doc__).parse_args()
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    processes = len(os.sched_getaffinity(0))
    megabytes, repeats = (8.7, 5) if options.quick else (60, 5)
    counts = {}
    # Imports and the tokenizer itself are the same for both and not what is measured.
    import datasets

    from limbeck.data.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer("tiny-python")
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.jsonl"
        size = write_corpus(corpus, megabytes)
        with corpus.open() as lines:
            _texts.extend(json.loads(line)["text"] for line in lines)

        def case(name, function):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                counts[name] = function(corpus, Path(folder) / "out", processes, tokenizer)

        functions = {"limbeck": pack_ours, "datasets": pack_with_datasets, "tokenizers": encode_alone}
        found = interleaved({n: (lambda n=n, f=f: case(n, f)) for n, f in functions.items()}, repeats)
    return report(
        {
            "corpus_bytes": size,
            "processes": processes,
            "repeats": repeats,
            "tokens": counts,
            **medians(found),
            "tokens_per_s": {name: counts[name] / found[name].seconds for name in found},
        },
        options.json,
        {
            "throughput_ratio_vs_datasets": ratio(
                found["datasets"], found["limbeck"], counts["limbeck"] / counts["datasets"]
            ),
            "time_over_tokenizers_alone": ratio(
                found["limbeck"], found["tokenizers"], counts["tokenizers"] / counts["limbeck"]
            ),
        },
        headline=["throughput_ratio_vs_datasets"],
    )


if __name__ == "__main__":
    sys.exit(main())
