"""A GGUF file's own tokenizer, on the `tokenizers` library: no other file is needed to run a model.

The one idea: the file holds tokens, merges or scores, and the name of a splitting rule; that is a tokenizer.json in
other words, so it is turned back into one. A rule that is not known is refused: every id after it would be wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

from limbeck.console import printable
from limbeck.errors import LimbeckError
from limbeck.export.splitting import ALIASES, BEGINS_WITH_BOS, DIGITS, ENDS, GPT2, PHI3_LEAVES, RULES, rule_named

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # GGUF's types of tokens


class GgufTokenizer:
    """Text to ids and back, as the file's metadata have it.

    Args:
        metadata: a file's keys and values.
        name: how a message calls the file.

    Attributes:
        size: tokens in the vocabulary.
        bos, eos: ids at a text's begin and end; None where the file names none.
        stops: ids that end a generation.

    Raises:
        LimbeckError: the file has no tokenizer, or one of a kind that is not known here.
    """

    def __init__(self, metadata: dict[str, Any], name: str) -> None:
        self._meta, self._name = metadata, name
        try:
            self.tokens: list[str] = [str(token) for token in self._get("tokens")]
            self.size = len(self.tokens)
            self._types = self._list("token_type", int, [_NORMAL] * self.size)
            self.bos, self.eos = self._id("bos"), self._id("eos")
            self._fast = self._build()
        except LimbeckError:
            raise
        except Exception as error:  # whatever a damaged file holds in place of a tokenizer
            raise LimbeckError(f"{name} has a tokenizer that can not be read: {printable(str(error), 200)}.") from error
        ends = {self.eos, self._id("eot"), self._id("eom")}
        ends |= {
            number for number, token in enumerate(self.tokens) if token in ENDS and self._types[number] == _CONTROL
        }
        self.stops = frozenset(number for number in ends if number is not None)
        rule = str(metadata.get("tokenizer.ggml.pre"))
        adds = self._get("model") == "llama" or ALIASES.get(rule, rule) in BEGINS_WITH_BOS
        self._adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds))

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations, where the file has one."""
        found = self._meta.get("tokenizer.chat_template")
        return None if found is None else str(found)

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Ids of a text, in which special tokens are found; with `begin`, the file's begin-of-text before it."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        first = [self.bos] if begin and self._adds_bos and self.bos is not None else []
        return [*first, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def _get(self, key: str) -> Any:
        found = self._meta.get(f"tokenizer.ggml.{key}")
        if found is None:
            raise LimbeckError(f"{self._name} has no tokenizer.ggml.{key}; it cannot be given text.")
        return found

    def _list(self, key: str, kind: Callable[[Any], Any], otherwise: list[Any] | None = None) -> list[Any]:
        """A list with an entry for each token."""
        given = self._meta.get(f"tokenizer.ggml.{key}")
        found = otherwise if given is None and otherwise is not None else [kind(entry) for entry in self._get(key)]
        if len(found) != self.size:
            raise LimbeckError(f"{self._name} has {self.size} tokens and {len(found)} entries of tokenizer.ggml.{key}.")
        return found

    def _id(self, name: str) -> int | None:
        found = self._meta.get(f"tokenizer.ggml.{name}_token_id")
        return int(found) if found is not None and 0 <= int(found) < self.size else None

    def _build(self) -> Any:
        from tokenizers import AddedToken

        kind = self._get("model")
        if kind not in ("gpt2", "llama"):
            raise LimbeckError(
                f"{self._name} has a tokenizer of kind {kind!r}; gpt2 (byte-level BPE) and llama are read."
            )
        fast = self._byte_level() if kind == "gpt2" else self._sentencepiece()
        phi3 = "phi3" in str(self._meta.get("general.name", "")).lower().replace("-", "")
        for special in (True, False):
            tokens = [
                AddedToken(token, special=special, normalized=False, rstrip=phi3 and token not in PHI3_LEAVES)
                for token, kind in zip(self.tokens, self._types, strict=True)
                if kind in (_CONTROL, _USER, _UNKNOWN) and (kind != _USER) == special
            ]
            (fast.add_special_tokens if special else fast.add_tokens)(tokens)
        return fast

    def _byte_level(self) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        rule = rule_named(str(self._meta.get("tokenizer.ggml.pre", "default")))
        if rule is None:
            known = ", ".join(RULES.values())
            raise LimbeckError(
                f"{self._name} splits text by llama.cpp's rule {self._meta['tokenizer.ggml.pre']!r}; {known} are known."
            )
        pattern, whole = rule
        merges = [tuple(merge.split(" ", 1)) for merge in self._meta.get("tokenizer.ggml.merges", [])]
        vocab = {token: number for number, token in enumerate(self.tokens)}
        fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
        by_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (GPT2, DIGITS))
        if pattern == GPT2:
            fast.pre_tokenizer = by_words
        elif pattern == DIGITS:
            fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_words])
        else:
            split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            fast.pre_tokenizer = pre_tokenizers.Sequence([split, by_words])
        fast.decoder = decoders.ByteLevel()
        return fast

    def _sentencepiece(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers

        scores: list[float] = self._list("scores", float)
        vocab = {token: number for number, token in enumerate(self.tokens)}
        made: list[tuple[float, int, tuple[str, str]]] = []
        for number, token in enumerate(self.tokens):
            if self._types[number] != _NORMAL:
                continue
            for cut in range(1, len(token)):
                if token[:cut] in vocab and token[cut:] in vocab:
                    made.append((-scores[number], number, (token[:cut], token[cut:])))
        made.sort(key=lambda entry: entry[:2])
        unknown = next((token for token, kind in zip(self.tokens, self._types, strict=True) if kind == _UNKNOWN), None)
        merges = [pair for _, _, pair in made]
        fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        prepends = bool(self._meta.get("tokenizer.ggml.add_space_prefix", True))
        steps: list[Any] = [normalizers.Prepend(_SPACE)] if prepends else []
        fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
        back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        fast.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prepends else [])])
        return fast


class Detokenizer:
    """The text that ids add, one by one; an id that ends in the middle of a character adds nothing yet.

    Args:
        tokenizer: the model's.
        before: ids that stand before them, and decide on a first space.
    """

    def __init__(self, tokenizer: GgufTokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._told: list[int] = list(before)  # what was told last begins and ends with whole characters
        self._new: list[int] = []
        self._shown = len(tokenizer.decode(self._told))

    def add(self, number: int) -> str:
        """What an id adds."""
        self._new.append(number)
        text = self._tokenizer.decode([*self._told, *self._new])
        if text.endswith("\ufffd"):
            return ""
        added = text[self._shown :]
        self._told, self._new = self._new, []
        self._shown = len(self._tokenizer.decode(self._told))
        return added

    def rest(self) -> str:
        """What is left of a text that ends within a character."""
        return self._tokenizer.decode([*self._told, *self._new])[self._shown :] if self._new else ""
