"""Stock llama.cpp runs what we export: the same tokens, logits, perplexity, first choices.

Needs the `verify` extra (`make verify`): llama-cpp-python is built from source.
"""

import json

import numpy as np
import pytest
import torch

from awkward import AWKWARD
from conftest import TOKENIZER, limbeck, save_model, tiny_model
from limbeck.config import TernaryConfig
from limbeck.export.gguf import GGUFExport
from limbeck.models import load_causal_lm
from limbeck.serving.model import GgufModel
from limbeck.students.build import make_ternary
from test_export import SHAPES
from test_gguf_oracle import CASES, TERNARY_CASES, lively_model
from test_tokenizers import byte_level_tokenizer, phi3_tokenizer, sentencepiece_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
llama_cpp = pytest.importorskip("llama_cpp", reason="needs the verify extra (llama-cpp-python)")


def test_fifty_awkward_strings_have_the_same_ids(tmp_path):
    from transformers import AutoTokenizer

    model = tiny_model(**SHAPES["llama"])
    make_ternary(model, TernaryConfig(group_size=256))
    GGUFExport(save_model(model, tmp_path / "final"), "tq2_0").write(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    assert len(AWKWARD) == 50
    for text in AWKWARD:
        theirs = llama.tokenize(text.encode(), add_bos=True, special=True) if text else []
        assert theirs == tokenizer(text)["input_ids"], text
    llama.close()


@pytest.mark.parametrize("rule", ["llama-bpe", "dbrx", "qwen2", "refact"])
def test_fifty_awkward_strings_of_every_splitting_rule(tmp_path, rule):
    """As Llama 3, OLMo 2, Qwen 2 and Granite 3 have them; each with tokens that merges do not reach."""
    tokenizer = byte_level_tokenizer(rule)
    model = tiny_model(**SHAPES["llama"], vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    GGUFExport(tmp_path / "final", "f16").write(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    assert llama.metadata["tokenizer.ggml.pre"] == rule
    for text in AWKWARD:
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True) if text else []
        assert theirs == tokenizer(text, add_special_tokens=False)["input_ids"], text
    llama.close()


@pytest.mark.parametrize("name", ["my run", "phi-3 of mine"])
@pytest.mark.parametrize("strips", [True, False])
def test_space_behind_special_tokens_whatever_the_files_name(tmp_path, name, strips):
    """llama.cpp knows by a file's name that Phi 3's take it away."""
    tokenizer = phi3_tokenizer() if strips else byte_level_tokenizer("refact")
    special = "<|end|>" if strips else "<|endoftext|>"
    tiny_model(**SHAPES["llama"], vocab_size=len(tokenizer)).save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    GGUFExport(tmp_path / "final", "f16", name=name).write(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in (f"def foo(x):{special}\n  return", f"a{special} b", f"{special}  {special}c", "a<|endoftext|> \nb"):
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == tokenizer(text, add_special_tokens=False)["input_ids"], text
    llama.close()


@pytest.mark.parametrize("prepend", ["normalizer", "metaspace", "none"])
def test_fifty_awkward_strings_of_a_sentencepiece_tokenizer(tmp_path, prepend):
    """As Llama 2 and Mistral have it, as it is converted since, and as Gemma has it."""
    tokenizer = sentencepiece_tokenizer(prepend)
    model = tiny_model(**SHAPES["llama"], vocab_size=len(tokenizer))
    make_ternary(model, TernaryConfig(group_size=256))
    model.save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    GGUFExport(tmp_path / "final", "tq2_0").write(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in AWKWARD:
        if prepend == "metaspace" and text.startswith(" "):  # which puts no second space there
            continue
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True) if text else []
        assert theirs == tokenizer(text, add_special_tokens=False)["input_ids"], text
    llama.close()


def logits_of_both(folder, path, ids):
    """Logits `[T, vocabulary]` of transformers and of llama.cpp."""
    with torch.no_grad():
        ours = load_causal_lm(str(folder), dtype="float32").eval()(input_ids=ids[None], use_cache=False).logits[0]
    llama = llama_cpp.Llama(str(path), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False)
    llama.eval(ids.tolist())
    theirs = torch.from_numpy(np.array(llama.scores[: len(ids)], dtype=np.float32))
    llama.close()
    return ours.float(), theirs


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "f16") for case in CASES), *((case, "tq2_0") for case in TERNARY_CASES)]
)
def test_llama_cpp_computes_the_logits_of_every_architecture(tmp_path, case, kind):
    """Random weights, large and uneven, so that whatever lies elsewhere or is left out shows.

    Of nine positions in ten: where a router all but draws, the last bit decides on the expert.
    """
    model = lively_model(3, **(CASES if kind == "f16" else TERNARY_CASES)[case])
    if kind != "f16":
        make_ternary(model, TernaryConfig(group_size=256))
    folder = save_model(model, tmp_path / "final")
    assert GGUFExport(folder, kind, "f16").write(tmp_path / "m.gguf")["type"] == kind
    ids = torch.randint(5, 4000, (64,), generator=torch.Generator().manual_seed(1))
    ours, theirs = logits_of_both(folder, tmp_path / "m.gguf", ids)
    away = float(((ours - theirs).square().mean(dim=-1).sqrt() / ours.std()).quantile(0.9))
    print(case, kind, f"{away:.1e} of the logits' standard deviation")
    assert away < (0.02 if kind == "f16" else 0.1)


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "f16") for case in CASES), *((case, "tq2_0") for case in TERNARY_CASES)]
)
def test_our_engine_computes_llama_cpps_logits(tmp_path, case, kind):
    """The same file in both programs; activations are rounded for a token here, for 256 columns there."""
    model = lively_model(3, **(CASES if kind == "f16" else TERNARY_CASES)[case])
    if kind != "f16":
        make_ternary(model, TernaryConfig(group_size=256))
    GGUFExport(save_model(model, tmp_path / "final"), kind, "q8_0").write(tmp_path / "m.gguf")
    ids = torch.randint(5, 4000, (64,), generator=torch.Generator().manual_seed(1))
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False)
    llama.eval(ids.tolist())
    theirs = np.array(llama.scores[: len(ids)], dtype=np.float32)
    llama.close()
    ours = GgufModel(tmp_path / "m.gguf").line().extend(ids.tolist(), every=True)
    away = float(np.quantile(np.sqrt(np.mean((ours - theirs) ** 2, axis=1)) / ours.std(), 0.9))
    print(case, kind, f"{away:.1e} of the logits' standard deviation")
    assert away < (0.03 if kind == "f16" else 0.15)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of the standard library, packed once."""
    root = tmp_path_factory.mktemp("data")
    limbeck(
        "data", "pack", "--dataset", "stdlib", "--tokenizer", TOKENIZER, "--seq-len", 256, "--output", root / "data",
        "--dataset.validation_fraction", 0.05,
    )  # fmt: skip
    return root / "data"


@pytest.fixture(scope="module", params=SHAPES)
def trained(request, data, tmp_path_factory):
    """A ternary student of each architecture after a hundred steps of cross-entropy."""
    root = tmp_path_factory.mktemp(request.param)
    student = {k: v for k, v in SHAPES[request.param].items() if k != "head_dim"} | {"tie_word_embeddings": True}
    if "head_dim" in SHAPES[request.param]:
        student["head_dim"] = SHAPES[request.param]["head_dim"]
    tree = {
        "name": request.param, "output_dir": str(root),
        "dataset": {"name": "stdlib", "max_length": 256, "packed_dir": str(data), "validation_fraction": 0.05,
                    "attention": "packed"},
        "tokenizer": {"name": TOKENIZER},
        "student": {"config": student, "ternary": {"group_size": 256}},
        "optimizer": {"name": "muon_adamw", "adamw": {"learning_rate": 8e-3}},
        "training": {"mode": "ce", "max_steps": 100, "per_device_train_batch_size": 8, "learning_rate": 0.02,
                     "report_to": [], "logging_steps": 50, "bf16": "auto"},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(json.dumps(tree))
    limbeck("train", root / "recipe.yaml", timeout=1200)
    (root / "data").symlink_to(data)
    return root


@pytest.mark.parametrize("kind", ["tq2_0", "q4_0", "q2_0"])
def test_llama_cpp_agrees_with_the_torch_student(trained, tmp_path, kind):
    done = limbeck(
        "export", trained, "--type", kind, "--embedding", "f16", "--output", tmp_path / "m.gguf", "--verify", "--json",
        timeout=900,
    )  # fmt: skip
    found = json.loads(done.stdout)
    print(trained.name, kind, {key: found[key] for key in ("kl_mean", "top1_agreement", "perplexity_torch")})
    assert found["weights_equal"] is True
    assert found["tokens"] >= 1000
    assert found["perplexity_llama_cpp"] == pytest.approx(found["perplexity_torch"], rel=0.01)
    assert found["top1_agreement"] >= 0.98
    assert torch.isfinite(torch.tensor(found["kl_mean"]))
