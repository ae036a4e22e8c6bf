"""Sources, tokenizer, packing and reading back."""

import json

import numpy as np
import pytest
import torch

from conftest import TOKENIZER, digest, write_corpus
from limbeck.config import DatasetConfig
from limbeck.data.dataset import PackedDataset, PackedRows
from limbeck.data.holdout import held_out
from limbeck.data.pack import pack
from limbeck.data.sources import open_source
from limbeck.data.tokenizer import load_tokenizer, train_tokenizer
from limbeck.errors import CorruptError, IncompleteError, LimbeckError, MismatchError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def config(corpus, **changes) -> DatasetConfig:
    return DatasetConfig(**{"name": str(corpus), "max_length": 32, "validation_fraction": 0.2, **changes})


def test_rows_hold_every_document_in_order(corpus, tokenizer, tmp_path):
    manifest = pack(config(corpus, rows_per_shard=8), tokenizer, tmp_path / "out")
    documents = list(open_source(config(corpus)).documents())
    for split in ("train", "validation"):
        rows = PackedDataset(tmp_path / "out", split)
        batch = rows.rows(range(len(rows)))
        ids, owners = batch.input_ids.flatten(), batch.doc_ids.flatten()
        mine = [d for d in documents if held_out(d.key, 0.2) == (split == "validation")]
        expected = [tokenizer.hf(d.text)["input_ids"] + [tokenizer.eos_id] for d in mine]
        assert ids[owners >= 0].tolist() == [i for document in expected for i in document]
        assert manifest.splits[split].tokens == sum(map(len, expected))
        assert len(set(owners[owners >= 0].tolist())) == len(mine)


def test_labels_and_positions_stop_at_document_borders():
    rows = PackedRows(torch.tensor([0]), torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([[3, 3, 3, 4, 4, -1]]))
    assert rows.labels.tolist() == [[6, 7, -100, 9, -100, -100]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]


def test_several_processes_give_the_same_bytes(tokenizer, tmp_path):
    big = write_corpus(tmp_path / "big", documents=60, seed=5)
    for path in big.iterdir():
        path.write_text(path.read_text() * 300)
    for processes in (1, 2, None):
        pack(config(big, num_proc=processes), tokenizer, tmp_path / f"p{processes}")
    assert digest(tmp_path / "p1", "*.parquet") == digest(tmp_path / "p2", "*.parquet")
    assert digest(tmp_path / "p1", "*.parquet") == digest(tmp_path / "pNone", "*.parquet")
    assert len(digest(tmp_path / "p1", "*.parquet")) >= 2


def test_a_run_continues_after_its_last_whole_shard(corpus, tokenizer, tmp_path, monkeypatch):
    import limbeck.data.pack as module

    settings = config(corpus, rows_per_shard=4)
    pack(settings, tokenizer, tmp_path / "whole")
    written = 0
    original = module._write_shard

    def stops(*arguments):
        nonlocal written
        if written == 3:
            raise KeyboardInterrupt
        written += 1
        return original(*arguments)

    monkeypatch.setattr(module, "_write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        pack(settings, tokenizer, tmp_path / "cut")
    with pytest.raises(IncompleteError, match="unfinished"):
        PackedDataset(tmp_path / "cut")
    monkeypatch.setattr(module, "_write_shard", original)
    pack(settings, tokenizer, tmp_path / "cut")
    assert digest(tmp_path / "cut", "*.parquet", "manifest.json") == digest(
        tmp_path / "whole", "*.parquet", "manifest.json"
    )


def test_finished_folders_are_found_done_and_others_refused(corpus, tokenizer, tmp_path):
    first = pack(config(corpus), tokenizer, tmp_path / "out")
    assert pack(config(corpus), tokenizer, tmp_path / "out") == first
    before = digest(tmp_path / "out", "*")
    with pytest.raises(LimbeckError, match="max_length: 32 -> 16"):
        pack(config(corpus, max_length=16), tokenizer, tmp_path / "out")
    assert digest(tmp_path / "out", "*") == before
    forced = pack(config(corpus, max_length=16), tokenizer, tmp_path / "out", force=True)
    assert forced.max_length == 16


def test_a_folder_of_somebody_else_is_never_touched(corpus, tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LimbeckError, match="not empty"):
        pack(config(corpus), tokenizer, tmp_path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_json_lines_parquet_and_huggingface_folders(tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"def f{i}(): return {i}" for i in range(30)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"body": texts}), tmp_path / "b" / "x.parquet")
    (tmp_path / "c" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"body": texts}), tmp_path / "c" / "data" / "train-00000-of-00001.parquet")
    import datasets

    datasets.Dataset.from_dict({"body": texts}).save_to_disk(tmp_path / "d")
    found = [
        [document.text for document in open_source(config(tmp_path / name, text_column="body", **extra)).documents()]
        for name, extra in (("a", {}), ("b", {}), ("c", {"streaming": True}), ("c", {"streaming": False}), ("d", {}))
    ]
    assert found == [texts] * 5


