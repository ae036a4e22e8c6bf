"""The tokenizer that packed the rows is the one that is saved, loaded and used; and what llama.cpp is told of it."""

import json
from itertools import pairwise

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from awkward import AWKWARD
from conftest import TOKENIZER, save_model, tiny_model, with_keys
from limbeck.data.tokenizer import load_tokenizer, read_as_other
from limbeck.errors import LimbeckError
from limbeck.export.sentencepiece import adds_space, is_sentencepiece, scores
from limbeck.export.vocabulary import add_vocabulary, check_vocabulary, name_in_file

SPACE = "▁"


def test_a_qwen2_folder_keeps_the_tokenizer_it_was_saved_with(tmp_path):
    """AutoTokenizer makes a Qwen2Tokenizer of it, which splits digits."""
    folder = save_model(tiny_model(model_type="qwen2"), tmp_path / "m")
    own = load_tokenizer(str(folder))
    shipped = load_tokenizer(TOKENIZER)
    assert own.hash == shipped.hash
    assert own.hf("x = 123456")["input_ids"] == shipped.hf("x = 123456")["input_ids"]
    assert read_as_other(folder, own) == "Qwen2Tokenizer"
    assert read_as_other(save_model(tiny_model(), tmp_path / "llama"), own) is None


def sentencepiece_tokenizer(prepend: str = "normalizer") -> PreTrainedTokenizerFast:
    """A BPE with byte fallback, merges as transformers writes them for SentencePiece's: every pair, the best first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    text = [
        "def foo(x): return 1234 + x",
        "the quick brown fox  jumps over the lazy dog",
        "naïve café",
        "aaaaaaaa aaaa",
    ] * 30
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learnt = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    tokens = list(dict.fromkeys([*tokens, "a", "b", "c", "ab", "bc", "abc", SPACE * 2, SPACE * 4]))
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token in sorted((t for t in tokens[259:] if len(t) > 1), key=vocab.get):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = (pair for pair in pairs if pair[0] in vocab and pair[1] in vocab)
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend == "normalizer":  # Llama 2, Mistral
        steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        tokenizer.normalizer = normalizers.Sequence(steps)
    elif prepend == "metaspace":  # as converted since
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:  # Gemma: nothing is put before a text
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def byte_level_tokenizer(rule: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text by the rule that llama.cpp calls so, with a token that no merge makes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    digits = {"llama-bpe": r"\p{N}{1,3}", "dbrx": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
    if rule in digits:
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits[rule] + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
    steps = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in digits)]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = steps
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    learner.train_from_iterator(AWKWARD * 3, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"] if "".join(pair) != "Ġfox"]
    assert "Ġfox" in learnt["vocab"]
    tokenizer = Tokenizer(models.BPE(learnt["vocab"], merges, ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = steps, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def phi3_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's with Phi 3's special tokens, most of which take the space behind them away."""
    from tokenizers import AddedToken

    tokenizer = sentencepiece_tokenizer()
    for name, strips in (("<|endoftext|>", False), ("</s>", True), ("<|user|>", True), ("<|end|>", True)):
        tokenizer.add_tokens(AddedToken(name, rstrip=strips, normalized=False, special=True), special_tokens=True)
    return tokenizer


def test_the_name_of_a_file_says_how_its_special_tokens_are_used():
    plain = json.loads(byte_level_tokenizer("refact").backend_tokenizer.to_str())
    assert name_in_file("my run", plain) == "my run"
    assert name_in_file("My-Phi-3-mini", plain) == "My-Phi 3-mini"
    assert name_in_file("phi3 as modern-BERT", plain) == "phi 3 as modern BERT"
    phi3 = json.loads(phi3_tokenizer().backend_tokenizer.to_str())
    assert name_in_file("my run", phi3) == "my run (phi3 tokenizer)"
    assert name_in_file("Phi-3-mini", phi3) == "Phi-3-mini"
    for change, message in (({"rstrip": True}, "has rstrip set"), ({"lstrip": True}, "has lstrip or single_word set")):
        plain["added_tokens"][0].update(change)
        with pytest.raises(LimbeckError, match=message):
            check_vocabulary(plain)


class Written:
    """What a GGUFWriter is told."""

    def __getattr__(self, name):
        return lambda *values, **kwargs: self.__dict__.__setitem__(name.removeprefix("add_"), values[0])


