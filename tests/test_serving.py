"""Text from GGUF files: their tokenizers, sampling, speculative decoding, scores, timings; the command line."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from awkward import AWKWARD
from conftest import TOKENIZER, limbeck, save_model, tiny_model
from limbeck.config import TernaryConfig
from limbeck.config.engine import EngineConfig
from limbeck.errors import ConfigError, LimbeckError
from limbeck.export.gguf import GGUFExport
from limbeck.kernels import native
from limbeck.serving.generate import Generation
from limbeck.serving.model import GgufModel
from limbeck.serving.sampling import Sampling, draw
from limbeck.serving.tokenizer import Detokenizer, GgufTokenizer
from limbeck.students.build import make_ternary
from test_export import SHAPES
from test_gguf_oracle import CASES, lively_model
from test_tokenizers import byte_level_tokenizer, phi3_tokenizer, sentencepiece_tokenizer

TEACHER = Path(TOKENIZER)
pytestmark = pytest.mark.skipif(native() is None, reason="the extension is not built here")


def file_of(folder, tokenizer=None, **settings):
    """A GGUF file of a small model, with a tokenizer if one is given."""
    model = tiny_model(**{**SHAPES["llama"], **settings})
    if tokenizer is None:
        save_model(model, folder / "final")
    else:
        model.save_pretrained(folder / "final")
        tokenizer.save_pretrained(folder / "final")
    GGUFExport(folder / "final", "f16").write(folder / "m.gguf")
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped teacher as GGUF."""
    path = tmp_path_factory.mktemp("shipped") / "m.gguf"
    GGUFExport(TEACHER, "f16").write(path)
    return path


# Tokenizers


def same_ids(path, tokenizer, texts=AWKWARD):
    ours = GgufModel(path).tokenizer
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, begin=False) == ids, text
        assert ours.decode(ids).lstrip() == tokenizer.decode(ids, skip_special_tokens=True).lstrip(), text
        if text.isprintable():
            detokenizer = Detokenizer(ours)
            assert "".join([*map(detokenizer.add, ids), detokenizer.rest()]) == ours.decode(ids), text


def test_a_files_tokenizer_is_the_models(tmp_path):
    from transformers import AutoTokenizer

    same_ids(file_of(tmp_path), AutoTokenizer.from_pretrained(TOKENIZER))


@pytest.mark.parametrize("rule", ["llama-bpe", "dbrx", "qwen2", "refact"])
def test_every_splitting_rule(tmp_path, rule):
    tokenizer = byte_level_tokenizer(rule)
    same_ids(file_of(tmp_path, tokenizer, vocab_size=len(tokenizer)), tokenizer)


@pytest.mark.parametrize("prepend", ["normalizer", "none"])
def test_a_sentencepiece_tokenizer(tmp_path, prepend):
    tokenizer = sentencepiece_tokenizer(prepend)
    path = file_of(tmp_path, tokenizer, vocab_size=len(tokenizer))
    same_ids(path, tokenizer, [text for text in AWKWARD if text])


def test_a_rule_that_is_not_known_is_refused(tmp_path):
    import gguf

    path = file_of(tmp_path)
    reader = gguf.GGUFReader(path, "r+")
    part = reader.fields["tokenizer.ggml.pre"].parts[-1]
    part[:] = np.frombuffer(b"other", np.uint8)[: len(part)]
    reader.data.flush()
    with pytest.raises(LimbeckError, match="rule 'other'"):
        _ = GgufModel(path).tokenizer


def test_phi3_takes_the_space_behind_special_tokens(tmp_path):
    tokenizer = phi3_tokenizer()
    path = file_of(tmp_path, tokenizer, vocab_size=len(tokenizer))
    ours = GgufModel(path).tokenizer
    for text in ("def foo(x):<|end|>\n  return", "a<|end|> b", "<|end|>  <|end|>c", "a<|endoftext|> \nb"):
        assert ours.encode(text, begin=False) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_damaged_tokenizers_are_one_error(shipped):
    whole = GgufModel(shipped).engine.metadata()
    wrong = {"tokens": 7, "merges": [1, 2], "token_type": [1], "bos_token_id": "x", "model": "other", "pre": "default"}
    for key, value in wrong.items():
        with pytest.raises(LimbeckError):
            GgufTokenizer({**whole, f"tokenizer.ggml.{key}": value}, "it")
    broken = [*whole["tokenizer.ggml.tokens"]]
    broken[300] = "\udcff"
    with pytest.raises(LimbeckError, match="can not be read"):
        GgufTokenizer({**whole, "tokenizer.ggml.tokens": broken}, "it")


