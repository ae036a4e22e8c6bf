"""Is an answer a distribution over the right vocabulary? Asked of every one before it is learnt from."""

import torch

from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.http import WrongAnswerError

_SLACK = 1e-2  # float16 and int8 log-probabilities sum to 1 within this
_NORMALISER_SLACK = 0.1  # nats; int8 log-probabilities at two temperatures give a normaliser within this


def check_targets(targets: SparseTargets, source: str) -> None:
    """Refuse targets that no model could have given.

    Args:
        targets: leading shape [B, T].
        source: who gave them, for the message.

    Raises:
        WrongAnswerError: NaN or infinite values, ids outside the vocabulary or twice in a position, probabilities that
            sum above 1, or normalisers that no tail could give; with the row and position of the first.
    """
    valid, ids = targets.valid, targets.token_ids
    _refuse(
        valid & (ids >= targets.vocab_size), source,
        lambda at: f"names id {int(ids[at])}, and the vocabulary has {targets.vocab_size} ids. If the model's logits "
        "are wider than the tokenizer, set teacher.vocab_size to its config's; else it is another model",
    )  # fmt: skip
    finite = torch.isfinite(targets.logprobs) | ~valid
    _refuse(~finite, source, lambda at: f"gives the log-probability {float(targets.logprobs[at])}")
    _refuse(~torch.isfinite(targets.log_z), source, lambda at: f"gives the normaliser {float(targets.log_z[at])}")
    ordered = torch.where(valid, ids, -1 - torch.arange(ids.shape[-1], dtype=ids.dtype)).sort(dim=-1).values
    _refuse(
        (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0), source,
        lambda at: f"names id {int(ordered[..., 1:][at])} twice",
    )  # fmt: skip
    mass_at_1 = torch.where(valid, targets.logprobs, -torch.inf).exp().sum(dim=-1)
    for index, temperature in enumerate(targets.temperatures):
        log_p = torch.where(valid, targets.logprobs / temperature - targets.log_z[..., index : index + 1], -torch.inf)
        mass = log_p.exp().sum(dim=-1)
        _refuse(
            mass > 1.0 + _SLACK, source,
            lambda at, mass=mass, tau=temperature: f"gives probabilities that sum to {float(mass[at]):.3f} at "
            f"temperature {tau:g}: logits instead of log-probabilities, or another temperature",
        )  # fmt: skip
        log_z = targets.log_z[..., index]
        slack = 1e-3 if temperature == 1.0 else _NORMALISER_SLACK
        wrong = (log_z - _bounded(targets, mass_at_1, log_z, temperature)).abs() > slack
        _refuse(
            wrong & valid.any(dim=-1), source,
            lambda at, found=log_z, tau=temperature: f"gives the normaliser {float(found[at]):.4f} at temperature "
            f"{tau:g}, which no distribution with these probabilities has",
        )  # fmt: skip


def _bounded(targets: SparseTargets, mass_at_1: torch.Tensor, log_z: torch.Tensor, temperature: float) -> torch.Tensor:
    """log Z_τ brought to what is possible: between the rest of the mass on one id, and evenly on all others."""
    if temperature == 1.0:
        return torch.zeros_like(log_z)
    head = torch.where(targets.valid, targets.logprobs / temperature, -torch.inf).logsumexp(dim=-1)
    log_n = (targets.vocab_size - targets.valid.sum(dim=-1)).clamp_min(1).log()
    least, most = ((1.0 - mass_at_1 + slack).clamp_min(0.0).log() for slack in (-_SLACK, _SLACK))

    def total(log_mass: torch.Tensor, *, even: bool) -> torch.Tensor:
        tail = log_n + (log_mass - log_n) / temperature if even else log_mass / temperature
        return torch.logaddexp(head, tail)

    flat = temperature > 1.0  # then an even spread has the largest sum of p^(1/τ), else the smallest
    return torch.minimum(torch.maximum(log_z, total(least, even=not flat)), total(most, even=flat))


def _refuse(wrong: torch.Tensor, source: str, what: object) -> None:
    if not bool(wrong.any()):
        return
    first = tuple(int(i) for i in wrong.nonzero()[0])
    assert callable(what)
    raise WrongAnswerError(f"{source}: row {first[0]}, position {first[1]} {what(first)}.")