def llama_cpp_ids(told, text: str) -> list[int]:
    """SentencePiece in llama.cpp: join the neighbours with the best score, the leftmost of equals."""
    ids = {token: number for number, token in enumerate(told.token_list)}
    plain = (" " if told.add_space_prefix else "") + text
    symbols = list(plain.replace(" ", SPACE))
    while True:
        joined = [(told.token_scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not joined:
            break
        place = -max(joined)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("prepend", ["normalizer", "metaspace", "none"])
def test_scores_cut_fifty_awkward_strings_as_the_merges_do(tmp_path, prepend):
    tokenizer = sentencepiece_tokenizer(prepend)
    tokenizer.save_pretrained(tmp_path)
    told = Written()
    add_vocabulary(told, tmp_path, len(tokenizer), "m")
    assert told.tokenizer_model == "llama"
    assert told.add_space_prefix is (prepend != "none")
    for text in AWKWARD:
        if not text or (prepend == "metaspace" and text.startswith(" ")):  # which puts no second space there
            continue
        assert llama_cpp_ids(told, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_types_of_a_sentencepiece_vocabulary(tmp_path):
    import gguf

    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_tokens(["<user>"])
    tokenizer.save_pretrained(tmp_path)
    told = Written()
    add_vocabulary(told, tmp_path, len(tokenizer) + 2, "m")
    kinds = gguf.TokenType
    types = dict(zip(told.token_list, told.token_types, strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x0A>"]) == (kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE)
    assert (types["<user>"], types["fo"], told.token_types[-1]) == (kinds.USER_DEFINED, kinds.NORMAL, kinds.UNUSED)


def test_merges_that_scores_cannot_tell_are_refused():
    data = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())
    assert is_sentencepiece(data)
    assert adds_space(data)
    missing = json.loads(json.dumps(data))
    gone = missing["model"]["merges"].pop(3)
    with pytest.raises(LimbeckError, match=f"are not merged although '{''.join(gone)}' is a token"):
        scores(missing, [])
    apart = json.loads(json.dumps(data))
    merges = apart["model"]["merges"]
    twice = next(i for i, m in enumerate(merges) if "".join(m) == "".join(merges[i + 1]))
    merges.append(merges.pop(twice))
    with pytest.raises(LimbeckError, match="do not stand together"):
        scores(apart, [])
    with pytest.raises(LimbeckError, match="falls back to bytes and has no token <0x41>"):
        scores({"model": {"merges": [], "vocab": {f"<0x{b:02X}>": b for b in range(256) if b != 0x41}}}, [])
    data["normalizer"] = {"type": "NFKC"}
    with pytest.raises(LimbeckError, match="normalises text by NFKC"):
        check_vocabulary(data)
    data["normalizer"] = None
    with pytest.raises(LimbeckError, match="keeps spaces as they are"):
        check_vocabulary(data)


def test_what_is_saved_beside_a_student_is_what_packed_the_rows(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    tokenizer.save_pretrained(tmp_path / "t")
    own = load_tokenizer(str(tmp_path / "t"))
    own.hf.save_pretrained(tmp_path / "final")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "final")
    assert load_tokenizer(str(tmp_path / "final")).hash == own.hash
    assert AutoTokenizer.from_pretrained(tmp_path / "t")("a b")["input_ids"] == own.hf("a b")["input_ids"]


def test_special_tokens_that_only_the_class_names_are_taken(tmp_path):
    """As in the oldest GPT-2 folders: nothing in their files says what ends a text."""
    save_model(tiny_model(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt2"}))
    own, shipped = load_tokenizer(str(tmp_path)), load_tokenizer(TOKENIZER)
    assert (own.eos_id, own.hash) == (shipped.eos_id, shipped.hash)


def test_a_student_that_others_read_with_another_tokenizer_is_told(recipe, packed, caplog):
    from limbeck.training.phases import train_recipe

    own = with_keys(recipe, teacher={"use_cached_logits": False}, student={"config": {"model_type": "qwen2"}})
    caplog.set_level("INFO", "limbeck")
    train_recipe(own, recipe.student_dir)
    assert (
        "reads " + str(recipe.student_dir / "final") + " as Qwen2Tokenizer, which cuts text otherwise"
        in (recipe.student_dir / "training.log").read_text()
    )
