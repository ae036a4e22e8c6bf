"""Which algorithm and which learning rate each parameter gets: every parameter in exactly one group.

The one idea: what a tensor is (a hidden matrix, or anything else) chooses the algorithm, ordered regular
expressions may overrule it, and a second list of them scales the learning rate; the first match wins, a
factor of 0 freezes. A pattern that matches nothing is an error, because it is a typo.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.config import LRMultiplier, OptimizerConfig
from limbeck.config.training import DEFAULT_RATES
from limbeck.errors import ConfigError
from limbeck.models import MatrixLayout, hidden_matrices

#: State-space parameters that are no matrices between hidden states, whatever their shape.
_NO_DECAY = re.compile(r"(^|\.)(A_log|dt_bias|D)$")


#: Parameters that mix mHC-lite streams.
_STREAMS = re.compile(r"(^|\.)mhc_(attention|mlp)\.")


@dataclass(frozen=True)
class _Rule:
    regex: re.Pattern[str]
    value: Any
    pattern: str


def build_groups(
    model: nn.Module,
    optimizer: OptimizerConfig,
    learning_rate: float,
    weight_decay: float,
    multipliers: Sequence[LRMultiplier] = (),
    adam: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Groups for `HybridOptimizer`; freezes what a factor of 0 names.

    Args:
        model: whose parameters are grouped.
        optimizer: algorithms and their settings.
        learning_rate: rate of the algorithm that hidden matrices get.
        weight_decay: decoupled decay of matrices; vectors, norms and biases have none.
        multipliers: factors on the rate by parameter name.
        adam: AdamW's `betas` and `eps`.

    Raises:
        ConfigError: a pattern is no regular expression, matches nothing, or gives one shared tensor two meanings by
            two of its names; Muon is asked for a vector; or nothing is left to train.
    """
    scales = _Rules("parameter_lr_multipliers", [(rule.pattern, rule.lr_multiplier) for rule in multipliers])
    choices = _Rules("optimizer.algorithms", [(rule.pattern, rule.algorithm) for rule in optimizer.algorithms])
    layouts = hidden_matrices(model, split_heads=optimizer.muon.split_heads)
    groups: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for parameter, aliases in _all_names(model):
        scale, choice = scales.claim(aliases), choices.claim(aliases)
        factor, label = (scale.value, scale.pattern) if scale else (1.0, "all others" if multipliers else "all")
        if factor == 0.0:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        layout = next((layouts[alias] for alias in aliases if alias in layouts), None)
        algorithm = choice.value if choice else optimizer.for_matrices if layout else optimizer.for_others
        if algorithm == "muon" and parameter.ndim < 2:
            raise ConfigError(
                f"optimizer.algorithms gives {aliases[0]} to muon, which works on matrices, and its shape is "
                f"{tuple(parameter.shape)}. Give it to lion or adamw."
            )
        mixes, decays = _STREAMS.search(aliases[0]) is not None, _decays(parameter, aliases[0])
        label = label if not mixes else f"{label} · mhc" if scale else "mhc"
        key = (label, algorithm, decays)
        if key not in groups:
            settings = _settings(optimizer, algorithm, learning_rate, weight_decay, adam or {})
            rate = (optimizer.mhc.learning_rate if mixes else None) or settings["lr"]
            name = " · ".join([label, algorithm, *([] if decays else ["no decay"])])
            groups[key] = {"params": [], "algorithm": algorithm, "name": name, **settings}
            groups[key].update(lr=rate * factor, lr_multiplier=factor, weight_decay=settings["weight_decay"] * decays)
        groups[key]["params"].append(parameter)
        if algorithm == "muon":
            chosen = layout or MatrixLayout()
            groups[key].setdefault("layouts", []).append((chosen.rows, chosen.transposed))
    scales.all_matched(model)
    choices.all_matched(model)
    if not groups:
        raise ConfigError("parameter_lr_multipliers freezes every parameter; leave one to train.")
    # The first group's rate is the one that a log line calls `lr`: that of hidden matrices, without a factor.
    return sorted(groups.values(), key=lambda g: (g["algorithm"] != optimizer.for_matrices, g["lr_multiplier"] != 1.0))


def _decays(parameter: nn.Parameter, name: str) -> bool:
    """True for what weight decay is for: matrices that are no state-space parameters and do not mix streams."""
    if parameter.ndim < 2 or name.endswith("bias") or _NO_DECAY.search(name) or _STREAMS.search(name):
        return False
    return not getattr(parameter, "_no_weight_decay", False)


#: Name of the group of parameters that objectives own.
OBJECTIVES = "objectives"


