"""Tokenise a stream of documents in several processes, in order.

The one idea: documents are sent in batches of about a megabyte to workers that hold only the `tokenizers`
object and answer with int32 arrays; a bounded window of batches keeps the order and the memory.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np

from limbeck.data.sources import Document
from limbeck.data.tokenizer import LoadedTokenizer

_BATCH_CHARACTERS = 1 << 20
_PARALLEL_FROM = 8  # batches; a smaller corpus is done before worker processes have started
_worker_encode: Callable[[list[str]], list[np.ndarray]] | None = None

Tagged = tuple[int, str, Document]


def make_encoder(tokenizer_json: str, eos_id: int) -> Callable[[list[str]], list[np.ndarray]]:
    """A function from texts to int32 arrays: the tokenizer's own ids, ending with the end-of-text id.

    Special tokens that the tokenizer adds by itself (a leading BOS) stay; text that looks like a special
    token is encoded as the tokenizer encodes it.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)

    def encode(texts: list[str]) -> list[np.ndarray]:
        arrays = []
        for encoding in tokenizer.encode_batch_fast(texts):
            ids = encoding.ids
            if not ids or ids[-1] != eos_id:
                ids.append(eos_id)
            arrays.append(np.array(ids, dtype=np.int32))
        return arrays

    return encode


def _start_worker(tokenizer_json: str, eos_id: int) -> None:
    global _worker_encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encode = make_encoder(tokenizer_json, eos_id)


def _work(texts: list[str]) -> list[np.ndarray]:
    assert _worker_encode is not None
    return _worker_encode(texts)


def tokenize_documents(
    documents: Iterable[Tagged], tokenizer: LoadedTokenizer, num_proc: int | None
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield (number, split, ids) for each document, in order."""
    processes = num_proc or _cores()
    batches = _batches(documents)
    head = list(islice(batches, _PARALLEL_FROM))
    encode = make_encoder(tokenizer.json, tokenizer.eos_id)
    if processes == 1 or len(head) < _PARALLEL_FROM:
        for batch in (*head, *batches):
            yield from _label(batch, encode([document.text for _, _, document in batch]))
        return
    arguments: Any = (tokenizer.json, tokenizer.eos_id)
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, arguments) as pool:
        window: deque[tuple[list[Tagged], Future[list[np.ndarray]]]] = deque()
        for batch in _chain(head, batches):
            window.append((batch, pool.submit(_work, [document.text for _, _, document in batch])))
            if len(window) > 3 * processes:
                done, future = window.popleft()
                yield from _label(done, future.result())
        for done, future in window:
            yield from _label(done, future.result())


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _chain(head: list[list[Tagged]], rest: Iterator[list[Tagged]]) -> Iterator[list[Tagged]]:
    yield from head
    yield from rest


def _label(batch: list[Tagged], arrays: list[np.ndarray]) -> Iterator[tuple[int, str, np.ndarray]]:
    for (number, split, _), ids in zip(batch, arrays, strict=True):
        yield number, split, ids


def _batches(documents: Iterable[Tagged]) -> Iterator[list[Tagged]]:
    batch: list[Tagged] = []
    size = 0
    for tagged in documents:
        batch.append(tagged)
        size += len(tagged[2].text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
