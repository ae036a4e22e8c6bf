"""Loading a tokenizer, training one, and the hash that says two of them are the same.

The one idea: a tokenizer is the text of its `tokenizers` JSON plus its special ids; equal hash means equal
ids for every text, so teacher, cache, packed data and student are compared by that hash alone. The JSON is what is
loaded, saved and used, whatever class a model's type would give it.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config import DatasetConfig, Recipe
from limbeck.data.holdout import Holdout
from limbeck.data.pieces import at_spaces
from limbeck.data.sources import open_source
from limbeck.errors import LimbeckError, MismatchError
from limbeck.manifests import TokenizerRecord
from limbeck.models import require_reachable, resolve_model
from limbeck.storage import read_json

END_OF_TEXT = "<|endoftext|>"
LARGEST_VOCABULARY = 1 << 24  # what the cache's codec can hold


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer as the pipeline uses it."""

    name: str
    hf: Any
    eos_id: int

    @property
    def json(self) -> str:
        """The `tokenizers` JSON, without truncation or padding."""
        return str(self.hf.backend_tokenizer.to_str())

    @property
    def hash(self) -> str:
        """SHA-256 of the JSON and the end-of-text id."""
        return hashlib.sha256(f"{self.eos_id}\n{self.json}".encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return int(max(self.hf.get_vocab().values())) + 1

    @property
    def model_keys(self) -> dict[str, int]:
        """What a new model's config takes over: the vocabulary's size, and special ids."""
        special = {"bos_token_id": self.hf.bos_token_id, "eos_token_id": self.eos_id}
        if self.hf.pad_token_id not in special.values():  # an embedding row named padding never learns
            special["pad_token_id"] = self.hf.pad_token_id
        return {"vocab_size": self.vocab_size, **special}

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, `[V]` int64; special tokens stand for none.

        Exact for byte-level and byte-fallback vocabularies, where every token is a fixed string of bytes.
        """
        special = set(self.hf.all_special_ids)
        lengths = [0 if i in special else len(data) for i, data in enumerate(self.token_bytes())]
        return np.array(lengths, dtype=np.int64)

    @property
    def dummy_prefix(self) -> tuple[int, int] | None:
        """Begin-of-text id and the bytes that the tokenizer puts behind it without their being in the text.

        Llama 2's tokenizer writes a space before a text; None for tokenizers that add nothing, or no begin-of-text
        (the first token of a document is then never scored).
        """
        ids, bos = self.hf("a")["input_ids"], self.hf.bos_token_id
        if bos is None or not ids or ids[0] != bos:
            return None
        extra = int(self.byte_lengths()[ids].sum()) - 1
        return (int(bos), extra) if extra > 0 else None

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; special tokens stand for their names."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        decoder = json.loads(self.json).get("decoder") or {}
        byte_level = "ByteLevel" in json.dumps(decoder)
        added = {index for index, token in self.hf.added_tokens_decoder.items()}
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        found = [b""] * self.vocab_size
        for token, index in self.hf.get_vocab().items():
            if byte_level and index not in added:  # one printable character stands for one byte
                found[index] = bytes(byte_of[character] for character in token)
            elif is_byte_token(token):
                found[index] = bytes([int(token[3:-1], 16)])
            else:
                found[index] = token.replace("▁", " ").encode()
        return found


def is_byte_token(token: str) -> bool:
    """True for the token of a byte, `<0x0A>`, to which a vocabulary with byte fallback falls back."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> LoadedTokenizer:
    """Load a tokenizer from a folder or the hub.

    Raises:
        LimbeckError: it cannot be found, has no fast (`tokenizers`) form, or has no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = resolve_model(name)
    require_reachable(name, "tokenizer", revision)
    has_json = _refuse_large_ids(name, path, revision)
    # AutoTokenizer may take a class that the model's type suggests, and that makes its own splitting rule.
    kind = PreTrainedTokenizerFast if has_json and not trust_remote_code else AutoTokenizer
    try:
        hf = kind.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise LimbeckError(f"tokenizer {name!r} could not be loaded: {_no_tokenizer(path, error)}") from error
    if hf.eos_token_id is None and kind is PreTrainedTokenizerFast:  # GPT-2's files leave it to the class
        with contextlib.suppress(OSError, ValueError):
            _take_special_tokens(hf, AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False))
    if not hf.is_fast:
        raise LimbeckError(f"tokenizer {name!r} has no tokenizer.json; convert it to a fast tokenizer first.")
    if hf.eos_token_id is None:
        raise LimbeckError(f"tokenizer {name!r} has no end-of-text token; set eos_token in its tokenizer_config.json.")
    largest = max([*hf.get_vocab().values(), *hf.backend_tokenizer.encode("a").ids], default=0)
    if largest >= LARGEST_VOCABULARY:
        raise _id_error(name, largest)
    hf.backend_tokenizer.no_truncation()
    hf.backend_tokenizer.no_padding()
    return LoadedTokenizer(name=name, hf=hf, eos_id=int(hf.eos_token_id))


def _no_tokenizer(path: str, error: Exception) -> str:
    """Why, in one line."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        return f"{folder} has no tokenizer.json. Name a model's folder, or a hub id."
    return str(error).strip().splitlines()[0][:300]


def _take_special_tokens(hf: Any, other: Any) -> None:
    """Name the tokens that another reading of the same files names, where they are in the vocabulary."""
    vocab = hf.get_vocab()
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = getattr(other, key)
        if getattr(hf, key) is None and token in vocab:
            setattr(hf, key, token)


def read_as_other(folder: Path, own: LoadedTokenizer) -> str | None:
    """The class by which `AutoTokenizer` reads a saved folder, where that gives another tokenizer; None: the same."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, AttributeError):
        return "nothing that loads"
    same = found.is_fast and replace(own, hf=found).json == own.json
    return None if same else type(found).__name__


def _refuse_large_ids(name: str, path: str, revision: str | None) -> bool:
    """Refuse a tokenizer.json whose ids no model has; the library that reads it would abort the process.

    Returns:
        True when there is a tokenizer.json.

    Raises:
        LimbeckError: an id is negative or larger than any vocabulary, or the file is no JSON object.
    """
    from transformers.utils import cached_file

    try:
        found = cached_file(path, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return False  # AutoTokenizer says what is wrong with the name
    if found is None:
        return False
    data = read_json(Path(found))
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise LimbeckError(f"{found} is no tokenizer.json: it has no `model`.")
    vocab = data["model"].get("vocab") or {}
    listed = data.get("added_tokens") or []
    added = [entry.get("id") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else [None]
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *added]
    for number in ids:
        if not isinstance(number, int) or not 0 <= number < LARGEST_VOCABULARY:
            raise _id_error(name, number)
    return True


def _id_error(name: str, number: object) -> LimbeckError:
    return LimbeckError(f"tokenizer {name!r} has the id {number}; ids lie between 0 and {LARGEST_VOCABULARY - 1}.")


def recipe_tokenizer(recipe: Recipe) -> LoadedTokenizer:
    """The tokenizer a recipe means: named, trained in this run, or else the teacher's or the student's."""
    return load_tokenizer(*recipe.tokenizer_source)


def require_same(known: LoadedTokenizer | TokenizerRecord, tokenizer: LoadedTokenizer, whose: str, other: str) -> None:
    """Refuse a tokenizer that is not the known one, by their names and by what tells them apart.

    Args:
        known: the tokenizer, or what was written down of it.
        tokenizer: to compare with.
        whose: what the known one belongs to.
        other: what the other one belongs to.

    Raises:
        MismatchError: they differ.
    """
    if known.hash != tokenizer.hash:
        raise MismatchError(
            f"{whose} has the tokenizer {known.name} and {other} has {tokenizer.name}, which is another one: "
            f"{_difference(known, tokenizer)}. Targets are ids of one vocabulary: use the same tokenizer for both "
            "(--tokenizer), or make one of them again."
        )


def _difference(first: LoadedTokenizer | TokenizerRecord, second: LoadedTokenizer) -> str:
    """The first thing in which two tokenizers differ, as far as it is known."""
    if first.vocab_size not in (0, second.vocab_size):
        return f"{first.vocab_size} ids there, {second.vocab_size} here"
    if not isinstance(first, LoadedTokenizer):
        return "its hash is another"
    one, other = first.hf.get_vocab(), second.hf.get_vocab()
    if one != other:
        token, number = next((token, number) for token, number in one.items() if other.get(token) != number)
        return f"{token!r} is {number} in one and {other.get(token, 'not there')} in the other"
    if first.eos_id != second.eos_id:
        return f"the end of text is {first.eos_id} in one and {second.eos_id} in the other"
    return "they split text by other rules"


def train_tokenizer(dataset: DatasetConfig, vocab_size: int, folder: Path) -> LoadedTokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenisation) on the training documents and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(dataset), trainer)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    hf.save_pretrained(folder)
    return load_tokenizer(str(folder))


def _training_texts(dataset: DatasetConfig) -> Iterator[str]:
    source = open_source(dataset)
    holdout = Holdout.of(dataset, source)
    for document in islice(source.documents(), dataset.max_samples):
        if not holdout.of_document(document.key):
            yield from at_spaces(document.chunks())
