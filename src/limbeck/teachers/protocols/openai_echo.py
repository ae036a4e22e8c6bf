"""OpenAI's legacy completions with `echo` and `logprobs`: llama-cpp-python's server and others.

The one idea: distributions come keyed by token *text*. Where the server can name ids (`return_tokens_as_token_ids`)
they are asked for; else texts are mapped to ids through the tokenizer, and a text that stands for several ids is
refused, or with `teacher.tail: approximate` left to the tail, never guessed. Whether entry j speaks of token j
(OpenAI) or of token j + 1 (llama-cpp-python, when it puts no begin-of-text before the prompt) is found out by
changing one word.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from limbeck.console import warn
from limbeck.data.dataset import PackedRows
from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.registry import PROTOCOLS
from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.http import Query, RefusedError, Reply, WrongAnswerError
from limbeck.teachers.protocols.base import EndpointInfo, Session, WireSpec, as_json, first_model
from limbeck.teachers.protocols.segments import (
    Answer,
    Segment,
    SegmentProtocol,
    cut_rows,
    first_change,
    from_entries,
)

_TEXTS = ("The quick brown fox jumps over the lazy dog and runs", "The quick brown fox sleeps under the old tree now")
_TOKEN_ID = "token_id:"  # noqa: S105 (how ids are spelt in an answer)


@PROTOCOLS.register("openai-echo")
class OpenAIEchoProtocol(SegmentProtocol):
    """`/v1/completions` with `echo: true`."""

    name = "openai-echo"
    path = "/v1/completions"
    is_partial = True
    max_sequences = 1  # llama-cpp-python looks at the first prompt alone
    _MUCH: ClassVar[float] = 0.5

    def __init__(self, tokenizer: LoadedTokenizer | None = None) -> None:
        super().__init__(tokenizer)
        self._sends_ids = self._gets_ids = False
        self._shift = 1  # entry j is row j − shift
        self._texts: list[set[str]] = []
        self._ids: dict[str, list[int]] = {}
        self._warned = False

    # -- asking and reading ------------------------------------------------------------------------------

    def body(self, sequences: list[list[int]], top_k: int, temperature: float, model: str | None) -> dict[str, Any]:
        """One prompt, as ids or as text."""
        prompts: list[Any] = sequences if self._sends_ids else [self._text(ids) for ids in sequences]
        return {
            **({"model": model} if model else {}),
            **({"return_tokens_as_token_ids": True} if self._gets_ids else {}),
            "prompt": prompts if len(prompts) > 1 or self._sends_ids else prompts[0],
            "echo": True, "logprobs": top_k, "max_tokens": 1, "temperature": 0,
        }  # fmt: skip

    def read(self, reply: Any, sequences: list[list[int]], spec: WireSpec) -> list[Answer]:
        """`choices[i].logprobs` with `tokens` and `top_logprobs`, the generated token cut off."""
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        return [self._answer(one["logprobs"], ids, spec) for one, ids in zip(choices, sequences, strict=True)]

    def _answer(self, logprobs: dict[str, Any], ids: list[int], spec: WireSpec) -> Answer:
        """Rows up to the first token that the server cut differently: after it the context is another."""
        tokens, tops = logprobs["tokens"], logprobs["top_logprobs"]
        agreed = 0
        while agreed < min(len(ids), len(tokens)) and self._is(tokens[agreed], ids[agreed]):
            agreed += 1
        entries = []
        for row in range(agreed):
            place = row + self._shift
            held = tops[place] if 0 <= place < len(tops) else None
            found = [(self._id(text, spec), float(value)) for text, value in (held or {}).items()]
            entries.append(sorted(((i, v) for i, v in found if i is not None), key=lambda one: -one[1])[: spec.support])
        return from_entries(entries)

    def _is(self, text: str, number: int) -> bool:
        if text.startswith(_TOKEN_ID):
            return text == f"{_TOKEN_ID}{number}"
        return number < len(self._texts) and text in self._texts[number]

    def _id(self, text: str, spec: WireSpec) -> int | None:
        """The id a text stands for; None when it is left to the tail."""
        if text.startswith(_TOKEN_ID):
            return int(text.removeprefix(_TOKEN_ID))
        found = self._ids.get(text, [])
        if len(found) == 1:
            return found[0]
        if spec.approximate:
            return None
        raise WrongAnswerError(
            f"the teacher's answer names the text {text!r}, which stands for {found or 'no'} ids of the tokenizer. "
            "Set teacher.tail: approximate to leave such texts to the tail."
        )

    def targets(self, answers: Sequence[Any], rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> SparseTargets:
        """As others; positions that the server's own tokenizer cut differently have no support."""
        segments = cut_rows(rows, spec.attention)
        wanted = sum(len(segment.ids) for segment in segments)
        given = sum(len(answer.token_ids) for group in answers for answer in group)
        if wanted >= 64 and given < (1.0 - self._MUCH) * wanted:
            raise WrongAnswerError(
                f"the teacher cuts text into other tokens than tokenizer {self._name}: only {given} of {wanted} "
                "positions agree. Use the served model's own tokenizer, or a protocol that takes ids."
            )
        if given < 0.99 * wanted and not self._warned:
            self._warned = True
            warn(
                f"{1.0 - given / wanted:.0%} of these positions have no teacher: the server takes text, and rows that "
                "begin inside a word are cut differently there. They train on their labels alone"
            )
        return super().targets(answers, rows, spec, info)

    def supports(self, spec: WireSpec, info: EndpointInfo) -> None:
        """Refuse a vocabulary whose texts do not tell ids apart, unless what is ambiguous may go to the tail."""
        super().supports(spec, info)
        if self._gets_ids or spec.approximate:
            return
        for text, ids in self._ids.items():
            if len(ids) > 1:
                raise RefusedError(
                    f"the teacher answers in texts and ids {ids[0]} and {ids[1]} of tokenizer {self._name} (and "
                    f"{sum(len(one) > 1 for one in self._ids.values()) - 1} other groups) have one text, {text!r}. Use "
                    "a server that honours return_tokens_as_token_ids, another protocol, or teacher.tail: approximate, "
                    "which leaves them to the tail."
                )

    @property
    def _name(self) -> str:
        return self.tokenizer.name if self.tokenizer else "none"

    def _text(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # -- finding out -----------------------------------------------------------------------------------

    async def describe(self, session: Session) -> EndpointInfo | None:
        """Try ids in and out, then text."""
        model = await first_model(session)
        spec = WireSpec(top_k=4, temperatures=(1.0,), vocab_size=1 << 24, model=model, approximate=True)
        self._sends_ids = self._gets_ids = True
        found = await session.try_query(self._raw([self.canary], spec))
        self._sends_ids = found is not None
        self._gets_ids = bool(found) and str(found["tokens"][0]).startswith(_TOKEN_ID)
        if not self._gets_ids:
            if self.tokenizer is None:
                return None
            self._learn_texts(self.tokenizer)
            # Ids of a fixed list may not survive being written as text; those of a text do.
            self.canary = self.tokenizer.hf(_TEXTS[0], add_special_tokens=False)["input_ids"]
        elif found is not None:
            self.max_sequences = 16
        shift = await self._find_shift(session, spec)
        if shift is None:
            return None
        self._shift = shift
        notes = ["hosted APIs give no log-probabilities of the prompt, and at most 20 ids"]
        if shift == 0:
            notes.append("entry j is the distribution of token j + 1 (found by changing one word); corrected")
        if not self._sends_ids:
            notes.append("it takes text alone: rows that begin inside a word have no targets there")
        info = EndpointInfo(self.name, model=model, max_sequences=self.max_sequences, notes=tuple(notes))
        return replace(info, max_top_k=await self._largest_top_k(session, spec))

    async def _find_shift(self, session: Session, spec: WireSpec) -> int | None:
        """1 when entry j is the distribution of token j, 0 when of token j + 1, None when it is neither."""
        if self.tokenizer is None:
            one, other = list(self.canary), list(self.canary)
            other[6] += 1
        else:
            one, other = (self.tokenizer.hf(text, add_special_tokens=False)["input_ids"] for text in _TEXTS)
        changed = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        self._shift = 0
        answers = [await session.try_query(self.query([ids], spec)) for ids in (one, other)]
        if not answers[0] or not answers[1]:
            return None
        # Entry 0 is always null, and one word changes all entries that saw it.
        rows = [Answer(answer[0].token_ids[1:], answer[0].logprobs[1:]) for answer in answers]
        row = first_change(*rows)
        if row is None:  # nothing changed within what both agree on: the change is seen one entry later
            row = len(rows[0].token_ids)
        return {changed: 0, changed + 1: 1}.get(row + 1)

    def _raw(self, sequences: list[list[int]], spec: WireSpec) -> Query:
        """A query that is read no further than its token texts."""

        def parse(reply: Reply) -> dict[str, Any]:
            found = as_json(reply)
            try:
                logprobs = found["choices"][0]["logprobs"]
                return {"tokens": list(logprobs["tokens"]), "top_logprobs": list(logprobs["top_logprobs"])}
            except (KeyError, TypeError, IndexError) as error:
                raise WrongAnswerError(str(error)) from None

        return Query(self.path, self.body(sequences, spec.support, 1.0, spec.model), parse)

    async def _largest_top_k(self, session: Session, spec: WireSpec) -> int:
        for top_k in (1024, 256, 128, 64, 20, 5):
            found = await session.try_query(self._raw([self.canary], replace(spec, top_k=top_k)))
            if found:
                return min(top_k, max((len(entry) for entry in found["top_logprobs"] if entry), default=0))
        return 0

    def _learn_texts(self, tokenizer: LoadedTokenizer) -> None:
        """The texts a server may write for each id: undecodable bytes replaced or left out, special tokens or none."""
        self._texts, self._ids = [], {}
        special = set(tokenizer.hf.all_special_ids)
        for number, data in enumerate(tokenizer.token_bytes()):
            texts = {data.decode("utf-8", errors="replace"), data.decode("utf-8", errors="ignore")}
            if number in special:
                texts.add("")
            self._texts.append(texts)
            for text in texts:
                self._ids.setdefault(text, []).append(number)

    def _groups(self, rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> list[list[Segment]]:
        return super()._groups(rows, spec, replace(info, max_sequences=self.max_sequences))

    async def aligned(self, session: Session, spec: WireSpec) -> bool | None:
        """`describe` has found the shift the same way."""
        return True
