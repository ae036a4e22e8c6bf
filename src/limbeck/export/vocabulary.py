"""A Hugging Face byte-level BPE as GGUF metadata: tokens, types, merges, special ids, chat template.

The one idea: llama.cpp knows splitting rules by name; a tokenizer whose rule is not one of those named here is
refused, because its text would be cut elsewhere and every id after that be wrong.
"""

import json
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: The splitting regular expression of tokenizer.json -> llama.cpp's name for it.
_RULES = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}": "qwen2",
}


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
            f"the tokenizer is {kind} with {names or 'no'} pre-tokenizer; GGUF export knows byte-level BPE alone."
        )
    byte_level = parts[names.index("ByteLevel")]
    if byte_level.get("add_prefix_space"):
        raise LimbeckError("the tokenizer adds a space before text, which llama.cpp's byte-level BPE does not.")
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise LimbeckError(f"the tokenizer normalises text by {normalizer.get('type')}, which llama.cpp does not.")
    if len(parts) == 1 and byte_level.get("use_regex", True):
        return "gpt-2"
    pattern = next((part.get("pattern", {}).get("Regex") for part in parts if part.get("type") == "Split"), None)
    if len(parts) == 2 and pattern in _RULES:
        return _RULES[pattern]
    raise LimbeckError(
        f"the tokenizer splits text by {pattern or names}, a rule that GGUF export has no llama.cpp name for."
    )


def add_vocabulary(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write a model folder's tokenizer into a `gguf.GGUFWriter`.

    Raises:
        LimbeckError: there is no tokenizer.json, or llama.cpp would tokenise differently.
    """
    import gguf
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise LimbeckError(f"{folder} has no tokenizer.json; save the tokenizer beside the model first.")
    data = json.loads(path.read_text(encoding="utf-8"))
    rule = splitting_rule(data)
    added = {entry["id"]: entry for entry in data.get("added_tokens", [])}
    by_id = {number: token for token, number in data["model"]["vocab"].items()}
    tokens, types = [], []
    for number in range(vocab_size):
        if number in added:
            tokens.append(added[number]["content"])
            types.append(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED)
        elif number in by_id:
            tokens.append(by_id[number])
            types.append(gguf.TokenType.NORMAL)
        else:  # an embedding padded to a round size
            tokens.append(f"[PAD{number}]")
            types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": bool(plain) and plain[0] == tokenizer.bos_token_id,
        "eos": len(plain) > 1 and plain[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)
