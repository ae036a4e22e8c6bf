"""A GGUF model as something that is scored: its log-probabilities for packed rows, through the engine."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from limbeck.config.engine import EngineConfig
from limbeck.data.dataset import PackedRows
from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.errors import MismatchError
from limbeck.serving.model import GgufModel


class ScoredGguf:
    """What `score_model` needs of a model.

    Args:
        path: a GGUF file.
        settings: of the engine.
        tokenizer: the data's, whose ids the rows hold.

    Raises:
        MismatchError: the file's tokens are others.
    """

    def __init__(self, path: Path, settings: EngineConfig, tokenizer: LoadedTokenizer) -> None:
        self._model = GgufModel(path, settings)
        ours = self._model.tokenizer.tokens
        theirs = {number: token for token, number in tokenizer.hf.get_vocab().items()}
        wrong = next((number for number, token in theirs.items() if number >= len(ours) or ours[number] != token), None)
        if wrong is not None:
            held = ours[wrong] if wrong < len(ours) else "nothing"
            raise MismatchError(
                f"{path} has {held!r} as token {wrong} and the data's tokenizer {theirs[wrong]!r}. Score it on rows "
                "that were packed with its own tokenizer."
            )

    def eval(self) -> "ScoredGguf":
        """As a torch model has it."""
        return self

    def predictions(
        self, rows: PackedRows, places: torch.Tensor, attention: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Flat positions, their log-probabilities `[N, V]`, and the seconds that took; a document at a time.

        Args:
            rows: packed rows `[B, T]`.
            places: the flat positions that are wanted.
            attention: per_document: each document is a text of its own; packed: each row is.
        """
        wanted = torch.zeros(rows.input_ids.numel(), dtype=torch.bool)
        wanted[places] = True
        length = rows.input_ids.shape[1]
        for row, ids in enumerate(rows.input_ids):
            for start, stop in _stretches(rows.doc_ids[row], attention):
                here = wanted[row * length + start : row * length + stop].nonzero().squeeze(-1)
                if not len(here):
                    continue
                began = time.perf_counter()
                logits = self._model.line().extend(ids[start:stop].tolist(), every=True)
                log_q = torch.from_numpy(logits)[here].log_softmax(dim=-1)
                yield here + row * length + start, log_q, time.perf_counter() - began


def _stretches(documents: torch.Tensor, attention: str) -> Iterator[tuple[int, int]]:
    """Where each text of a row begins and ends; filler is none."""
    length = int((documents >= 0).sum())
    if attention == "packed":
        if length:
            yield 0, length
        return
    start = 0
    for place in range(1, length + 1):
        if place == length or documents[place] != documents[start]:
            yield start, place
            start = place
