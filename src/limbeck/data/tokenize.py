"""Tokenise a stream of documents in several processes, in order.

The one idea: documents, the long ones in pieces, are sent in batches of about a megabyte to workers that hold only the
`tokenizers` object and answer with int32 arrays; a bounded window of batches keeps the order and the memory.
"""

import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

from limbeck.data.pieces import PieceEncoder
from limbeck.data.sources import Document
from limbeck.data.tokenizer import LoadedTokenizer

_BATCH_CHARACTERS = 1 << 20
_PARALLEL_FROM = 8  # batches; a smaller corpus is done before worker processes have started
_worker: PieceEncoder | None = None

Tagged = tuple[int, str, Document]


class Tokens(NamedTuple):
    """Ids of a document, or of a piece of one."""

    number: int
    split: str
    ids: np.ndarray
    last: bool  # the document ends with these


class _Piece(NamedTuple):
    number: int
    split: str
    text: str
    first: bool
    last: bool


def _start_worker(tokenizer_json: str, eos_id: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = PieceEncoder(tokenizer_json, eos_id)


def _work(pieces: list[tuple[str, bool, bool]]) -> list[np.ndarray]:
    assert _worker is not None
    return _worker.encode(pieces)


def tokenize_documents(
    documents: Iterable[Tagged], tokenizer: LoadedTokenizer, num_proc: int | None
) -> Iterator[Tokens]:
    """Ids of the documents, in order; a long document's come in several parts."""
    processes = num_proc or _cores()
    encoder = PieceEncoder(tokenizer.json, tokenizer.eos_id)
    batches = _text_batches(documents, encoder)
    head = list(islice(batches, _PARALLEL_FROM))
    if processes == 1 or len(head) < _PARALLEL_FROM:
        for batch in chain(head, batches):
            yield from _label(batch, encoder.encode(_texts(batch)))
        return
    arguments: Any = (tokenizer.json, tokenizer.eos_id)
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, arguments) as pool:
        window: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
        try:
            for batch in chain(head, batches):
                with _interrupts_held():
                    window.append((batch, pool.submit(_work, _texts(batch))))
                if len(window) > 3 * processes:
                    done, future = window.popleft()
                    yield from _label(done, future.result())
            for done, future in window:
                yield from _label(done, future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C is this process's: workers that start meanwhile never see it; here it comes a moment later."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _texts(batch: list[_Piece]) -> list[tuple[str, bool, bool]]:
    return [(piece.text, piece.first, piece.last) for piece in batch]


def _label(batch: list[_Piece], arrays: list[np.ndarray]) -> Iterator[Tokens]:
    for piece, ids in zip(batch, arrays, strict=True):
        yield Tokens(piece.number, piece.split, ids, piece.last)


def _text_batches(documents: Iterable[Tagged], encoder: PieceEncoder) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for number, split, document in documents:
        for text, first, last in encoder.pieces(document.chunks(), document.key):
            batch.append(_Piece(number, split, text, first, last))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
