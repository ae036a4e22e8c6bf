"""Is an answer a distribution over the right vocabulary? Asked of every one before it is learnt from."""

import torch

from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.http import WrongAnswerError

_SLACK = 1e-2  # float16 and int8 log-probabilities sum to 1 within this


def check_targets(targets: SparseTargets, source: str) -> None:
    """Refuse targets that no model could have given.

    Args:
        targets: leading shape [B, T].
        source: who gave them, for the message.

    Raises:
        WrongAnswerError: NaN or infinite values, ids outside the vocabulary or twice in a position, probabilities that
            sum above 1 or normalisers below what is listed; with the row and position of the first.
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
    for index, temperature in enumerate(targets.temperatures):
        log_p = torch.where(valid, targets.logprobs / temperature - targets.log_z[..., index : index + 1], -torch.inf)
        mass = log_p.exp().sum(dim=-1)
        _refuse(
            mass > 1.0 + _SLACK, source,
            lambda at, mass=mass, tau=temperature: f"gives probabilities that sum to {float(mass[at]):.3f} at "
            f"temperature {tau:g}: logits instead of log-probabilities, or another temperature",
        )  # fmt: skip


def _refuse(wrong: torch.Tensor, source: str, what: object) -> None:
    if not bool(wrong.any()):
        return
    first = tuple(int(i) for i in wrong.nonzero()[0])
    assert callable(what)
    raise WrongAnswerError(f"{source}: row {first[0]}, position {first[1]} {what(first)}.")