def objective_groups(
    objectives: nn.Module, optimizer: OptimizerConfig, learning_rate: float, adam: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The group of the objectives' own parameters, without decay; none where they have none. As `build_groups`."""
    own = [parameter for parameter in objectives.parameters() if parameter.requires_grad]
    settings = _settings(optimizer, optimizer.for_others, learning_rate, 0.0, adam or {})
    rest = {"algorithm": optimizer.for_others, "name": OBJECTIVES, "lr_multiplier": 1.0}
    return [{"params": own, **rest, **settings, "weight_decay": 0.0}] if own else []


def _settings(
    optimizer: OptimizerConfig,
    algorithm: str,
    learning_rate: float,
    weight_decay: float,
    adam: Mapping[str, Any],
) -> dict[str, Any]:
    """The keys of a group that belong to its algorithm."""
    section: Any = getattr(optimizer, algorithm)
    rate = section.learning_rate or (learning_rate if algorithm == optimizer.for_matrices else None)
    own: dict[str, Any] = {
        "lr": rate or DEFAULT_RATES[algorithm],
        "weight_decay": weight_decay if section.weight_decay is None else section.weight_decay,
    }
    if algorithm == "muon":
        muon = optimizer.muon
        own.update(momentum=muon.momentum, nesterov=muon.nesterov, ns_steps=muon.ns_steps, adjust_lr=muon.adjust_lr)
    elif algorithm == "lion":
        own["betas"] = (optimizer.lion.beta1, optimizer.lion.beta2)
    else:
        own.update(adam)
    return own


class _Rules:
    """An ordered list of (regex, value); remembers which of them ever matched."""

    def __init__(self, where: str, pairs: Iterable[tuple[str, Any]]) -> None:
        self._where = where
        self._rules: list[_Rule] = []
        self._matched: set[str] = set()
        for pattern, value in pairs:
            try:
                self._rules.append(_Rule(re.compile(pattern), value, pattern))
            except re.error as error:
                raise ConfigError(f"{where}: {pattern!r} is not a regular expression ({error}).") from None

    def claim(self, aliases: Sequence[str]) -> _Rule | None:
        """The first rule that matches; a tensor with two names (a tied head) may be claimed by one rule only."""
        claims: dict[str, tuple[str, _Rule]] = {}
        for alias in aliases:
            matches = [rule for rule in self._rules if rule.regex.search(alias)]
            self._matched.update(rule.pattern for rule in matches)
            if matches:
                claims.setdefault(matches[0].pattern, (alias, matches[0]))
        if len({rule.value for _, rule in claims.values()}) > 1:
            (first, rule), (second, other) = list(claims.values())[:2]
            raise ConfigError(
                f"{self._where}: {first} and {second} are one shared tensor; {rule.pattern!r} gives it {rule.value} "
                f"and {other.pattern!r} gives it {other.value}. Name it in one rule."
            )
        return next((rule for _, rule in claims.values()), None)

    def all_matched(self, model: nn.Module) -> None:
        """Refuse a pattern that matched nothing."""
        for rule in self._rules:
            if rule.pattern not in self._matched:
                some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
                raise ConfigError(
                    f"{self._where}: {rule.pattern!r} matches no parameter of {type(model).__name__} "
                    f"(names look like {some}). Mend or remove the rule."
                )


def _all_names(model: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Every parameter once, with all its names: tied weights have several."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(found.values())


def check_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Every trainable parameter of `model` is in exactly one group.

    Raises:
        ConfigError: names a parameter that two groups claim, or none.
    """
    claims: dict[int, list[str]] = {}
    for group in groups:
        for parameter in group["params"]:
            claims.setdefault(id(parameter), []).append(str(group.get("name", group.get("algorithm"))))
    for parameter, aliases in _all_names(model):
        owners = claims.get(id(parameter), [])
        if len(owners) > 1:
            raise ConfigError(f"optimizer: {aliases[0]} is claimed by {' and '.join(owners)}; leave it in one group.")
        if not owners and parameter.requires_grad:
            raise ConfigError(f"optimizer: no group claims {aliases[0]}; add it to one or freeze it.")


def describe_groups(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> str:
    """The groups as lines: name, tensors, parameters, learning rate, weight decay; and what is frozen."""
    rows = [
        (
            str(g["name"]),
            len(g["params"]),
            sum(p.numel() for p in g["params"]),
            f"{g.get('initial_lr', g['lr']):.3g}",
            f"{g['weight_decay']:.3g}",
        )
        for g in groups
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if frozen:
        rows.append(("frozen", len(frozen), sum(p.numel() for p in frozen), "0", "0"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        f"  {name:<{width}}  {tensors:>4} tensors {count:>13,} parameters  lr {lr}  weight decay {decay}"
        for name, tensors, count, lr, decay in rows
    )
