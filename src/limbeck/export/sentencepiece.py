"""A SentencePiece-style BPE as llama.cpp's `llama` tokenizer knows it: tokens, scores and types, no merges.

The one idea: llama.cpp joins the neighbours whose joint token has the best score; a list of merges says the same
exactly when every pair that could make a token is in it, and the merges of one token stand together. Whether that holds
is checked, so that no text is cut elsewhere.

Source: Kudo & Richardson, SentencePiece (arXiv 1808.06226), its BPE with byte fallback.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from limbeck.data.tokenizer import is_byte_token
from limbeck.errors import LimbeckError

SPACE = "▁"


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """True for a BPE with byte fallback: what Llama 2, Mistral, Gemma, TinyLlama and Phi-3 have."""
    return bool(tokenizer["model"].get("type") == "BPE" and tokenizer["model"].get("byte_fallback"))


def adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """True when a space is put before a text.

    Raises:
        LimbeckError: text is changed or split in a way that llama.cpp's tokenizer does not know.
    """
    prepends = False
    replaces = False
    for step in _parts_of(tokenizer.get("normalizer"), "normalizers"):
        kind = step["type"]
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prepends = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            replaces = True
        else:
            raise _unknown_step("normalises text by", kind)
    for step in _parts_of(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "Metaspace" and step.get("replacement") == SPACE:
            # It puts none before a text that begins with one, where llama.cpp does: such texts get one space more.
            prepends, replaces = prepends or step.get("prepend_scheme", "always") != "never", True
        elif not (kind == "Split" and step.get("pattern") == {"String": " "} and replaces):  # no space is left to split
            raise _unknown_step("splits text by", kind)
    if not replaces:
        raise _unknown_step("keeps spaces as they are, and has no", SPACE)
    return prepends


def _parts_of(part: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if part is not None:
        yield from part[inner] if part["type"] == "Sequence" else [part]


def _unknown_step(what: str, kind: str) -> LimbeckError:
    return LimbeckError(f"the tokenizer {what} {kind}, which llama.cpp's SentencePiece tokenizer does not.")


def scores(tokenizer: Mapping[str, Any], added: Collection[str]) -> dict[str, float]:
    """The score of each token that merges make: the sooner it is made the better.

    Args:
        tokenizer: a tokenizer.json.
        added: tokens that are found before anything is merged.

    Raises:
        LimbeckError: scores cannot say what the merges say.
    """
    model = tokenizer["model"]
    vocab = model["vocab"]
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    rank = {pair: number for number, pair in enumerate(pairs)}
    found: dict[str, float] = {}
    last: str | None = None
    for number, (left, right) in enumerate(pairs):
        token = left + right
        if token in found and token != last:
            raise _no_scores(f"the merges that make {token!r} do not stand together")
        found.setdefault(token, -float(number))
        last = token
    for token in vocab:
        if token in added or is_byte_token(token):
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in rank and pair[0] in vocab and pair[1] in vocab:
                raise _no_scores(f"{pair[0]!r} and {pair[1]!r} are not merged although {token!r} is a token")
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        raise LimbeckError(f"the tokenizer falls back to bytes and has no token {missing[0]}, which llama.cpp needs.")
    return found


def _no_scores(reason: str) -> LimbeckError:
    return LimbeckError(
        f"the tokenizer's merges can not be told as llama.cpp's scores: {reason}. Tokenizers that were trained by "
        "SentencePiece can, and byte-level BPE."
    )
