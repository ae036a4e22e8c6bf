"""What is wrong with a recipe, in its own words: the key, the flag it came from, what it must be, what was found.

The one idea: every kind of mistake that the models' checks can find has one sentence here; the checking library's words
and the names of its types never reach the user.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

#: Kind of error -> what the value must be, from what the error knows.
_MUST: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), lambda c: "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), lambda c: "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), lambda c: "true or false"),
    **dict.fromkeys(("string_type", "path_type"), lambda c: "text"),
    **dict.fromkeys(("list_type", "too_short"), lambda c: "a list with something in it" if c else "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"),
                    lambda c: "a section, with keys and values"),
    "literal_error": lambda c: _one_of(str(c["expected"]).replace("'", "").replace(" or ", ", ")),
    "greater_than": lambda c: f"larger than {c['gt']:g}",
    "greater_than_equal": lambda c: f"at least {c['ge']:g}",
    "less_than": lambda c: f"smaller than {c['lt']:g}",
    "less_than_equal": lambda c: f"at most {c['le']:g}",
    "string_too_short": lambda c: "text that is not empty",
    "none_required": lambda c: "null",
}  # fmt: skip
_UNION_TAGS = ("constrained-", "literal[", "function-", "list[", "dict[", "lax-or-strict", "is-instance")
_KINDS = {"int", "float", "str", "bool", "path", "none", "nullable"}


def explain(error: ValidationError, where: str, known: Sequence[str], origins: Mapping[str, str] | None = None) -> str:
    """One line for each key that is wrong.

    Args:
        error: what the models found.
        where: the recipe's file, or the stage.
        known: keys there are, to name the nearest of an unknown one.
        origins: the flag by which a key was given, where it was.
    """
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_key(problem["loc"]), []).append(problem)
    lines = [_line(key, found, known, origins or {}) for key, found in problems.items()]
    by_flag = all(any(key == own or key.startswith(f"{own}.") for own in origins or {}) for key in problems)
    return "\n  ".join(lines) if by_flag else f"{where}: " + "\n  ".join(lines)


def _key(loc: Iterable[Any]) -> str:
    """The dotted key of an error, without the names of the types that were tried."""
    parts = [str(part) for part in loc]
    return ".".join(part for part in parts if not part.startswith(_UNION_TAGS) and part not in _KINDS)


def _line(key: str, problems: Sequence[Any], known: Sequence[str], origins: Mapping[str, str]) -> str:
    flag = next((origins[own] for own in origins if key == own or key.startswith(f"{own}.")), None)
    shown = key if flag is None or flag == f"--{key}" else f"{flag} ({key})"
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key {shown}{did_you_mean(key, known)}"
    if first["type"] == "missing":
        return f"{shown} is missing"
    found = "" if isinstance(first["input"], dict) or not key else f" (found {_shown(first['input'])})"
    own = [problem for problem in problems if problem["type"] in ("value_error", "assertion_error")]
    if own:
        reason = str(own[0]["msg"]).removeprefix("Value error, ")
        return f"{shown}: {reason}{found}" if key else reason
    musts = list(dict.fromkeys(_must(problem) for problem in problems))
    return f"{shown} must be {' or '.join(musts)}{found}"


def _one_of(names: str) -> str:
    return f"one of {names}" if "," in names else names


def _must(problem: Any) -> str:
    known = _MUST.get(problem["type"])
    if known is not None:
        return known(problem.get("ctx") or {})
    if problem["type"] == "string_pattern_mismatch":
        return f"written as {problem['ctx']['pattern']}"
    return "something else"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def did_you_mean(word: str, candidates: Sequence[str], prefix: str = "") -> str:
    """`; did you mean X?` for the closest candidate, or an empty string."""
    found = get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not found:  # `alhpa` alone is nearest to the last part of `loss.alpha`
        leaves = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
        found = [leaves[leaf] for leaf in get_close_matches(word.rpartition(".")[2], leaves, n=1)]
    return f"; did you mean {prefix}{found[0]}?" if found else ""
