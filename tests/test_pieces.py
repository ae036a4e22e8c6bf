"""Long documents in pieces: the ids of the whole, for every kind of tokenizer, and memory that does not grow."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import limbeck.data.pieces as pieces
from conftest import TOKENIZER, digest
from limbeck.config import DatasetConfig
from limbeck.data.pack import pack
from limbeck.data.pieces import PieceEncoder, at_spaces, without_prefix
from limbeck.data.tokenizer import load_tokenizer

WORDS = "the old still stood in a corner of the workshop 12 345 6789 naïve Straße 東京 ação don't we'll x=y+1;".split()
TEXT = " ".join(random.Random(0).choices(WORDS, k=4000))


def byte_level(splits=None):
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits is None)
    tokenizer.pre_tokenizer = (
        plain if splits is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(splits), "isolated"), plain])
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<e>"], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def llama_2(prefix=True):
    """SentencePiece as a BPE: a dummy space before the text, spaces written as ▁, bytes for what is unknown, a BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    before = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "<e>", *byte_tokens], show_progress=False,
        initial_alphabet=["▁", *"abcdefghijklmnopqrstuvwxyz1"],
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT.split()[:500], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<e>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A <e>", special_tokens=[("<e>", 1)])
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = {
    "gpt2": byte_level, "cl100k": lambda: byte_level(CL100K), "llama2": llama_2, "metaspace": metaspace,
    "wordpiece": word_piece,
}  # fmt: skip
MADE = {}


def made(kind):
    if kind not in MADE:
        MADE[kind] = KINDS[kind]()
    return MADE[kind]


def whole(tokenizer, text, eos):
    """What the tokenizer itself says of the whole text, ended by the end-of-text id."""
    ids = tokenizer.encode(text).ids
    return ids if ids and ids[-1] == eos else [*ids, eos]


def in_pieces(tokenizer, text, eos, chunk=50):
    encoder = PieceEncoder(tokenizer.to_str(), eos)
    cut = list(encoder.pieces((text[i : i + chunk] for i in range(0, len(text), chunk)), "a text"))
    assert "".join(part for part, _, _ in cut) == text
    return np.concatenate(encoder.encode(cut)).tolist(), len(cut)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 120)
    monkeypatch.setattr(pieces, "_WINDOW", 200)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole(kind, small_pieces):
    tokenizer, eos = made(kind), 1
    for text in (
        TEXT[:6000],
        TEXT[:3000].replace(" ", "\n"),
        "  ".join(TEXT.split()[:500]),
        TEXT[:700] + "\n\n\n" * 90,
    ):
        found, count = in_pieces(tokenizer, text, eos)
        assert found == whole(tokenizer, text, eos)
        assert count > 5


@given(st.text(st.sampled_from("ab1 .,\n'é東\u0301\t-_/(["), min_size=0, max_size=900), st.sampled_from(sorted(KINDS)))
@settings(max_examples=60, deadline=None)
def test_any_text_has_the_ids_of_the_whole(text, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 60)
        patch.setattr(pieces, "_WINDOW", 150)
        if text:
            assert in_pieces(made(kind), text, 1)[0] == whole(made(kind), text, 1)


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
def test_text_without_spaces_is_cut_too(kind, small_pieces, caplog):
    for text in ("".join(random.Random(1).choices("ACGT", k=3000)), "".join(filter(str.isalpha, TEXT.lower()))[:3000]):
        found, count = in_pieces(made(kind), text, 1)
        assert found == whole(made(kind), text, 1)
        assert count > 5
        assert not caplog.text, "there are places where it would cut"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_have_what_follows_them_as_in_the_whole(kind, small_pieces):
    tokenizer = made(kind)
    token = next(iter(tokenizer.get_added_tokens_decoder().values()), None)
    if token is None:
        pytest.skip("no special token")
    words = TEXT.split()[:600]
    text = " ".join(word + token.content * (i % 7 == 3) for i, word in enumerate(words))
    found, count = in_pieces(tokenizer, text, 1)
    assert found == whole(tokenizer, text, 1)
    assert count > 5


def test_a_long_run_of_one_character_is_whole_or_a_warning(caplog):
    tokenizer = Tokenizer.from_str(load_tokenizer(TOKENIZER).json)
    text = "a" + " " * 400_000 + "b"
    found, count = in_pieces(tokenizer, text, 0, chunk=1 << 16)
    assert count > 1
    assert found == whole(tokenizer, text, 0) or "the ids there may differ" in caplog.text


def test_training_texts_without_spaces_are_cut_too():
    chunks = ["東京" * (pieces.PIECE // 2)] * 8
    cut = list(at_spaces(chunks))
    assert "".join(cut) == "".join(chunks)
    assert max(map(len, cut)) <= 3 * pieces.PIECE
    assert len(cut) > 2


def test_a_place_inside_a_word_does_not_agree():
    encoder = PieceEncoder(made("gpt2").to_str(), 0)
    assert encoder.agrees("in the", " corner")
    assert not encoder.agrees("in th", "e corner")


def test_the_twin_without_prefix_adds_nothing():
    twin = Tokenizer.from_str(without_prefix(made("llama2").to_str()))
    plain = made("llama2").encode("▁old", add_special_tokens=False).tokens
    assert "".join(twin.encode(" old", add_special_tokens=False).tokens) == "▁old"
    assert "".join(plain) == "▁▁old"


def test_training_texts_are_cut_before_spaces():
    chunks = ["one two th", "ree four", " five"]
    assert list(at_spaces(chunks)) == ["one two", " three", " four", " five"]


def test_a_long_file_packs_as_its_text_would(tmp_path, monkeypatch):
    """The same rows from pieces in two processes, from a JSON line held whole, and after a kill in its middle."""
    tokenizer = load_tokenizer(TOKENIZER)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "long.txt").write_text(TEXT * 12)
    settings_ = {"name": str(tmp_path / "a"), "max_length": 64, "validation_fraction": 0.0, "rows_per_shard": 40}
    pack(DatasetConfig(**settings_, num_proc=1), tokenizer, tmp_path / "whole")
    monkeypatch.setattr(pieces, "PIECE", 3000)
    pack(DatasetConfig(**settings_, num_proc=1), tokenizer, tmp_path / "cut")
    assert digest(tmp_path / "whole", "*.parquet") == digest(tmp_path / "cut", "*.parquet")
    import limbeck.data.pack as module

    original, written = module._write_shard, []

    def stops(*arguments):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(1)
        return original(*arguments)

    monkeypatch.setattr(module, "_write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        pack(DatasetConfig(**settings_, num_proc=1), tokenizer, tmp_path / "killed")
    monkeypatch.setattr(module, "_write_shard", original)
    pack(DatasetConfig(**settings_, num_proc=1), tokenizer, tmp_path / "killed")
    assert digest(tmp_path / "whole", "*.parquet") == digest(tmp_path / "killed", "*.parquet")


MEMORY = """
import pathlib, resource, sys
from limbeck.config import DatasetConfig
from limbeck.data.pack import pack
from limbeck.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
config = DatasetConfig(name=sys.argv[2], validation_fraction=0.0, num_proc=1)
pack(config, tokenizer, pathlib.Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """At 205 bytes a byte the second file would need 1 GB more than the first."""
    used = []
    for name, repeats in (("small", 20), ("large", 260)):
        (tmp_path / f"{name}.txt").write_text((TEXT + " ") * repeats)
        arguments = [TOKENIZER, str(tmp_path / f"{name}.txt"), str(tmp_path / name)]
        done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        used.append(int(done.stdout))
    assert used[1] < used[0] + 150, used
