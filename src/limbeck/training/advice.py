"""What the curves of a run suggest for the next one: a few rules of thumb, computed, in one short paragraph.

The one idea: a rule is a function from the curves to a sentence or nothing; at most three speak, the most
pressing first, and each names the numbers it goes by.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.config import Recipe


@dataclass(frozen=True)
class Curves:
    """The logged values of a run, by name, and its recipe."""

    logs: Sequence[dict[str, Any]]
    recipe: Recipe

    def values(self, key: str) -> list[float]:
        """All values of a key, in order."""
        return [float(entry[key]) for entry in self.logs if key in entry]

    def last(self, key: str) -> float | None:
        """Mean over the last fifth of the run (at least one value)."""
        found = self.values(key)
        return statistics.fmean(found[-max(1, len(found) // 5) :]) if found else None

    def falling(self, key: str) -> float:
        """Share by which a key fell between the third and the fourth quarter of the run."""
        found = self.values(key)
        if len(found) < 8:
            return 0.0
        quarter = len(found) // 4
        before, after = statistics.fmean(found[-2 * quarter : -quarter]), statistics.fmean(found[-quarter:])
        return (before - after) / max(abs(before), 1e-12)


def _overfits(curves: Curves) -> str | None:
    held_out = curves.values("eval_loss")
    if len(held_out) < 3 or held_out[-1] <= 1.01 * min(held_out):
        return None
    return (
        f"held-out loss rose from {min(held_out):.3f} to {held_out[-1]:.3f} while training went on: "
        "use best/, and next time more rows, fewer steps or more weight decay"
    )


def _clipped(curves: Curves) -> str | None:
    limit = curves.recipe.training.max_grad_norm
    norms = curves.values("grad_norm")
    if limit == 0 or len(norms) < 4 or curves.recipe.optimizer.for_matrices != "adamw":
        return None  # Muon and Lion take a gradient's direction, whatever its size
    share = sum(norm > limit for norm in norms) / len(norms)
    if share < 0.5:
        return None
    return (
        f"the gradient norm was above max_grad_norm {limit:g} in {share:.0%} of the log lines: "
        f"lower learning_rate ({curves.recipe.learning_rate:g}) or lengthen warmup_steps"
    )


def _waits(curves: Curves) -> str | None:
    share = curves.last("teacher_wait_share")
    if share is None or share < 0.2:
        return None
    recipe = curves.recipe
    if recipe.teacher.reads_cache:
        return f"{share:.0%} of the time went into reading cached targets: raise training.dataloader_num_workers"
    cure = "cache the targets (teacher.use_cached_logits: true)"
    if recipe.teacher.is_remote:
        cure = (
            f"raise teacher.micro_batches ({recipe.teacher.remote.micro_batches}) and teacher.max_concurrent, or {cure}"
        )
    return f"{share:.0%} of the time went into waiting for the teacher: {cure}"


def _imitates_but_misses(curves: Curves) -> str | None:
    ce, kl, alpha = curves.last("ce_loss"), curves.last("kl_loss"), curves.recipe.loss.end("alpha")
    mass = curves.last("teacher_mass")
    if ce is None or kl is None or alpha >= 0.95 or kl > 0.25 * ce or (mass is not None and mass < 0.5):
        return None  # with little mass on the stored ids a low KL says little
    return (
        f"CE is high ({ce:.2f}) with low KL ({kl:.2f}): the student follows the teacher and what is left is in the "
        f"labels; raise alpha (now {alpha:g})"
    )


def _fits_labels_only(curves: Curves) -> str | None:
    ce, kl, alpha = curves.last("ce_loss"), curves.last("kl_loss"), curves.recipe.loss.end("alpha")
    if ce is None or kl is None or kl < ce or alpha <= 0.05:
        return None
    return (
        f"KL ({kl:.2f}) is higher than CE ({ce:.2f}): the teacher's distribution is hard to follow; raise temperature "
        f"(now {curves.recipe.loss.end('temperature'):g}), lower alpha (now {alpha:g}), or take a larger student"
    )


def _support_too_small(curves: Curves) -> str | None:
    mass = curves.last("teacher_mass")
    if mass is None or mass > 0.8:
        return None
    return (
        f"the stored ids hold {mass:.0%} of the teacher's mass at this temperature: raise teacher.top_k "
        f"(now {curves.recipe.teacher.top_k}) or lower temperature"
    )


def _unbalanced(curves: Curves) -> str | None:
    load = {key: curves.last(key) or 0.0 for entry in curves.logs for key in entry if key.startswith("expert_load/")}
    # No share can exceed 1/top_k, however bad the balance is.
    top_k = curves.recipe.student.config.get("num_experts_per_tok", 2)
    if not load or max(load.values()) < min(4.0 / len(load), 0.8 / top_k):
        return None
    return (
        f"the busiest expert takes {max(load.values()):.0%} and the idlest {min(load.values()):.1%} of the tokens: "
        f"raise loss.load_balance (now {curves.recipe.loss.load_balance:g})"
    )


def _unfinished(curves: Curves) -> str | None:
    fell = curves.falling("loss")
    if fell < 0.02:
        return None
    return f"the loss still fell by {fell:.1%} in the last quarter: train longer"


def _flat(curves: Curves) -> str | None:
    found = curves.values("loss")
    if len(found) < 8 or abs(curves.falling("loss")) > 0.002 or found[-1] > 0.98 * found[0]:
        return None
    level = curves.last("loss")
    return f"the loss has been flat near {level:.3f}: a larger student or more data will help, not more steps"


def _never_learned(curves: Curves) -> str | None:
    found = curves.values("loss")
    if len(found) < 4 or found[-1] < 0.98 * found[0]:
        return None
    return (
        f"the loss went from {found[0]:.3f} to {found[-1]:.3f}: nothing was learnt; change learning_rate "
        f"(now {curves.recipe.learning_rate:g}) by a factor of 3 either way, or enable saddle interventions"
    )


#: The rules, the most pressing first.
RULES: Sequence[Callable[[Curves], str | None]] = (
    _never_learned, _overfits, _clipped, _unbalanced, _support_too_small, _imitates_but_misses, _fits_labels_only,
    _waits, _unfinished, _flat,
)  # fmt: skip


def advise(logs: Sequence[dict[str, Any]], recipe: Recipe) -> str:
    """One short paragraph from a run's log history."""
    curves = Curves(logs, recipe)
    found = [sentence for rule in RULES if (sentence := rule(curves)) is not None][:3]
    if not found:
        return "the curves show nothing to change."
    text = "; ".join(found)
    return text[0].upper() + text[1:] + "."