def test_begin_of_text_and_ends_by_llama_cpps_rules(shipped):
    whole = GgufModel(shipped).engine.metadata()
    for rule, begins in (("llama-bpe", True), ("qwen2", False)):
        told = {**whole, "tokenizer.ggml.pre": rule, "tokenizer.ggml.bos_token_id": 3}
        del told["tokenizer.ggml.add_bos_token"]
        assert (GgufTokenizer(told, "it").encode("x")[0] == 3) == begins
    tokens = [*whole["tokenizer.ggml.tokens"]]
    kinds = np.array(whole["tokenizer.ggml.token_type"])
    place = int(np.flatnonzero(kinds == 3)[-1])
    tokens[place] = "<|im_end|>"
    found = GgufTokenizer({**whole, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}, "it")
    assert place in found.stops


# Sampling


def test_the_distribution_is_torchs():
    logits = np.random.default_rng(0).normal(0.0, 3.0, 200).astype(np.float32)
    exact = torch.from_numpy(logits).double()
    everything = Sampling(0.8, 0, 1.0).distribution(logits)
    np.testing.assert_allclose(everything, (exact / 0.8).softmax(dim=0), rtol=1e-9)
    best = exact.topk(5).indices
    few = Sampling(0.8, 5, 1.0).distribution(logits)
    np.testing.assert_allclose(few[best], (exact[best] / 0.8).softmax(dim=0), rtol=1e-9)
    assert np.count_nonzero(few) == 5
    order = everything.argsort()[::-1]
    nucleus = Sampling(0.8, 0, 0.6).distribution(logits)
    kept = np.count_nonzero(nucleus)
    assert everything[order[: kept - 1]].sum() < 0.6 <= everything[order[:kept]].sum()
    np.testing.assert_allclose(nucleus[order[:kept]], everything[order[:kept]] / everything[order[:kept]].sum())
    assert Sampling(0.0).distribution(logits).argmax() == logits.argmax()


def test_draws_follow_the_distribution():
    probabilities = np.array([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(probabilities, rng) for _ in range(20000)], minlength=6) / 20000
    np.testing.assert_allclose(counts, probabilities, atol=0.015)
    assert not counts[[0, 2, 5]].any()


# Generation


def test_the_likeliest_text_is_transformers(shipped):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    ids = tokenizer("import os\n\ndef ", return_tensors="pt")
    wanted = model.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist()
    ours = GgufModel(shipped, EngineConfig(cache="f32"))
    prompt = ours.tokenizer.encode("import os\n\ndef ")
    assert prompt == ids["input_ids"][0].tolist()
    found = list(Generation(ours, Sampling(0.0)).tokens(prompt, 12))
    assert prompt + found == wanted


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model and a draft over a vocabulary of 32 tokens, both far from certain and unlike each other."""
    folder = tmp_path_factory.mktemp("pair")
    files = {}
    kinds = (("model", "qwen3", 1), ("recurrent", "qwen3next", 2), ("draft", "llama", 5), ("short", "llama", 6))
    for name, case, seed in kinds:
        context = {"max_position_embeddings": 64} if name == "short" else {}
        settings = {
            **CASES[case],
            **context,
            "vocab_size": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
        }
        model = lively_model(seed, **settings)
        with torch.no_grad():
            for p in model.get_output_embeddings().parameters():
                p.mul_(0.12)
        model.save_pretrained(folder / name)
        write_letters(folder / name)
        GGUFExport(folder / name, "f16").write(folder / f"{name}.gguf")
        files[name] = folder / f"{name}.gguf"
    return files


def write_letters(folder):
    """A byte-level tokenizer of 32 tokens without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, **{chr(ord("!") + number): number + 2 for number in range(30)}}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize("name", ["model", "recurrent"])
