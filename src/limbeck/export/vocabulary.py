"""A Hugging Face tokenizer as GGUF metadata: tokens, types, merges or scores, special ids, chat template.

The one idea: llama.cpp knows byte-level BPE by the name of its splitting rule, and SentencePiece's by scores; a
tokenizer that is neither exactly is refused, because its text would be cut elsewhere and every id after that be wrong.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.data.tokenizer import is_byte_token, load_tokenizer
from limbeck.errors import LimbeckError
from limbeck.export.sentencepiece import adds_space, is_sentencepiece, scores
from limbeck.export.splitting import DIGITS, GPT2, NAMED_AFTER, PHI3_LEAVES, RULES


def splitting_rule(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of a tokenizer.json's splitting rule.

    Raises:
        LimbeckError: it is no byte-level BPE, or splits by a rule without a name here.
    """
    kind = tokenizer["model"].get("type")
    steps = tokenizer.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps]) if steps else []
    names = [part.get("type") for part in parts]
    if kind != "BPE" or "ByteLevel" not in names:
        raise LimbeckError(
            f"the tokenizer is {kind} with {names or 'no'} pre-tokenizer; GGUF export knows byte-level BPE, and "
            "SentencePiece's BPE with byte fallback."
        )
    byte_level = parts[names.index("ByteLevel")]
    if byte_level.get("add_prefix_space"):
        raise LimbeckError("the tokenizer adds a space before text, which llama.cpp's byte-level BPE does not.")
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise LimbeckError(f"the tokenizer normalises text by {normalizer.get('type')}, which llama.cpp does not.")
    whole, pattern = bool(tokenizer["model"].get("ignore_merges")), _pattern(parts, byte_level)
    if (pattern, whole) in RULES:
        return RULES[pattern, whole]
    raise LimbeckError(
        f"the tokenizer splits text by {pattern or names} and has ignore_merges: {str(whole).lower()}, a rule that "
        "GGUF export has no llama.cpp name for."
    )


def _pattern(parts: list[dict[str, Any]], byte_level: dict[str, Any]) -> str | None:
    """By what a byte-level BPE splits text: a regular expression, or the name of one; None where neither is known."""
    by_words = byte_level.get("use_regex", True)
    if len(parts) == 1:
        return GPT2 if by_words else None
    first = parts[0]
    if len(parts) > 2 or parts[1] is not byte_level:
        return None
    if first.get("type") == "Digits" and first.get("individual_digits") and by_words:
        return DIGITS
    isolated = first.get("behavior", "Isolated") == "Isolated" and not first.get("invert")
    if first.get("type") == "Split" and isolated and not by_words:
        found: str | None = first.get("pattern", {}).get("Regex")
        return found
    return None


def name_in_file(name: str, tokenizer: Mapping[str, Any]) -> str:
    """The `general.name` of a file, by which llama.cpp decides whether special tokens take the space behind them away.

    In a file that is named after Phi 3 all of Phi 3's do (and its tokens have to be there), in others none does.

    Args:
        name: what the file should be called; changed only where llama.cpp would misunderstand it.
        tokenizer: a tokenizer.json.

    Raises:
        LimbeckError: some special tokens take space away, and they are not Phi 3's.
    """
    added = _added(tokenizer)
    odd = next((token for token, entry in added.items() if entry.get("lstrip") or entry.get("single_word")), None)
    if odd is not None:
        raise LimbeckError(f"the tokenizer's {odd} has lstrip or single_word set, which llama.cpp does not follow.")
    taking = {token for token, entry in added.items() if entry.get("rstrip")}
    if not taking:
        return NAMED_AFTER.sub(lambda found: " ".join(part for part in found.groups() if part), name)
    if "</s>" in taking and set(added) >= PHI3_LEAVES and taking == set(added) - PHI3_LEAVES:
        found = NAMED_AFTER.search(name)
        return name if found and found[1] else f"{name} (phi3 tokenizer)"
    raise LimbeckError(
        f"the tokenizer's {min(taking)} has rstrip set; llama.cpp follows that in Phi 3's tokenizer alone, where all "
        f"added tokens have it but {', '.join(sorted(PHI3_LEAVES))}. Save the tokenizer without rstrip."
    )


def check_vocabulary(tokenizer: Mapping[str, Any]) -> None:
    """Refuse a tokenizer.json that llama.cpp would not follow.

    Raises:
        LimbeckError: says what of it llama.cpp does not know.
    """
    name_in_file("", tokenizer)
    if is_sentencepiece(tokenizer):
        adds_space(tokenizer)
        scores(tokenizer, _added(tokenizer))
    else:
        splitting_rule(dict(tokenizer))


def add_vocabulary(writer: Any, folder: Path, vocab_size: int, name: str) -> None:
    """Write a model folder's tokenizer into a `gguf.GGUFWriter`, and the file's name, on which its use depends.

    Raises:
        LimbeckError: there is no tokenizer.json, or llama.cpp would tokenise differently.
    """
    import gguf

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise LimbeckError(f"{folder} has no tokenizer.json; save the tokenizer beside the model first.")
    data = json.loads(path.read_text(encoding="utf-8"))
    writer.add_name(name_in_file(name, data))
    by_score = is_sentencepiece(data)
    tokens, types = _tokens(data, vocab_size, by_score)
    if by_score:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(adds_space(data))
        known = scores(data, _added(data))
        least = -float(len(known))  # of single characters, which nothing makes
        writer.add_token_scores([known.get(token, least) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitting_rule(data))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not by_score, n_vocab=vocab_size)
    tokenizer = load_tokenizer(str(folder)).hf
    plain = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": bool(plain) and plain[0] == tokenizer.bos_token_id,
        "eos": len(plain) > 1 and plain[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _added(tokenizer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Tokens that are found before anything is merged."""
    return {entry["content"]: entry for entry in tokenizer.get("added_tokens", [])}


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int, by_score: bool) -> tuple[list[str], list[int]]:
    """The token of each id, and GGUF's type of it."""
    import gguf

    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    by_id = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    kinds = gguf.TokenType
    tokens: list[str] = []
    types: list[int] = []
    for number in range(vocab_size):
        token = added[number]["content"] if number in added else by_id.get(number)
        if token is None:  # an embedding padded to a round size
            token, kind = f"[PAD{number}]", kinds.UNUSED
        elif number in added:
            kind = kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED
            if by_score and token == tokenizer["model"].get("unk_token"):
                kind = kinds.UNKNOWN
        else:
            kind = kinds.BYTE if by_score and is_byte_token(token) else kinds.NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types
