"""Learning-rate multipliers: every parameter in exactly one optimizer group, by regular expression.

The one idea: rules are tried in order and the first match wins; a factor of 0 freezes; matrices decay and
vectors (norms, biases) do not. A rule that matches nothing is an error, because it is a typo.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from limbeck.errors import ConfigError


def build_param_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, multipliers: Sequence[tuple[str, float]]
) -> list[dict[str, Any]]:
    """Optimizer groups `{"params", "lr", "weight_decay", "name"}`; freezes what a factor of 0 names.

    Raises:
        ConfigError: a pattern is no regular expression or matches no parameter, or nothing is left to train.
    """
    rules = []
    for pattern, factor in multipliers:
        try:
            rules.append((re.compile(pattern), factor, pattern))
        except re.error as error:
            raise ConfigError(f"parameter_lr_multipliers: {pattern!r} is not a regular expression ({error}).") from None
    matched: set[str] = set()
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        factor, label = 1.0, "all others" if rules else "all"
        hit = next((rule for rule in rules if rule[0].search(name)), None)
        if hit is not None:
            _, factor, label = hit
        matched.update(pattern for regex, _, pattern in rules if regex.search(name))
        if factor == 0.0:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() >= 2
        group = groups.setdefault(
            (label, decays),
            {
                "params": [],
                "lr": learning_rate * factor,
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{label} ({'matrices' if decays else 'vectors'})",
            },
        )
        group["params"].append(parameter)
    for _, _, pattern in rules:
        if pattern not in matched:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise ConfigError(
                f"parameter_lr_multipliers: {pattern!r} matches no parameter of {type(model).__name__} "
                f"(names look like {some}). Mend or remove the rule."
            )
    if not groups:
        raise ConfigError("parameter_lr_multipliers freezes every parameter; leave one to train.")
    return list(groups.values())


def describe_groups(groups: Sequence[dict[str, Any]], model: nn.Module) -> str:
    """The groups as lines: name, tensors, parameters, learning rate, weight decay; and what is frozen."""
    rows = [
        (
            g["name"],
            len(g["params"]),
            sum(p.numel() for p in g["params"]),
            f"{g['lr']:.3g}",
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
