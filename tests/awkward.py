"""Fifty strings that tokenizers like to cut differently."""

AWKWARD = [
    "def f(x):\n    return x\n", "  two spaces", "   three", "\ttab\t\ttabs", "\n\n\nlines\n \n", "trailing   ", " ",
    "", "a", "aaaaaaaaaaaaaaaaaaaaaaaa", "CamelCaseName", "snake_case_name", "x=1;y=2", "0123456789 3.14159 1e-10",
    "don't can't I'll we've they'd I'm you're", "it's 'quoted' \"double\"", "naïve café façade", "Ünïcödé",
    "Привет, мир",
    "你好，世界", "こんにちは", "안녕하세요",
    "مرحبا", "שלום", "ไทย", "हिन्दी", "🚀", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷",
    "e\u0301 combining",
    "zero\u200bwidth", "nbsp\u00a0here", "ﬁ ligature", "½ ² ™ ©", "→ ⇒ ∀ ∃ ∑", "<|endoftext|>", "a<|endoftext|>b",
    "<|not a token|>", "[INST] <<SYS>>", "```python\nprint('x')\n```", "# comment\n## more", "{\"json\": [1, 2, null]}",
    "<div class=\"x\">&amp;</div>", "SELECT * FROM t WHERE a >= 1;", "C:\\path\\to\\file", "/usr/bin/env -S",
    "a\r\nb\rc",
    "-----=====-----", "(((([[[[{{{{}}}}]]]]))))", "The quick brown fox jumps over the lazy dog.",
]  # fmt: skip
