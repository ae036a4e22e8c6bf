"""How byte-level BPE tokenizers split text before they merge, by llama.cpp's names

Export and engine share the table."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
GPT2 = "GPT-2"
DIGITS = "digits, then GPT-2"
#: How a tokenizer.json splits text, and whether a piece that is a token stays whole -> llama.cpp's name for both.
RULES: dict[tuple[str | None, bool], str] = {
    (GPT2, False): "gpt-2",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_QWEN2, False): "qwen2",
    (DIGITS, False): "refact",
}
#: Other names of llama.cpp's for the same rules.
ALIASES = {"default": "gpt-2", "smollm": "refact", "llama3": "llama-bpe", "olmo": "gpt-2", "starcoder": "refact"}


def rule_named(name: str) -> tuple[str, bool] | None:
    """The pattern of one of llama.cpp's names, and whether whole tokens skip their merges; None for an unknown name."""
    wanted = ALIASES.get(name, name)
    for (pattern, whole), held in RULES.items():
        if held == wanted and pattern is not None:
            return pattern, whole
    return None