def test_a_damaged_parquet_source_is_named(tokenizer, tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(LimbeckError, match="bad.parquet cannot be read"):
        pack(config(tmp_path / "bad.parquet"), tokenizer, tmp_path / "out")


def test_empty_folders_and_wrong_columns_say_what_to_do(tokenizer, tmp_path):
    with pytest.raises(LimbeckError, match="--recursive"):
        open_source(config(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(LimbeckError, match=r"no text under 'text' \(it has: body\)"):
        pack(config(tmp_path, recursive=True), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "sub" / "a.jsonl").write_text("{not json}\n")
    with pytest.raises(LimbeckError, match="line 1 is not JSON"):
        pack(config(tmp_path, recursive=True), tokenizer, tmp_path / "out")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_shards_are_noticed(corpus, tokenizer, tmp_path, damage):
    pack(config(corpus), tokenizer, tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.parquet"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[:-10])
    else:
        shard.unlink()
    with pytest.raises(CorruptError, match=r"train-00000.parquet"):
        PackedDataset(tmp_path / "out")


def test_other_tokenizers_and_lengths_are_refused(corpus, tokenizer, tmp_path):
    pack(config(corpus), tokenizer, tmp_path / "out")
    rows = PackedDataset(tmp_path / "out")
    with pytest.raises(MismatchError, match="rows of 32 tokens and dataset.max_length is 64"):
        rows.check(max_length=64)
    other = train_tokenizer(config(corpus), 300, tmp_path / "tokenizer")
    with pytest.raises(MismatchError, match="tokenizer"):
        rows.check(other)


def test_a_manifest_cannot_point_outside_its_folder(corpus, tokenizer, tmp_path):
    pack(config(corpus), tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = "../secret.parquet"
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match="outside"):
        PackedDataset(tmp_path / "out")


def test_row_groups_give_the_rows_that_memory_gives(corpus, tokenizer, tmp_path, monkeypatch):
    import limbeck.data.dataset as module

    pack(config(corpus, rows_per_shard=7), tokenizer, tmp_path / "out")
    memory = PackedDataset(tmp_path / "out")
    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", 0)
    lazy = PackedDataset(tmp_path / "out")
    order = np.random.default_rng(0).permutation(len(memory)).tolist()
    assert torch.equal(memory.rows(order).input_ids, lazy.rows(order).input_ids)
    some = PackedDataset(tmp_path / "out", max_rows=5)
    assert len(some) == 5
    assert some.fingerprint != memory.fingerprint


def test_byte_lengths_cover_the_text(tokenizer):
    text = "def naïve(λ):\n    return '🙂'  # ok"
    assert tokenizer.byte_lengths()[tokenizer.hf(text)["input_ids"]].sum() == len(text.encode())
