"""Head + sampled tail: exact for the likeliest ids, unbiased for the rest.

The one idea: the m likeliest ids keep their probability; of the rest, n ids are drawn with replacement in
proportion to p and each draw stands for tail mass / n. The expectation of the weights is p, so the gradient
of Σ w log q is an unbiased estimate of the dense one (Random-Sampling KD, arXiv 2503.16870).

Shapes: N positions, V vocabulary, m head, n draws; K = m + n.
"""

import math
from collections.abc import Sequence

import torch

from limbeck.errors import ConfigError
from limbeck.targets.sparse import PAD_ID, Normaliser, SparseTargets


def sample_targets(
    logits: torch.Tensor,
    head: int,
    draws: int,
    temperatures: Sequence[float],
    temperature: float,
    generator: torch.Generator,
) -> SparseTargets:
    """Targets `[N, m + n]` from logits `[N, V]`, drawn at `temperature`; repeated draws share one place.

    Raises:
        ConfigError: the temperature is not declared, or m + n exceeds V.
    """
    vocab_size = logits.shape[-1]
    if temperature not in temperatures:
        raise ConfigError(f"sampling at temperature {temperature}, but only {list(temperatures)} are declared.")
    if head + draws > vocab_size:
        raise ConfigError(f"head {head} + draws {draws} exceed the vocabulary of {vocab_size} ids.")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    normaliser = Normaliser.of(logits, temperatures)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    head_ids = torch.topk(logits, head, dim=-1).indices
    head_p = probabilities.gather(-1, head_ids)
    tail = probabilities.scatter(-1, head_ids, 0.0)
    tail_mass = tail.sum(dim=-1, keepdim=True)
    # A row whose head holds everything has nothing to draw from; its draws are dropped below.
    drawn = torch.multinomial(torch.where(tail_mass > 0.0, tail, 1.0), draws, replacement=True, generator=generator)
    drawn, _ = drawn.sort(dim=-1)
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    counts = (drawn.unsqueeze(-1) == drawn.unsqueeze(-2)).sum(dim=-1)
    keep = first & (tail_mass > 0.0)
    ids = torch.cat([head_ids, torch.where(keep, drawn, PAD_ID)], dim=-1)
    weights = torch.cat([head_p, torch.where(keep, counts * tail_mass / draws, 0.0)], dim=-1)
    logprobs = torch.where(ids >= 0, normaliser.logprobs(logits.gather(-1, ids.clamp_min(0))), -math.inf)
    order = (ids < 0).to(torch.int8).argsort(dim=-1, stable=True)  # unused places to the end
    return SparseTargets(
        token_ids=ids.gather(-1, order).int(),
        logprobs=logprobs.gather(-1, order),
        log_z=normaliser.log_z,
        temperatures=tuple(temperatures),
        vocab_size=vocab_size,
        weights=weights.gather(-1, order),
        sampling_temperature=temperature,
    )
