"""SparseTargets: a teacher's next-token distributions on a support of K ids a position.

The one idea: log-probabilities at temperature 1 on the support, and log Z_tau over the *whole* vocabulary
for each declared temperature tau, give the exact tempered probability of every stored id,
p_tau(i) = exp(l_i / tau - log Z_tau), and the exact mass of the rest. Local, cached and remote teachers all
end in this one type, and every loss starts from it.

Alignment: row t is the distribution of token t+1 given tokens 0..t.
Shapes: `...` any leading dimensions (usually [B, T] or [N]), K support, V vocabulary, n_tau temperatures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from limbeck.errors import ConfigError, MismatchError

PAD_ID = -1


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's predictions on a sparse support.

    Attributes:
        token_ids: `[..., K]` int32; -1 marks unused places at the end of a row (K may vary per position; a row
            without any id says nothing, and its divergence is 0).
        logprobs: `[..., K]` float; natural log-probabilities at temperature 1, -inf in unused places.
        log_z: `[..., n_tau]` float; logsumexp over the whole vocabulary of l_v / tau, per declared temperature.
        temperatures: the declared temperatures, in the order of `log_z`.
        vocab_size: V, the number of ids the teacher gives probability to.
        weights: `[..., K]` float or None. For head + sampled tail: estimates of p whose expectation is p
            (arXiv 2503.16870); None when the support is deterministic.
        sampling_temperature: the temperature the draws were made at, with `weights`.

    Example:
        >>> logits = torch.randn(2, 5, 100)
        >>> targets = SparseTargets.from_logits(logits, top_k=8, temperatures=(1.0, 2.0))
        >>> logp, log_tail = targets.at_temperature(2.0)  # [2, 5, 8], [2, 5]
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    log_z: torch.Tensor
    temperatures: tuple[float, ...]
    vocab_size: int
    weights: torch.Tensor | None = None
    sampling_temperature: float | None = None

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.logprobs.shape:
            raise ValueError(
                f"token_ids has shape {tuple(self.token_ids.shape)} and logprobs {tuple(self.logprobs.shape)}; "
                "they must be equal"
            )
        wanted = (*self.token_ids.shape[:-1], len(self.temperatures))
        if tuple(self.log_z.shape) != wanted:
            raise ValueError(f"log_z has shape {tuple(self.log_z.shape)}, expected {wanted} (one value a temperature)")
        if self.top_k > self.vocab_size:
            raise ConfigError(f"K is {self.top_k} and the vocabulary has {self.vocab_size} ids; K must not exceed it")

    @classmethod
    def empty(
        cls, temperatures: tuple[float, ...], vocab_size: int, sampling_temperature: float | None = None
    ) -> "SparseTargets":
        """Targets of no position: what `with_tensors` fills when only the tensors have travelled."""
        return cls(
            token_ids=torch.zeros(0, 0, dtype=torch.int32),
            logprobs=torch.zeros(0, 0),
            log_z=torch.zeros(0, len(temperatures)),
            temperatures=temperatures,
            vocab_size=vocab_size,
            weights=torch.zeros(0, 0) if sampling_temperature is not None else None,
            sampling_temperature=sampling_temperature,
        )

    @property
    def top_k(self) -> int:
        """K, the largest support of a position."""
        return int(self.token_ids.shape[-1])

    @property
    def valid(self) -> torch.Tensor:
        """`[..., K]` bool: places that hold an id."""
        return self.token_ids >= 0

    @classmethod
    def from_logits(
        cls, logits: torch.Tensor, top_k: int | None, temperatures: Sequence[float] = (1.0,)
    ) -> "SparseTargets":
        """The `top_k` likeliest ids (all of them when None) of `[..., V]` logits, most likely first."""
        vocab_size = logits.shape[-1]
        if top_k is not None and top_k > vocab_size:
            raise ConfigError(f"K is {top_k} and the vocabulary has {vocab_size} ids; K must not exceed it")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        normaliser = Normaliser.of(logits, temperatures)
        values, ids = torch.topk(logits, top_k or vocab_size, dim=-1)
        return cls(
            token_ids=torch.where(values == -math.inf, PAD_ID, ids).int(),
            logprobs=normaliser.logprobs(values),
            log_z=normaliser.log_z,
            temperatures=tuple(temperatures),
            vocab_size=vocab_size,
        )

    def at_temperature(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log p_tau on the support `[..., K]` and the log of the remaining mass `[...]` (-inf when none).

        Raises:
            ConfigError: the temperature was not declared (names those that were), or the targets carry
                draws made at another temperature.
        """
        if self.weights is not None and temperature != self.sampling_temperature:
            raise ConfigError(
                f"temperature {temperature} was asked for and the tail was sampled at {self.sampling_temperature}. "
                "Use that temperature, or make targets without sampling."
            )
        if temperature not in self.temperatures:
            raise ConfigError(
                f"temperature {temperature} is not declared; these targets hold {list(self.temperatures)}. "
                "Use one of them, or make the targets again with teacher.temperatures."
            )
        log_z = self.log_z[..., self.temperatures.index(temperature)].unsqueeze(-1)
        log_p = self.logprobs / temperature - log_z
        # 1 - sum cancels when little is left; in float64 the error is that of the inputs alone: half a rounding of
        # each log-probability. A tail below it cannot be told from one of that size.
        p = log_p.double().exp()
        felt = torch.where(self.valid, p * log_p.double().abs(), 0.0).sum(dim=-1)
        tail = (1.0 - p.sum(dim=-1)).maximum(felt * (torch.finfo(log_p.dtype).eps / 2.0))
        whole = self.valid.sum(dim=-1) >= self.vocab_size
        return log_p, torch.where(whole, 0.0, tail.clamp(0.0, 1.0)).log().to(log_p.dtype)

    def to_dense(self, vocab_size: int | None = None, temperature: float = 1.0) -> torch.Tensor:
        """Probabilities over the whole vocabulary `[..., V]`; the tail is spread evenly over the other ids."""
        size = vocab_size or self.vocab_size
        log_p, log_tail = self.at_temperature(temperature)
        others = (self.vocab_size - self.valid.sum(dim=-1)).clamp_min(1)
        dense = (log_tail.exp() / others).unsqueeze(-1).repeat(*[1] * log_tail.dim(), size)
        dense[..., self.vocab_size :] = 0.0
        values = torch.where(self.valid, log_p.exp(), 0.0)
        # Unused places write to a column of their own, so that they never touch id 0.
        dense = torch.cat([dense, dense.new_zeros(*dense.shape[:-1], 1)], dim=-1)
        index = torch.where(self.valid, self.token_ids, size).long()
        return dense.scatter(-1, index, values)[..., :size]

    def restrict_vocabulary(self, vocab_size: int) -> "SparseTargets":
        """The same distributions with ids of `vocab_size` and above at probability 0.

        For a student whose embedding is padded less than the teacher's: those ids stand for no token. The
        normalisers lose the dropped ids' mass exactly.

        Raises:
            MismatchError: the dropped ids hold over 1 % of the mass somewhere, so they are no padding.
        """
        if vocab_size >= self.vocab_size:
            return self
        keep = self.valid & (self.token_ids < vocab_size)
        dropped = self.valid & ~keep
        if not bool(dropped.any()) and self.top_k <= vocab_size:
            return self._replace(vocab_size=vocab_size)
        log_z = []
        for index, temperature in enumerate(self.temperatures):
            log_p = self.logprobs / temperature - self.log_z[..., index : index + 1]
            lost = torch.where(dropped, log_p.exp(), 0.0).sum(dim=-1)
            if lost.numel() and float(lost.max()) > 0.01:
                raise MismatchError(
                    f"the teacher gives {float(lost.max()):.3f} of its probability to ids of {vocab_size} and above, "
                    f"which the student (vocab_size {vocab_size}) does not have. Use a student with the teacher's "
                    "vocabulary."
                )
            log_z.append(self.log_z[..., index] + torch.log1p(-lost))
        # l_i stays as it was: p_1(i) = exp(l_i - log Z_1), and log Z_1 is now slightly below 0.
        order = keep.logical_not().to(torch.int8).argsort(dim=-1, stable=True)[..., :vocab_size]  # unused places last
        fills = {"token_ids": PAD_ID, "logprobs": -math.inf, "weights": 0.0}
        changed = {
            name: torch.where(keep, tensor, fills[name]).gather(-1, order)
            for name, tensor in self.tensors().items()
            if name in fills
        }
        return self._replace(**changed, log_z=torch.stack(log_z, dim=-1), vocab_size=vocab_size)

    def narrowed(self, top_k: int | None = None, temperatures: Sequence[float] | None = None) -> "SparseTargets":
        """The same distributions on fewer ids (the likeliest), at fewer temperatures; exact, as is what remains.

        Raises:
            ConfigError: the support was drawn, so that none of it can be left out, or a temperature is not declared.
        """
        found = self
        if temperatures is not None and tuple(temperatures) != self.temperatures:
            absent = [value for value in temperatures if value not in self.temperatures]
            if absent:
                raise ConfigError(f"temperature {absent[0]} is not declared; there are {list(self.temperatures)}.")
            columns = [self.temperatures.index(value) for value in temperatures]
            found = found._replace(log_z=found.log_z[..., columns], temperatures=tuple(temperatures))
        if top_k is not None and top_k < self.top_k:
            if self.weights is not None:
                raise ConfigError("these targets were drawn; their ids cannot be reduced to the likeliest.")
            order = found.logprobs.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
            kept = {name: getattr(found, name).gather(-1, order) for name in ("token_ids", "logprobs")}
            found = found._replace(**kept)
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name: what a data loader carries from worker to trainer."""
        named = {"token_ids": self.token_ids, "logprobs": self.logprobs, "log_z": self.log_z}
        return named if self.weights is None else {**named, "weights": self.weights}

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "SparseTargets":
        """Other tensors under the same temperatures, vocabulary and sampling."""
        return self._replace(**tensors)

    def __getitem__(self, index: slice | torch.Tensor) -> "SparseTargets":
        """Positions chosen by an index over the leading dimensions."""
        return self.with_tensors({name: tensor[index] for name, tensor in self.tensors().items()})

    def flatten(self) -> "SparseTargets":
        """The same targets with one leading dimension `[N, ...]`."""
        return self.with_tensors({name: t.reshape(-1, t.shape[-1]) for name, t in self.tensors().items()})

    def to(self, device: torch.device | str) -> "SparseTargets":
        """The same targets on another device."""
        return self.with_tensors({name: t.to(device, non_blocking=True) for name, t in self.tensors().items()})

    def _replace(self, **changes: object) -> "SparseTargets":
        return SparseTargets(**{**self.__dict__, **changes})


@dataclass(frozen=True)
class Normaliser:
    """What turns logits into log-probabilities, without a difference of large numbers.

    Attributes:
        top: `[..., 1]` the largest logit.
        log_sum: `[..., 1]` log Σ exp(z − top); small where one id has nearly all the mass, and exact there.
        log_z: `[..., n_tau]` log Z_tau = logsumexp_v(l_v / tau) of the log-probabilities l.
    """

    top: torch.Tensor
    log_sum: torch.Tensor
    log_z: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, temperatures: Sequence[float]) -> "Normaliser":
        """Normalisers of `[..., V]` logits, in as few passes over them as can be."""
        top, best = logits.max(dim=-1, keepdim=True)
        top = torch.where(top > -math.inf, top, 0.0)
        wanted = sorted({1.0, *temperatures}, reverse=True)
        sums: dict[float, torch.Tensor] = {}
        buffer, held = torch.empty_like(logits), 0.0
        for temperature in wanted:
            if held == 2.0 * temperature:  # exp(z/τ) = exp(z/2τ)²: the next exponentials are a product away
                buffer.mul_(buffer)
            else:
                torch.sub(logits, top, out=buffer)
                (buffer if temperature == 1.0 else buffer.mul_(1.0 / temperature)).exp_()
                buffer.scatter_(-1, best, 0.0)  # the largest is 1; beside it a sum of 1e-9 would be rounded away
            held = temperature
            sums[temperature] = buffer.sum(dim=-1, keepdim=True).log1p()
        columns = [sums[temperature] - sums[1.0] / temperature for temperature in temperatures]
        return cls(top, sums[1.0], torch.cat(columns, dim=-1))

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities at temperature 1 of some of the logits `[..., K]`."""
        return (logits - self.top) - self.log_sum


def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Targets of several batches of rows as one, supports padded to the widest."""
    width = max(part.top_k for part in parts)
    fill = {"token_ids": PAD_ID, "logprobs": -math.inf, "weights": 0.0}
    named: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for name, tensor in part.tensors().items():
            if name in fill:
                tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=fill[name])
            named.setdefault(name, []).append(tensor)
    return parts[0].with_tensors({name: torch.cat(tensors) for name, tensors in named.items()})