def test_speculative_decoding_has_the_models_distribution(pair, name):
    """Pairs of tokens after a prompt: their counts over many seeds against the model's own probabilities."""
    model, draft = GgufModel(pair[name], EngineConfig(threads=1)), GgufModel(pair["draft"], EngineConfig(threads=1))
    prompt, runs, sampling = [5, 9, 12], 6000, Sampling(1.0, 0, 1.0)
    line = model.line()
    first = sampling.distribution(line.extend(prompt))
    counts: Counter[int] = Counter()
    seconds: Counter[tuple[int, int]] = Counter()
    kept = proposed = 0
    for seed in range(runs):
        generation = Generation(model, Sampling(1.0, 0, 1.0, seed), draft, 3)
        found = list(generation.tokens(prompt, 3))
        counts[found[0] if found else 1] += 1
        if len(found) > 1:
            seconds[found[0], found[1]] += 1
        kept, proposed = kept + generation.statistics.kept, proposed + generation.statistics.proposed
    assert 0.05 < kept / proposed < 0.9  # both branches were taken
    _chi_square(np.array([counts[token] for token in range(32)]), first * runs)
    likely = int(np.argmax([counts[token] if token > 1 else 0 for token in range(32)]))
    behind = sampling.distribution(line.copy().extend([likely]))
    behind[1] = 0.0  # an end is not told
    seen = np.array([seconds[likely, token] for token in range(32)])
    _chi_square(seen, behind / behind.sum() * seen.sum())


def _chi_square(seen, wanted):
    """Cells of at least five, the others as one; below the 0.9999 quantile."""
    large = wanted >= 5
    seen = np.append(seen[large], seen[~large].sum())
    wanted = np.append(wanted[large], wanted[~large].sum())
    statistic = ((seen - wanted) ** 2 / np.maximum(wanted, 1e-9))[wanted > 0].sum()
    free = len(seen) - 1
    assert free > 3
    quantile = free * (1 - 2 / (9 * free) + 3.719 * (2 / (9 * free)) ** 0.5) ** 3  # Wilson and Hilferty's
    assert statistic < quantile, statistic


@pytest.mark.parametrize("name", ["model", "recurrent"])
def test_the_likeliest_text_is_the_same_with_a_draft(pair, name):
    model, draft = GgufModel(pair[name]), GgufModel(pair["draft"])
    plain = list(Generation(model, Sampling(0.0)).tokens([3, 4], 40))
    generation = Generation(model, Sampling(0.0), draft, 4)
    assert list(generation.tokens([3, 4], 40)) == plain
    itself = Generation(model, Sampling(0.0), model, 4)
    assert list(itself.tokens([3, 4], 40)) == plain
    assert itself.statistics.kept == itself.statistics.proposed
    assert itself.statistics.as_dict()["tokens_per_pass"] > 3.5


def test_a_draft_of_another_vocabulary_is_refused(pair, shipped):
    with pytest.raises(ConfigError, match="32 tokens"):
        Generation(GgufModel(shipped), Sampling(), GgufModel(pair["draft"]))


def test_a_text_ends_at_the_context(pair):
    model, draft = GgufModel(pair["model"]), GgufModel(pair["draft"])
    endless = {"model": model, "sampling": Sampling(0.0)}
    model.tokenizer.stops = draft.tokenizer.stops = frozenset()
    plain = list(Generation(**endless).tokens([7] * 300, 100))
    assert len(plain) == 20
    assert list(Generation(**endless, draft=draft).tokens([7] * 300, 100)) == plain
    # A draft whose own context ends earlier proposes until then, or nothing.
    short = GgufModel(pair["short"])
    short.tokenizer.stops = frozenset()
    for length in (10, 63, 64, 200):
        wanted = list(Generation(**endless).tokens([7] * length, 90))
        assert list(Generation(**endless, draft=short).tokens([7] * length, 90)) == wanted
    generation = Generation(model, Sampling(0.0), draft)
    with pytest.raises(ConfigError, match="320 tokens and .* context of 320"):
        list(generation.tokens([7] * 320, 1))
    with pytest.raises(ConfigError, match="no tokens"):
        list(generation.tokens([], 1))


