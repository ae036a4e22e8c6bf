"""How byte-level BPE tokenizers split text before they merge, by llama.cpp's names

Export and engine share the table."""

import re

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
#: Other names of llama.cpp's for the same rules; `default` and a missing name are a rule of its own, which is not here.
ALIASES = {
    "smollm": "refact",
    "starcoder": "refact",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "olmo": "gpt-2",
}
#: Rules whose files have a begin-of-text before every text where they do not say otherwise.
BEGINS_WITH_BOS = frozenset({"llama-bpe"})
#: Special tokens that end a turn or a text, whatever ids a file names.
ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}
)
#: Names of files in which llama.cpp treats special tokens in another way than it does elsewhere.
NAMED_AFTER = re.compile(r"(phi)-?(3)|(modern)-(bert)", re.IGNORECASE)
#: The special tokens of Phi 3 that leave the space behind them as it is; `</s>` and all added ones take it away.
PHI3_LEAVES = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def rule_named(name: str) -> tuple[str, bool] | None:
    """The pattern of one of llama.cpp's names, and whether whole tokens skip their merges; None for an unknown name."""
    wanted = ALIASES.get(name, name)
    for (pattern, whole), held in RULES.items():
        if held == wanted and pattern is not None:
            return pattern, whole
    return None
