"""What is measured of a finished model: suites, each of which gives scores and the columns that show them.

The one idea: a suite sees one model with the data's rows and tokenizer, and the teacher where there is one; the scores
of all suites stand in one row of the table. Add one with a class that fulfils `Suite` and is registered here or in a
plugin, and name it in `evaluation.suites`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.evaluation.fidelity import score_model
from limbeck.registry import SUITES, Choice
from limbeck.teachers.base import Teacher


class Column(NamedTuple):
    """A column of the table: the score's key, the title, the format of its values."""

    key: str
    title: str
    form: str


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: as the table calls it.
        model: a causal LM on its device, in eval mode.
        tokenizer: the data's and its own.
        rows: the held-out rows.
        teacher: the teacher, where there is one that has something to say of the rows.
        attention: per_document or packed, as it was trained.
        top_k: ids of the teacher that are kept, where it was distilled from such.
        batch_size: rows in a forward pass.
    """

    name: str
    model: Any
    tokenizer: LoadedTokenizer
    rows: PackedDataset
    teacher: Teacher | None
    attention: str
    top_k: int
    batch_size: int


class Suite(ABC):
    """A frozen dataclass of its parameters."""

    columns: ClassVar[Sequence[Column]] = ()

    @abstractmethod
    def run(self, subject: Subject) -> dict[str, Any]:
        """Scores by key; None for what does not apply."""


@SUITES.register("fidelity")
@dataclass(frozen=True)
class Fidelity(Suite):
    """Perplexity, bits per byte, and how close the model is to the teacher."""

    columns: ClassVar[Sequence[Column]] = (
        Column("loss", "loss", ".4f"),
        Column("perplexity", "perplexity", ".2f"),
        Column("bits_per_byte", "bits/byte", ".4f"),
        Column("kl_to_teacher", "KL to teacher", ".4f"),
        Column("kl_to_teacher_at_least", "KL to teacher ≥", ".4f"),
        Column("kl_to_teacher_estimate", "KL to teacher ≈", ".4f"),
        Column("top1_agreement", "top-1 agreement", ".1%"),
        Column("tokens_per_second", "tokens/s", ",.0f"),
    )

    def run(self, subject: Subject) -> dict[str, Any]:
        """`Scores`, as a dict."""
        scores = score_model(
            subject.model,
            subject.rows,
            subject.tokenizer.byte_lengths(),
            teacher=subject.teacher,
            top_k=subject.top_k,
            attention=subject.attention,
            batch_size=subject.batch_size,
            label=f"evaluating {subject.name}",
            dummy_prefix=subject.tokenizer.dummy_prefix,
        )
        return asdict(scores)


def suites_of(choices: Sequence[Choice]) -> list[Suite]:
    """The suites that `evaluation.suites` names, in order."""
    return [SUITES.build(choice) for choice in choices]


def table(results: dict[str, dict[str, Any]], suites: Sequence[Suite]) -> list[list[str]]:
    """Rows of the comparison table, header first, from `{model: scores}`; columns that hold nothing are left out."""
    every = [column for suite in suites for column in suite.columns]
    columns = [column for column in every if any(scores.get(column.key) is not None for scores in results.values())]
    body = [
        [name.replace("_", " "), *(_cell(scores.get(column.key), column.form) for column in columns)]
        for name, scores in results.items()
    ]
    return [["model", *(column.title for column in columns)], *body]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def table_text(results: dict[str, dict[str, Any]], suites: Sequence[Suite]) -> str:
    """The comparison table in aligned columns."""
    rows = table(results, suites)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
