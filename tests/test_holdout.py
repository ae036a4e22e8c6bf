"""What is held out: documents by their name, or rows where there are too few of them; never nothing in silence."""

import json

import numpy as np
import pytest

from conftest import TINY, digest, limbeck
from limbeck.config import DatasetConfig
from limbeck.data.dataset import PackedDataset
from limbeck.data.holdout import Holdout, held_out
from limbeck.data.pack import pack
from limbeck.data.sources import open_source
from limbeck.data.tokenizer import load_tokenizer, train_tokenizer
from limbeck.manifests import PackedManifest

BOOK = "\n".join(f"Chapter {n}. It was the {n * 37 % 101}th day, and the still was warm." for n in range(3000))


def packed_text(folder, out, **changes):
    settings = DatasetConfig(**{"name": str(folder), "max_length": 64, "num_proc": 1, **changes})
    manifest = pack(settings, load_tokenizer("tiny-python"), out)
    return settings, manifest


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("rows", [2, 3, 10, 49, 50, 1000])
def test_rows_are_held_out_evenly_and_at_least_one(fraction, rows):
    """Block by block as well as at once; the share is the one asked for to within half a row."""
    holdout = Holdout(fraction, by_row=True)
    whole = holdout.of_rows(0, rows, is_last=True)
    blocks = [holdout.of_rows(at, min(7, rows - at), is_last=at + 7 >= rows) for at in range(0, rows, 7)]
    assert np.array_equal(whole, np.concatenate(blocks))
    assert abs(whole.sum() - max(rows * fraction, 1)) <= 0.5 + 1e-9
    if rows * fraction >= 2:
        gaps = np.diff(np.flatnonzero(whole))
        assert gaps.max() - gaps.min() <= 1


def test_a_single_row_is_trained_on():
    assert not Holdout(0.02, by_row=True).of_rows(0, 1, is_last=True).any()


def test_one_book_is_divided_by_row_and_loses_nothing(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    for size in (4096, 50):
        _, manifest = packed_text(tmp_path / "book.txt", tmp_path / f"out{size}", rows_per_shard=size)
        assert manifest.held_out == "rows"
        train, rest = (PackedDataset(tmp_path / f"out{size}", split) for split in ("train", "validation"))
        total = len(train) + len(rest)
        assert len(rest) == round(total * 0.02)
        chosen = Holdout(0.02, by_row=True).of_rows(0, total, is_last=True)
        halves = {False: iter(range(len(train))), True: iter(range(len(rest)))}
        rows = [(rest if held else train).rows([next(halves[bool(held)])]) for held in chosen]
        ids = [
            i for row in rows for i, d in zip(row.input_ids[0].tolist(), row.doc_ids[0].tolist(), strict=True) if d >= 0
        ]
        tokenizer = load_tokenizer("tiny-python")
        assert ids == [*tokenizer.hf(BOOK)["input_ids"], tokenizer.eos_id]


def test_a_divided_book_is_continued_after_a_kill(tmp_path, monkeypatch):
    """Between the two files of one block too: neither is counted before both are there."""
    import limbeck.data.pack as module

    (tmp_path / "book.txt").write_text(BOOK)
    settings, _ = packed_text(tmp_path / "book.txt", tmp_path / "whole", rows_per_shard=100)
    whole = digest(tmp_path / "whole", "*.parquet")
    original = module._write_shard
    for stop in range(1, len(whole)):
        left = [stop]

        def dies(*arguments, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(*arguments)

        monkeypatch.setattr(module, "_write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            packed_text(tmp_path / "book.txt", tmp_path / f"cut{stop}", rows_per_shard=100)
        monkeypatch.setattr(module, "_write_shard", original)
        packed_text(tmp_path / "book.txt", tmp_path / f"cut{stop}", rows_per_shard=100)
        assert digest(tmp_path / f"cut{stop}", "*.parquet") == whole
    assert settings.validation_fraction == 0.02


def named(prefix, count, wanted, fraction):
    """Names of documents of which none, all or some are held out."""
    found = [f"{prefix}{n}.txt" for n in range(3000)]
    return [name for name in found if wanted is None or held_out(name, fraction) == wanted][:count]


@pytest.mark.parametrize(("wanted", "by_row"), [(False, True), (True, True), (None, False)])
def test_twenty_books_are_divided_by_book_where_that_leaves_some_on_both_sides(tmp_path, wanted, by_row):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in named("b", 20, wanted, 0.3):
        (folder / name).write_text(BOOK[:2000])
    config = DatasetConfig(name=str(folder), validation_fraction=0.3)
    assert Holdout.of(config, open_source(config)).by_row is by_row
    _, manifest = packed_text(folder, tmp_path / "out", validation_fraction=0.3)
    assert manifest.held_out == ("rows" if by_row else "documents")
    assert all(split.rows for split in manifest.splits.values())


def test_only_documents_that_are_read_count(tmp_path):
    lines = [json.dumps({"text": f"text {n}"}) for n in range(200)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    for most, by_row in ((1, True), (200, False), (None, False)):
        config = DatasetConfig(name=str(tmp_path / "x.jsonl"), validation_fraction=0.2, max_samples=most)
        assert Holdout.of(config, open_source(config)).by_row is by_row
    for fraction in (0.0, 1.0):
        config = DatasetConfig(name=str(tmp_path / "x.jsonl"), validation_fraction=fraction, max_samples=1)
        assert not Holdout.of(config, open_source(config)).by_row


def test_a_tokenizer_is_trained_on_a_book_that_is_held_out_by_name(tmp_path):
    name = named("b", 1, True, 0.3)[0]
    (tmp_path / name).write_text(BOOK)
    config = DatasetConfig(name=str(tmp_path / name), validation_fraction=0.3)
    assert any("Chapter" in token for token in train_tokenizer(config, 400, tmp_path / "t").hf.get_vocab())


def test_one_text_file_becomes_a_student_with_scores(tmp_path, teacher_folder):
    """Three words on the command line, no recipe of one's own; what is held out is said."""
    (tmp_path / "book.txt").write_text(BOOK[:20000])
    (tmp_path / "r.yaml").write_text(json.dumps({"student": {"config": TINY}}))
    done = limbeck(
        "run", tmp_path / "r.yaml", "--dataset", tmp_path / "book.txt", "--teacher-model", teacher_folder,
        "--max-steps", "1", "--seq-len", "32", "--report-to", "[]", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert "1 documents are too few to hold out whole ones" in done.stderr
    assert json.loads(done.stdout)["evaluation"]["student_kd"]["tokens"] > 0
    manifest = PackedManifest.read(tmp_path / "outputs" / "r" / "data")
    assert manifest.held_out == "rows"