# The command line


def refused(message, *words):
    done = limbeck(*words, check=False)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_generate_by_the_command_line(shipped, pair):
    words = ["generate", shipped, "--prompt", "def ", "--max-new-tokens", "8", "--threads", "1", "--json"]
    once = json.loads(limbeck(*words).stdout)
    assert once["text"].startswith("def ")
    assert once["statistics"]["new_tokens"] == 8
    assert json.loads(limbeck(*words).stdout)["text"] == once["text"]
    found = limbeck("generate", pair["model"], "--draft", pair["draft"], "--prompt", "%&", "--json")
    assert 0.0 <= json.loads(found.stdout)["statistics"]["accepted_share"] <= 1.0
    refused("no GGUF file", "generate", TEACHER, "--draft", pair["draft"])


def test_bench_by_the_command_line(shipped):
    words = ["bench", shipped, "--prefill", "32", "--decode", "8", "--repeats", "1", "--threads", "2"]
    found = json.loads(limbeck(*words, "--json").stdout)
    assert set(found["threads"]) == {"1", "2"}
    for rates in found["threads"].values():
        assert rates["decode_tokens_per_second"] > 0
        moved = found["bytes_a_token"] * rates["decode_tokens_per_second"] / 1e9
        assert rates["gigabytes_per_second"] == pytest.approx(moved, rel=0.02, abs=0.01)
    assert "of bandwidth" in limbeck(*words).stdout
    refused("context", "bench", shipped, "--prefill", "4000")


def test_damaged_files_end_in_one_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00cut")
    refused("cut off or damaged", "generate", tmp_path / "m.gguf")
    refused("does not exist", "generate", tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(b"no such thing")
    refused("is no GGUF file", "generate", tmp_path / "other.gguf")
    refused("does not exist", "bench", tmp_path / "none.gguf")


def test_eval_scores_a_file_like_its_student(tmp_path):
    """A run's student and the file made of it, on the same held-out rows."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def f{number}(x):\n    return x * {number}\n" for number in range(300)))
    run = tmp_path / "run"
    limbeck(
        "run", "recipes/quickstart.yaml", "--dataset", text, "--output-dir", run, "--max-steps", "4",
        "--warmup-steps", "0",
        "--dataset.validation_fraction", "0.3", "--pipeline.generate", "false", "--pipeline.ce_baseline", "false",
        "--pipeline.export", "gguf",
    )  # fmt: skip
    (file,) = run.rglob("*.gguf")
    student = json.loads(limbeck("eval", run, "--json").stdout)["student"]
    found = json.loads(limbeck("eval", file, "--json").stdout)["student"]
    assert found["tokens"] == student["tokens"]
    assert found["loss"] == pytest.approx(student["loss"], abs=5e-3)
    assert found["loss"] != student["loss"]
    assert found["kl_to_teacher"] == pytest.approx(student["kl_to_teacher"], abs=5e-3)
    assert found["top1_agreement"] == pytest.approx(student["top1_agreement"], abs=0.02)
    elsewhere = tmp_path / "m.gguf"
    elsewhere.write_bytes(file.read_bytes())
    refused("no held-out rows", "eval", elsewhere)


def test_ternary_students_are_within_a_hundredth(tmp_path):
    """A real text through a ternary student: 16-bit cache and 8-bit embedding, as it is served."""
    from limbeck.models import load_causal_lm

    model = load_causal_lm(str(TEACHER), dtype="float32").eval()
    make_ternary(model, TernaryConfig(group_size=256 if model.config.hidden_size % 256 == 0 else 64))
    folder = save_model(model, tmp_path / "final")
    GGUFExport(folder).write(tmp_path / "m.gguf")
    served = GgufModel(tmp_path / "m.gguf")
    ids = served.tokenizer.encode((TEACHER.parents[1] / "errors.py").read_text())[:200]
    with torch.no_grad():
        student = load_causal_lm(str(folder), dtype="float32").eval()
        wanted = student(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    found = served.line().extend(ids, every=True)
    relative = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.mean(relative) < 1e-2
    assert np.mean(found.argmax(axis=1) == wanted.argmax(axis=1)) > 0.97
