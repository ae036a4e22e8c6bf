"""A teacher in this process: any Hugging Face causal LM, on its own device, without gradients.

The one idea: like the student's loss, targets are made inside the output embedding's forward, a chunk of
positions at a time, so the teacher's [B, T, V] logits never exist either.

Shapes: B rows, T positions, V vocabulary, K support.
"""

import copy
from typing import Any

import torch

from limbeck.config import SamplingConfig
from limbeck.data.dataset import PackedRows
from limbeck.errors import ConfigError
from limbeck.models import embedded_vocab_size, head_replaced, verified_transform
from limbeck.targets.sampling import sample_targets
from limbeck.targets.sparse import SparseTargets, concatenate

#: Logits projected at once: enough rows that the head's weights are not read over and over …
_CHUNK_BYTES = {"cpu": 160 << 20, "cuda": 512 << 20}
#: … and logits reduced at once: on a CPU, what stays in cache.
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


class LocalTeacher:
    """Runs a causal LM and keeps a sparse support of its predictions.

    Args:
        model: a causal LM of transformers; it is put in eval mode and never trained.
        top_k: ids kept per position; None keeps the vocabulary.
        temperatures: temperatures whose normaliser is exact in the targets.
        attention: per_document or packed, as for the student.
        sampling: head + sampled tail instead of top-k.
        sampling_temperature: the temperature the draws are made at; default the largest declared.
        max_batch_tokens: tokens in one forward pass.
        device: moved there once; default where the model is.

    Raises:
        ConfigError: K exceeds the vocabulary, or 1 is not among the temperatures.

    Example:
        >>> teacher = LocalTeacher(model, top_k=64, temperatures=(1.0, 2.0))
        >>> targets = teacher.targets(dataset.rows([0, 1]))  # [2, T, 64]
    """

    in_workers = False

    def __init__(
        self,
        model: Any,
        *,
        top_k: int | None = 64,
        temperatures: tuple[float, ...] = (1.0, 2.0),
        attention: str = "per_document",
        sampling: SamplingConfig | None = None,
        sampling_temperature: float | None = None,
        max_batch_tokens: int = 8192,
        device: str | torch.device | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if device is not None:
            self.model.to(device)
        self.vocab_size = embedded_vocab_size(model)
        self._budget = max_batch_tokens
        self._transform = verified_transform(model)
        self._ask(top_k, temperatures, attention, sampling, sampling_temperature)

    def asking(
        self,
        *,
        top_k: int | None,
        temperatures: tuple[float, ...],
        attention: str = "per_document",
        sampling: SamplingConfig | None = None,
        sampling_temperature: float | None = None,
    ) -> "LocalTeacher":
        """The same model asked for other targets; nothing is loaded or copied. Arguments and errors of the class."""
        other = copy.copy(self)
        other._ask(top_k, temperatures, attention, sampling, sampling_temperature)
        return other

    def _ask(
        self,
        top_k: int | None,
        temperatures: tuple[float, ...],
        attention: str,
        sampling: SamplingConfig | None,
        sampling_temperature: float | None,
    ) -> None:
        self.temperatures = tuple(temperatures)
        self.attention = attention
        self._top_k, self._sampling = top_k, sampling
        self._sampling_temperature = sampling_temperature or max(self.temperatures)
        if 1.0 not in self.temperatures:
            raise ConfigError(f"the declared temperatures are {list(temperatures)}; 1 must be one of them.")
        support = top_k if sampling is None else sampling.head + sampling.draws
        if support is not None and support > self.vocab_size:
            raise ConfigError(
                f"teacher.top_k (K) is {support} and the teacher's vocabulary has {self.vocab_size} ids. "
                "Lower teacher.top_k, or set it to null for the whole vocabulary."
            )

    @property
    def sampling_temperature(self) -> float | None:
        """The temperature of the draws, None without sampling."""
        return self._sampling_temperature if self._sampling is not None else None

    def template(self) -> SparseTargets:
        """Empty targets with this teacher's temperatures, vocabulary and sampling."""
        return SparseTargets.empty(self.temperatures, self.vocab_size, self.sampling_temperature)

    @torch.no_grad()
    def targets(self, rows: PackedRows) -> SparseTargets:
        """Targets `[B, T, ...]` of the rows, in as many passes as the token budget asks for."""
        length = rows.input_ids.shape[1]
        step = max(1, self._budget // length)
        parts = [self._pass(rows.slice(start, start + step)) for start in range(0, len(rows.input_ids), step)]
        return concatenate(parts)

    @torch.no_grad()
    def logits(self, rows: PackedRows) -> torch.Tensor:
        """The model's own logits `[B, T, V]` in float32, on the CPU; for vocabularies and rows that are small."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            outputs = self.model(**rows.to(device).model_inputs(self.attention))
        logits: torch.Tensor = outputs.logits.float().cpu()
        return logits

    def _pass(self, rows: PackedRows) -> SparseTargets:
        device = next(self.model.parameters()).device
        moved = rows.to(device)
        head = self.model.get_output_embeddings()
        found: list[SparseTargets] = []

        def targets_of(hidden: torch.Tensor) -> torch.Tensor:
            found.append(self._from_hidden(hidden, head, rows.row_ids))
            return hidden[..., :1]

        # Autocast is the student's; the teacher speaks in the precision of its own weights.
        with torch.autocast(device.type, enabled=False), head_replaced(head, targets_of):
            self.model(**moved.model_inputs(self.attention))
        shape = moved.input_ids.shape
        return found[0].with_tensors({n: t.reshape(*shape, t.shape[-1]) for n, t in found[0].tensors().items()})

    def _from_hidden(self, hidden: torch.Tensor, head: Any, row_ids: torch.Tensor) -> SparseTargets:
        rows, length, width = hidden.shape
        if self._sampling is not None:  # the draws of a row depend on its number alone, not on its batch
            return concatenate([self._sampled(self._logits(hidden[i], head), int(row_ids[i])) for i in range(rows)])
        flat, kind = hidden.reshape(-1, width), hidden.device.type
        chunk = min(_rows(_CHUNK_BYTES, kind, self.vocab_size), 512 if kind == "cpu" else rows * length)
        block = _rows(_BLOCK_BYTES, kind, self.vocab_size)
        parts = []
        for start in range(0, rows * length, chunk):
            logits = self._logits(flat[start : start + chunk], head)
            parts += [
                SparseTargets.from_logits(logits[i : i + block], self._top_k, self.temperatures)
                for i in range(0, len(logits), block)
            ]
        return concatenate(parts)

    def _logits(self, hidden: torch.Tensor, head: Any) -> torch.Tensor:
        logits: torch.Tensor = self._transform(torch.nn.functional.linear(hidden, head.weight, head.bias).float())
        return logits

    def _sampled(self, logits: torch.Tensor, row_id: int) -> SparseTargets:
        sampling = self._sampling
        assert sampling is not None
        generator = torch.Generator(logits.device).manual_seed((sampling.seed << 32) + row_id + 1)
        return sample_targets(
            logits, sampling.head, sampling.draws, self.temperatures, self._sampling_temperature, generator
        )


def _rows(budget: dict[str, int], kind: str, vocab_size: int) -> int:
    """Rows of float32 logits that fit a budget of bytes, at least one."""
    return max(1, budget.get(kind, budget["cuda"]) // (4 * vocab_size))
