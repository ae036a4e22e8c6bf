"""Disks that are full, files that lie, recipes that blow up: one line each, and nothing half-written."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import yaml

from conftest import TOKENIZER, limbeck, save_model, tiny_model
from limbeck.config import DatasetConfig, Recipe
from limbeck.data.dataset import PackedDataset
from limbeck.data.pack import pack
from limbeck.data.sources import open_source
from limbeck.data.tokenizer import load_tokenizer
from limbeck.errors import ConfigError, CorruptError, LimbeckError
from limbeck.export.inspect import inspect_gguf
from limbeck.recipe import load_recipe
from limbeck.storage import commit_folder, plain_disk_errors, read_json
from limbeck.teachers.build_cache import build_cache
from limbeck.teachers.cached import TeacherCache

# -- manifests ----------------------------------------------------------------------------------------------


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def shards(manifest):
    return manifest["splits"]["train"]["shards"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: shards(m).reverse(), "says first_row"),
        (lambda m: shards(m)[0].update(rows=shards(m)[0]["rows"] - 1), "says rows"),
        (lambda m: m.update(max_length=m["max_length"] // 2), "by the manifest it should be"),
        (lambda m: m["splits"].update(train=m["splits"]["validation"]), "says split validation"),
        (lambda m: m["codec"].update(temperatures=[1.0, 3.0]), "says codec"),
        (lambda m: m["codec"].update(top_k=8), "says codec"),
    ],
)
def test_a_cache_whose_manifest_lies_is_refused(recipe, packed, change, message):
    build_cache(recipe, recipe.cache_dir)
    edit(recipe.cache_dir, change)
    with pytest.raises(CorruptError, match=message):
        TeacherCache(recipe.cache_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: shards(m).reverse(), "says first_row"),
        (lambda m: shards(m)[0].update(rows=shards(m)[0]["rows"] - 1), "says rows"),
        (lambda m: m["splits"].update(train=m["splits"]["validation"]), "says split validation"),
        (lambda m: m.update(max_length=16), "says max_length 32"),
    ],
)
def test_packed_rows_whose_manifest_lies_are_refused(recipe, packed, change, message):
    edit(recipe.packed_dir, change)
    with pytest.raises(CorruptError, match=message):
        PackedDataset(recipe.packed_dir)


# -- disks ----------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from limbeck.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "command",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("data pack", "teacher cache")), "train", "run"],
)
def test_a_file_that_cannot_be_written_is_one_line_and_can_be_continued(recipe_tree, tmp_path, command):
    """A limit on the size of files, as a full disk: every stage says so, and with room the same command ends well."""
    tree = {**recipe_tree, "pipeline": {"export": ["gguf"]}}
    tree["dataset"], tree["teacher"] = ({**tree[key], "rows_per_shard": 1000} for key in ("dataset", "teacher"))
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(tree))
    size = {"data pack": 3000, "teacher cache": 30_000, "train": 300_000, "run": 300_000}[command]
    words = [sys.executable, "-c", LIMITED, str(size), *command.split(), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "could not be written" in done.stderr.splitlines()[-1]
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*.tmp"))
    if command != "run":
        assert limbeck(*command.split(), path).returncode == 0


def test_an_export_on_a_full_disk_leaves_nothing(tmp_path):
    save_model(tiny_model(), tmp_path / "m" / "final")
    target = tmp_path / "x.gguf"
    words = [sys.executable, "-c", LIMITED, "100000", "export", str(tmp_path / "m"), "--output", str(target)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "could not be written" in done.stderr.splitlines()[-1]
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name and not path.name.endswith(".lock")]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_read_only_is_one_line(recipe_tree, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path = tmp_path / "small.yaml"
        path.write_text(json.dumps({**recipe_tree, "output_dir": str(disk / "run")}))
        for command in ("data pack", "train", "run"):
            done = limbeck(*command.split(), path, check=False)
            assert done.returncode == 1
            assert "Read-only file system" in done.stderr.splitlines()[-1]
            assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_published_folder_is_whole_at_every_moment(tmp_path):
    """Somebody reads `best/` while it is replaced over and over."""
    final, stop, missing, seen = tmp_path / "best", threading.Event(), [], []

    def write(number):
        partial = tmp_path / ".best.tmp"
        partial.mkdir()
        (partial / "a").write_text(str(number))
        commit_folder(partial, final)

    def read():
        while not stop.is_set():
            try:
                seen.append((final / "a").read_text())
            except FileNotFoundError:
                missing.append(time.monotonic())

    write(0)
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 150):
        write(number)
    stop.set()
    reader.join()
    assert (final / "a").read_text() == "149"
    assert len(seen) > 50
    assert not missing
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_without_an_exchange_of_names_a_kill_in_between_is_mended(tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.storage._exchange", lambda one, other: False)
    for number in (1, 2):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "a").write_text(str(number))
        commit_folder(tmp_path / "new", tmp_path / "best")
    assert (tmp_path / "best" / "a").read_text() == "2"
    (tmp_path / "best").rename(tmp_path / ".best.old")  # killed between the two renames
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("3")
    commit_folder(tmp_path / "new", tmp_path / "best")
    assert (tmp_path / "best" / "a").read_text() == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]


def test_what_killed_exports_left_is_removed(tmp_path):
    save_model(tiny_model(), tmp_path / "m" / "final")
    (tmp_path / ".x.gguf.77.tmp").write_text("half")
    (tmp_path / ".y.gguf.77.tmp").mkdir()
    limbeck("export", tmp_path / "m", "--output", tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.glob(".?.gguf.*")) == [".x.gguf.lock", ".y.gguf.77.tmp"]


def test_errors_of_the_disk_are_told_from_others(tmp_path):
    for error, message in (
        (OSError(errno.ENOSPC, "x", "/a/b"), r"could not be written \(No space left on device: /a/b\)"),
        (OSError(errno.EIO, "x", "/a/b"), r"could not be read or written \(Input/output error: /a/b\)"),
        (PermissionError(errno.EACCES, "x", "/a/b"), r"could not be read or written \(Permission denied: /a/b\)"),
        (RuntimeError("the model said:\nFile too large: 7"), r"could not be written \(File too large: 7\)"),
    ):
        with pytest.raises(LimbeckError, match=message), plain_disk_errors(tmp_path):
            raise error
    for other in (PermissionError(errno.EACCES, "a port"), RuntimeError("a model of 3 layers")):
        with pytest.raises(type(other)), plain_disk_errors(tmp_path):
            raise other


def test_two_exports_to_one_file_do_not_meet(tmp_path):
    from limbeck.storage import folder_lock

    save_model(tiny_model(), tmp_path / "m" / "final")
    with folder_lock(tmp_path, ".x.gguf.lock"):
        done = limbeck("export", tmp_path / "m", "--output", tmp_path / "x.gguf", check=False)
    assert done.returncode == 1
    assert "another limbeck process is writing" in done.stderr
    assert not (tmp_path / "x.gguf").exists()
    assert limbeck("export", tmp_path / "m", "--output", tmp_path / "x.gguf").returncode == 0


# -- GGUF -------------------------------------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(tensors=0, values=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


ARRAYS = struct.pack("<IIQ", 9, 9, 1 << 40)
HOSTILE = {
    "endless array": header(values=1) + text(b"a.b") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(60),
    "array of arrays": header(values=1) + text(b"a.b") + ARRAYS + bytes(60),
    "bytes for ever": header(values=1) + text(b"a.b") + struct.pack("<IIQ", 9, 0, 1 << 60) + bytes(60),
    "long name": header(values=1) + struct.pack("<Q", 1 << 50) + bytes(60),
    "no UTF-8": header(values=1) + text(b"general.name") + struct.pack("<I", 8) + text(b"\xff\xfe\xff") + bytes(60),
    "many values": header(values=1 << 60) + bytes(60),
    "many tensors": header(tensors=1 << 60) + bytes(60),
    "dimensions": header(tensors=1) + text(b"t") + struct.pack("<I", 1 << 30) + bytes(60),
    "a large tensor": header(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0) + bytes(60),
    "a far tensor": header(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 60) + bytes(60),
    "type": header(values=1) + text(b"a.b") + struct.pack("<I", 77) + bytes(60),
    "version": header(version=9) + bytes(60),
    "short": b"GGUF",
    "other": b"GGML" + bytes(60),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_lengths_in_a_gguf_file_are_held_against_its_size(tmp_path, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(LimbeckError, match="is no GGUF file that can be read"):
        inspect_gguf(path)


SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def test_every_kind_of_value_has_its_size(tmp_path):
    """A file that holds each kind alone and in a list is read; one byte less of its last value and it is not."""
    for last, form in SCALARS.items():
        kinds = [kind for kind in SCALARS if kind != last] + [last]
        body = b"".join(text(f"a.k{kind}".encode()) + struct.pack("<I", kind) + struct.pack(SCALARS[kind], 1)
                        for kind in kinds)  # fmt: skip
        lists = b"".join(text(f"a.l{kind}".encode()) + struct.pack("<IIQ", 9, kind, 3)
                         + 3 * struct.pack(SCALARS[kind], 1) for kind in kinds)  # fmt: skip
        path = tmp_path / f"{last}.gguf"
        path.write_bytes(header(values=2 * len(kinds)) + body + lists)
        found = inspect_gguf(path)["metadata"]
        assert {found[f"a.k{kind}"] for kind in kinds} == {1}
        assert all(found[f"a.l{kind}"] == [1, 1, 1] for kind in kinds)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(LimbeckError, match=f"{3 * struct.calcsize(form)} bytes are announced"):
            inspect_gguf(path)


def test_long_values_are_shown_by_their_length(tmp_path):
    path = tmp_path / "x.gguf"
    words = [b"a" * 200, b"a" * 201]
    body = b"".join(text(b"a.w%d" % len(word)) + struct.pack("<I", 8) + text(word) for word in words)
    lists = b"".join(text(b"a.l%d" % n) + struct.pack("<IIQ", 9, 0, n) + bytes(n) for n in (8, 9))
    path.write_bytes(header(values=4) + body + lists)
    found = inspect_gguf(path)["metadata"]
    assert found["a.w200"] == "a" * 200
    assert found["a.w201"] == "201 characters"
    assert found["a.l8"] == [0] * 8
    assert found["a.l9"] == "9 entries"


# -- text ---------------------------------------------------------------------------------------------------------


def lines_of(tmp_path, content, **keys):
    (tmp_path / "x.jsonl").write_bytes(content)
    return list(open_source(DatasetConfig(name=str(tmp_path / "x.jsonl"), **keys)).documents())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (rb'{"text": "a\ud800b"}', r"line 2 holds \\ud800, half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2 is not JSON .*nested too deeply"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 2 is not JSON"),
        (b'{"text": 3}', "line 2 has int under 'text'"),
        (b'{"other": "a"}', r"line 2 has no text under 'text' \(it has: other\)"),
    ],
)
def test_json_lines_that_cannot_be_read_are_named_by_their_number(tmp_path, line, message):
    with pytest.raises(LimbeckError, match=message):
        lines_of(tmp_path, b'{"text": "first"}\n' + line + b"\n")


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert [d.text for d in lines_of(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n')] == ["a"]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfabc\r\nd")
    assert [d.text for d in open_source(DatasetConfig(name=str(tmp_path / "x.txt"))).documents()] == ["abc\r\nd"]


def test_null_is_left_out_and_counted_in_every_format(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one", None, "three"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "c")
    keys = []
    for name in ("a.jsonl", "b.parquet", "c"):
        source = open_source(DatasetConfig(name=str(tmp_path / name)))
        found = list(source.documents())
        assert [document.text for document in found] == ["one", "three"]
        assert source.without_text == 1
        keys.append([document.key.split(":")[-1] for document in found])
    assert keys == [["0", "2"]] * 3
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "d.parquet")
    with pytest.raises(LimbeckError, match="row 1 has int under 'text'"):
        list(open_source(DatasetConfig(name=str(tmp_path / "d.parquet"))).documents())


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("text")
    (tmp_path / "a" / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with pytest.raises(LimbeckError, match="has a name that is not UTF-8"):
        list(open_source(DatasetConfig(name=str(tmp_path / "a"))).documents())


def test_a_name_that_is_not_utf8_is_one_line(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / os.fsdecode(b"bad\xff\n.txt")).write_text("abc")
    words = ["data", "pack", "--input", folder, "--output", tmp_path / "out", "--tokenizer", TOKENIZER]
    done = limbeck(*words, check=False)
    assert done.returncode == 1
    assert "has a name that is not UTF-8" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_ids_that_no_vocabulary_has_are_refused_before_they_are_loaded(tmp_path):
    """With 2^31 in the vocabulary the tokenizers library ends the process."""
    folder = save_model(tiny_model(), tmp_path / "m")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    for number in (1 << 31, -5):
        data["model"]["vocab"]["zzz"] = number
        path.write_text(json.dumps(data))
        with pytest.raises(LimbeckError, match=f"has the id {number}"):
            load_tokenizer(str(folder))
    for other in ([], {"model": 3}, {"added_tokens": []}):
        path.write_text(json.dumps(other))
        with pytest.raises(LimbeckError, match="is no tokenizer.json"):
            load_tokenizer(str(folder))
    del data["model"]["vocab"]["zzz"]
    path.write_text(json.dumps({**data, "added_tokens": 5}))
    with pytest.raises(LimbeckError, match="has the id None"):
        load_tokenizer(str(folder))
    data["added_tokens"].append({**data["added_tokens"][0], "id": 1 << 31, "content": "<x>"})
    path.write_text(json.dumps(data))
    with pytest.raises(LimbeckError, match="has the id 2147483648"):
        load_tokenizer(str(folder))


def test_hostile_json_is_one_line(tmp_path):
    for content in ("[" * 100_000, '{"a": ' + "1" * 5000 + "}", '{"a": \ud800'):
        (tmp_path / "x.json").write_text(content, errors="surrogatepass")
        with pytest.raises(CorruptError, match="x.json is not valid JSON"):
            read_json(tmp_path / "x.json")


# -- recipes --------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


KEY_BOMB = BOMB + "? *j\n: 1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (KEY_BOMB, "aliases stand for more than"),
        ("loss: " + "[" * 20_000 + "]" * 20_000, "nested too deeply"),
        ("loss: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        (BOMB, "stand for more than 100,000 values"),
        ("a: &a {b: *a}", "stand for more than 100,000 values"),
        ("loss:\n  alpha: 0.5\n  alpha: 0.7\n", r"the key 'alpha' stands twice \(line 3\)"),
        ("seed: " + "1" * 5000, "."),
    ],
    ids=["key", "list", "mapping", "bomb", "loop", "twice", "number"],
)
def test_recipes_that_blow_up_end_in_one_line(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    before = time.perf_counter()
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)
    assert time.perf_counter() - before < 10.0


def test_anchors_may_be_used(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("dataset: {max_length: &n 64}\ntraining: {warmup_steps: *n}\n")
    assert load_recipe(path).training.warmup_steps == 64
    assert load_recipe(path).name == "r"


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", ""])
def test_a_run_stays_in_its_folder(name):
    with pytest.raises(ValueError, match="name"):
        Recipe.model_validate({"name": name})
    assert yaml.safe_load("a: 1") == {"a": 1}


# -- scores ------------------------------------------------------------------------------------------------------------


def test_rows_without_a_score_are_said_and_rows_without_bytes_have_no_bits(recipe, packed):
    from limbeck.evaluation.fidelity import score_model

    class Rows:
        def __init__(self, rows):
            self._rows = rows

        def __len__(self):
            return len(self._rows.input_ids)

        def rows(self, indices):
            return self._rows

    batch = packed.rows([0, 1])
    lengths = np.ones(4096, dtype=np.int64)
    alone = type(batch)(batch.row_ids, batch.input_ids, torch.arange(64).reshape(2, 32))
    with pytest.raises(LimbeckError, match="none of the 2 held-out rows has a position to score"):
        score_model(tiny_model(), Rows(alone), lengths)
    scores = score_model(tiny_model(), Rows(batch), np.zeros(4096, dtype=np.int64))
    assert scores.bits_per_byte is None
    assert scores.loss > 0


def test_a_dummy_prefix_is_no_text(tmp_path):
    """Llama 2's tokenizer puts a space before the text: bytes are those of the text itself."""
    from transformers import PreTrainedTokenizerFast

    from limbeck.evaluation.fidelity import _prefix_bytes
    from test_pieces import llama_2

    hf = PreTrainedTokenizerFast(tokenizer_object=llama_2(), bos_token="<s>", eos_token="<e>", unk_token="<unk>")
    hf.save_pretrained(tmp_path / "t")
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert tokenizer.dummy_prefix == (1, 1)
    assert load_tokenizer(TOKENIZER).dummy_prefix is None
    texts = ["the old still", "naïve 東京", "a"]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DatasetConfig(name=str(tmp_path / "x.jsonl"), max_length=64, validation_fraction=0.0)
    pack(config, tokenizer, tmp_path / "out")
    rows = PackedDataset(tmp_path / "out").rows([0])
    labels = rows.labels[rows.labels >= 0]
    counted = int(tokenizer.byte_lengths()[labels].sum()) - _prefix_bytes(rows, tokenizer.dummy_prefix)
    assert counted == sum(len(text.encode()) for text in texts)


def test_terminated_writers_do_not_block_the_next(tmp_path):
    """A lock belongs to a process: when it is killed, another may write."""
    script = (
        "import sys, time, pathlib\nfrom limbeck.storage import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1]), '.x.lock'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    from limbeck.storage import folder_lock

    with folder_lock(tmp_path, ".x.lock"):
        pass
