"""A teacher in this process: any Hugging Face causal LM, on its own device, without gradients.

The one idea: like the student's loss, targets are made inside the output embedding's forward, a chunk of
positions at a time, so the teacher's [B, T, V] logits never exist either.

Shapes: B rows, T positions, V vocabulary, K support.
"""

import contextlib
import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from limbeck.config import SamplingConfig
from limbeck.config.base import default
from limbeck.config.teacher import LocalTeacherConfig
from limbeck.data.dataset import PackedRows
from limbeck.errors import ConfigError
from limbeck.losses.router import RouterTap, Routing
from limbeck.models import (
    OutputHead,
    head_replaced,
    keeps_documents_apart,
    last_hidden_states,
    refuse_mixed_documents,
    verified_transform,
)
from limbeck.targets.sampling import sample_targets
from limbeck.targets.sparse import SparseTargets, concatenate
from limbeck.targets.spec import TargetSpec
from limbeck.teachers.base import Teacher

#: Logits projected at once: enough rows that the head's weights are not read over and over …
_CHUNK_BYTES = {"cpu": 160 << 20, "cuda": 512 << 20}
#: … and logits reduced at once: on a CPU, what stays in cache.
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


class LocalTeacher(Teacher):
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
        vocab_size: ids from here on are padding of the embedding (the tokenizer has no token for them) and get
            probability 0; default: the model's logits are all tokens.
        identity: what the model is known by.

    Raises:
        ConfigError: K exceeds the vocabulary, 1 is not among the temperatures, or `attention` is per_document and the
            model does not keep the documents of a row apart.

    Example:
        >>> teacher = LocalTeacher(model, top_k=64, temperatures=(1.0, 2.0))
        >>> targets = teacher.targets(dataset.rows([0, 1]))  # [2, T, 64]
    """

    def __init__(
        self,
        model: Any,
        *,
        top_k: int | None = TargetSpec.top_k,
        temperatures: tuple[float, ...] = TargetSpec.temperatures,
        attention: str = "per_document",
        sampling: SamplingConfig | None = None,
        sampling_temperature: float | None = None,
        max_batch_tokens: int = default(LocalTeacherConfig, "max_batch_tokens"),
        device: str | torch.device | None = None,
        vocab_size: int | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if device is not None:
            self.model.to(device)
        verified_transform(model)
        self._head = OutputHead(model, vocab_size)
        self.vocab_size = self._head.vocab_size
        self._budget = max_batch_tokens
        self.identity = identity
        self._tap: RouterTap | None = None
        self._give(TargetSpec(top_k, tuple(temperatures), attention, sampling, sampling_temperature))

    def with_spec(self, spec: TargetSpec) -> "LocalTeacher":
        """The same model giving other targets; nothing is loaded or copied. Raises as the class does."""
        other = copy.copy(self)
        other._give(spec)
        return other

    def _give(self, spec: TargetSpec) -> None:
        self.spec, self.temperatures, self.attention = spec, spec.temperatures, spec.attention
        if spec.attention == "per_document" and not self.keeps_documents_apart:
            refuse_mixed_documents(self.model, "teacher")
        spec.check(self.vocab_size)

    @cached_property
    def keeps_documents_apart(self) -> bool:
        """True when the model can do `attention: per_document`."""
        return keeps_documents_apart(self.model)

    def template(self) -> SparseTargets:
        """Empty targets with this teacher's temperatures, vocabulary and sampling."""
        return SparseTargets.empty(self.temperatures, self.vocab_size, self.spec.sampling_temperature)

    @torch.no_grad()
    def targets(self, rows: PackedRows) -> SparseTargets:
        """Targets `[B, T, ...]` of the rows, in as many passes as the token budget asks for."""
        length = rows.input_ids.shape[1]
        step = max(1, self._budget // length)
        parts, decided = [], []
        for start in range(0, len(rows.input_ids), step):
            with contextlib.nullcontext() if self._tap is None else self._tap.recording():
                parts.append(self._pass(rows.slice(start, start + step)))
                decided.append([] if self._tap is None else self._tap.routings())
        if self._tap is not None:
            self.routings = [_joined(layer) for layer in zip(*decided, strict=True)]
        return concatenate(parts)

    def watch_routers(self) -> None:
        """Keep from now on what the routers decide, as `routings`.

        Raises:
            ConfigError: there are none, or they cannot be read.
        """
        if self._tap is not None:
            return
        tap = RouterTap(self.model)
        with tap.recording():
            verified_transform(self.model)  # a few tokens pass
            tap.learn()
        if not tap.routers or tap.problem is not None:
            why = tap.problem or f"{type(self.model).__name__} has no routed experts"
            raise ConfigError(f"loss.objectives names router_kd, and the teacher's routers cannot be read: {why}.")
        self._tap = tap

    @torch.no_grad()
    def logits(self, rows: PackedRows) -> torch.Tensor:
        """The model's own logits `[B, T, V]` in float32, on the CPU; for vocabularies and rows that are small."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            outputs = self.model(**rows.to(device).model_inputs(self.spec.attention))
        logits: torch.Tensor = outputs.logits[..., : self.vocab_size].float().cpu()
        return logits

    @torch.no_grad()
    def reference(self, rows: PackedRows) -> "LocalReference":
        """The whole distributions of the rows, made a few positions at a time when they are asked for."""
        device = next(self.model.parameters()).device
        step = max(1, self._budget // rows.input_ids.shape[1])
        parts = [rows.slice(start, start + step).to(device) for start in range(0, len(rows.input_ids), step)]
        with torch.autocast(device.type, enabled=False):
            hidden = torch.cat([last_hidden_states(self.model, **p.model_inputs(self.spec.attention)) for p in parts])
        return LocalReference(hidden.reshape(-1, hidden.shape[-1]), self._head)

    def _pass(self, rows: PackedRows) -> SparseTargets:
        device = next(self.model.parameters()).device
        moved = rows.to(device)
        head = self.model.get_output_embeddings()
        found: list[SparseTargets] = []

        def targets_of(hidden: torch.Tensor) -> torch.Tensor:
            found.append(self._from_hidden(hidden, rows))
            return hidden[..., :1]

        # Autocast is the student's; the teacher speaks in the precision of its own weights.
        with torch.autocast(device.type, enabled=False), head_replaced(head, targets_of):
            self.model(**moved.model_inputs(self.spec.attention))
        shape = moved.input_ids.shape
        return found[0].with_tensors({n: t.reshape(*shape, t.shape[-1]) for n, t in found[0].tensors().items()})

    def _from_hidden(self, hidden: torch.Tensor, batch: PackedRows) -> SparseTargets:
        rows, length, width = hidden.shape
        if self.spec.sampling is not None:  # the draws of a row depend on the row alone, not on its batch
            drawn = (self._sampled(self._head.logits(hidden[i]), batch.slice(i, i + 1)) for i in range(rows))
            return concatenate(list(drawn))
        flat, kind = hidden.reshape(-1, width), hidden.device.type
        chunk = self._head.positions_in(_CHUNK_BYTES.get(kind, _CHUNK_BYTES["cuda"]))
        chunk = min(chunk, 512 if kind == "cpu" else rows * length)
        block = self._head.positions_in(_BLOCK_BYTES.get(kind, _BLOCK_BYTES["cuda"]))
        return concatenate([
            SparseTargets.from_logits(logits[i : i + block], self.spec.top_k, self.temperatures)
            for _, logits in self._head.walk(flat, chunk)
            for i in range(0, len(logits), block)
        ])  # fmt: skip

    def _sampled(self, logits: torch.Tensor, row: PackedRows) -> SparseTargets:
        sampling, temperature = self.spec.sampling, self.spec.sampling_temperature
        assert sampling is not None
        assert temperature is not None
        generator = torch.Generator(logits.device).manual_seed(_row_seed(sampling.seed, row))
        return sample_targets(logits, sampling.head, sampling.draws, self.temperatures, temperature, generator)


@dataclass(frozen=True)
class LocalReference:
    """Whole next-token distributions of N positions: their hidden states `[N, D]` and the head above them."""

    hidden: torch.Tensor
    head: OutputHead

    def log_probs(self, positions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[n, V]` in float32 at the given positions."""
        with torch.autocast(self.hidden.device.type, enabled=False):  # it is the student's
            found: torch.Tensor = self.head.log_probs(self.hidden[positions.to(self.hidden.device)])
        return found


def _joined(parts: Sequence[Routing]) -> Routing:
    """What one layer decided in several passes."""
    logits, chosen = (torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "chosen"))
    return Routing(logits, chosen, parts[0].sigmoid)


def _row_seed(seed: int, row: PackedRows) -> int:
    """The seed of a row's draws: by its number, or by its tokens where it has none; filler does not count."""
    number = int(row.row_ids[0])
    if number >= 0:
        return (seed << 32) + number + 1
    content = row.input_ids[0][row.doc_ids[0] >= 0].cpu().numpy().astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little") + content).digest()[:8], "little") >> 1
