"""Corners that deliberate errors got past: each test holds lines that no other one did."""

import json
import math
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from conftest import TINY, TOKENIZER, save_model, stopped_after, tiny_model, with_keys
from limbeck import DistillationTrainer, LocalTeacher, SparseTargets, TeacherCache
from limbeck.config import DatasetConfig, Recipe, StudentConfig, TernaryConfig
from limbeck.data.dataset import PackedDataset, PackedRows
from limbeck.data.holdout import held_out
from limbeck.data.pack import pack
from limbeck.data.pieces import _changes, _words
from limbeck.data.sources import open_source
from limbeck.data.tokenizer import _refuse_large_ids, load_tokenizer, train_tokenizer
from limbeck.errors import ConfigError, LimbeckError, MismatchError
from limbeck.evaluation.fidelity import _prefix_bytes, score_model
from limbeck.evaluation.run import evaluate_recipe
from limbeck.evaluation.suites import Fidelity, table
from limbeck.export.blocks import BLOCK_TYPES
from limbeck.export.gguf import _FILE_TYPES, GGUFExport
from limbeck.export.inspect import describe, inspect_gguf
from limbeck.export.run import _default_output
from limbeck.export.verify import compare_with_llama_cpp, held_out_rows
from limbeck.export.vocabulary import splitting_rule
from limbeck.models import load_causal_lm
from limbeck.students.build import build_student, make_ternary
from limbeck.students.quantizer import PackedWeight
from limbeck.targets.codec import CodecSpec, decode, encode
from limbeck.teachers.build_cache import build_cache
from limbeck.training.guard import StepGuard
from limbeck.training.phases import train_recipe
from test_optim import EXPERTS
from test_pieces import llama_2
from test_trainer import arguments, distributions, student_and_teacher, with_changes

# -- data -----------------------------------------------------------------------------------------------


def test_as_many_documents_as_asked_for_and_files_of_known_kinds_alone(tmp_path, caplog):
    folder = tmp_path / "texts"
    (folder / "folder.txt").mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"text {number} " * 20)
    (folder / "notes.pdf").write_text("not a text")
    tokenizer = load_tokenizer("tiny-python")
    settings = {"name": str(folder), "max_length": 16, "validation_fraction": 0.0}
    assert [document.key for document in open_source(DatasetConfig(**settings)).documents()] == [
        f"{number}.txt" for number in range(5)
    ]
    made = pack(DatasetConfig(**settings, max_samples=3), tokenizer, tmp_path / "packed")
    assert made.documents == 3
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(LimbeckError, match="holds no documents"):
        pack(DatasetConfig(**{**settings, "name": str(tmp_path / "none.jsonl")}), tokenizer, tmp_path / "empty")


def test_a_tokenizer_is_trained_on_what_is_not_held_out(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        name = f"{number}.txt"
        word = "zyxwvu" if held_out(name, 0.5) else "abcdef"
        (folder / name).write_text(f" {word}" * 50)
    dataset = {"name": str(folder), "validation_fraction": 0.5}
    recipe = Recipe.model_validate({"dataset": dataset, "tokenizer": {"train_vocab_size": 300}})
    tokens = train_tokenizer(recipe.dataset, 300, tmp_path / "made").hf.get_vocab()
    assert any("abcdef" in token for token in tokens)
    assert not any("zyx" in token for token in tokens)


def test_a_tokenizer_that_pads_is_told_not_to(tmp_path):
    folder = save_model(tiny_model(), tmp_path / "m")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["padding"] = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(str(folder))
    (ids,) = tokenizer.hf.backend_tokenizer.encode_batch_fast(["def f"])
    assert len(ids) == len(load_tokenizer("tiny-python").hf("def f")["input_ids"])


def test_where_characters_change_their_kind():
    text = "ab12 c..d3e  "
    kinds = ["a" if c.isalpha() else "1" if c.isdigit() else " " if c.isspace() else "." for c in text]
    for half in (2, 4, 6):
        borders = [i for i in range(half + 1, 2 * half + 1) if kinds[i] != kinds[i - 1]] if 2 * half < len(text) else []
        assert list(_changes(text, half)) == borders[::-1]
    words = "aa bb cc dd ee ff"
    assert list(_words(words, 4)) == [5]
    assert list(_words(words, 5)) == [8, 5]


def test_rows_of_many_groups_are_those_of_memory(corpus, tmp_path, monkeypatch):
    import limbeck.data.dataset as module

    settings = {"name": str(corpus), "max_length": 8, "validation_fraction": 0.0}
    pack(DatasetConfig(**settings), load_tokenizer("tiny-python"), tmp_path / "packed")
    memory = PackedDataset(tmp_path / "packed")
    assert len(memory) > 3 * 64
    wanted = memory.rows(range(len(memory)))
    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", 0)
    found = PackedDataset(tmp_path / "packed").rows(range(len(memory)))
    assert torch.equal(found.input_ids, wanted.input_ids)
    assert torch.equal(found.doc_ids, wanted.doc_ids)
    for beyond in (-1, len(memory)):
        with pytest.raises(IndexError, match=f"row {beyond} of {len(memory)}"):
            memory[beyond]


def test_a_trained_tokenizer_splits_as_gpt2_does_and_gives_any_text_back(corpus, tmp_path):
    recipe = Recipe.model_validate({"dataset": {"name": str(corpus)}, "tokenizer": {"train_vocab_size": 400}})
    trained = train_tokenizer(recipe.dataset, 400, tmp_path / "t")

    vocabulary = trained.hf.get_vocab()
    assert len(vocabulary) == trained.vocab_size <= 400
    assert any(len(token) > 3 for token in vocabulary)
    assert not any("Ġ" in token[1:] for token in vocabulary), "no token reaches across a space"
    for text in ("def f(x): return x", "  naïve 東京\n\t🙂 ", "\x00\xff"):
        ids = trained.hf(text)["input_ids"]
        assert trained.hf.decode(ids) == text
        assert b"".join(trained.token_bytes()[i] for i in ids) == text.encode()
    for name in ("eos_token", "bos_token", "pad_token"):
        assert getattr(trained.hf, name) == "<|endoftext|>"
    assert load_tokenizer(str(tmp_path / "t")).hash == trained.hash


def test_tokens_of_sentencepiece_vocabularies_stand_for_their_bytes(tmp_path):
    from transformers import PreTrainedTokenizerFast

    from test_pieces import llama_2

    hf = PreTrainedTokenizerFast(tokenizer_object=llama_2(), bos_token="<s>", eos_token="<e>", unk_token="<unk>")
    hf.save_pretrained(tmp_path / "t")
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    found, vocabulary = tokenizer.token_bytes(), tokenizer.hf.get_vocab()
    assert found[vocabulary["<0xE6>"]] == b"\xe6"
    assert found[vocabulary["▁the"]] == b" the"
    assert tokenizer.byte_lengths()[vocabulary["<s>"]] == 0
    assert tokenizer.byte_lengths()[vocabulary["▁the"]] == 4


def test_the_largest_id_is_the_codecs(tmp_path):
    for number, wrong in ((2**24 - 1, False), (2**24, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": number}}}))
        with pytest.raises(LimbeckError, match="ids lie between 0 and 16777215") if wrong else nullcontext():
            _refuse_large_ids("t", str(folder), None)


def test_a_begin_of_text_alone_is_no_dummy_prefix(tmp_path):
    for prefix, found in ((False, None), (True, (1, 1))):
        hf = PreTrainedTokenizerFast(tokenizer_object=llama_2(prefix), bos_token="<s>", eos_token="<e>")
        hf.save_pretrained(tmp_path / "t")
        assert hf("a")["input_ids"][0] == 1
        assert load_tokenizer(str(tmp_path / "t")).dummy_prefix == found


def test_a_dataset_of_the_hub_is_named_by_the_revision_asked_for(monkeypatch):
    class Hub:
        def repo_info(self, name, revision, repo_type, timeout):
            assert (repo_type, timeout > 0) == ("dataset", True)
            return SimpleNamespace(sha=f"{name} at {revision}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    settings = DatasetConfig(name="someone/texts", revision="abc")
    assert open_source(settings).identity()["content"] == "someone/texts at abc"


# -- evaluation -----------------------------------------------------------------------------------------


def test_the_table_has_a_teacher_where_it_is_at_hand(recipe, packed, teacher_folder, tmp_path, caplog):
    student = save_model(tiny_model(seed=3), tmp_path / "s")
    found = evaluate_recipe(recipe, {"student": str(student)})
    assert list(found) == ["teacher", "student"]
    assert found["teacher"]["kl_to_teacher"] == 0.0
    assert found["student"]["kl_to_teacher"] > 0.0
    remote = with_keys(recipe, teacher={"endpoint": ["http://127.0.0.1:1"]}, tokenizer={"name": TOKENIZER})
    caplog.set_level("INFO", "limbeck")
    found = evaluate_recipe(remote, {"student": str(student)})
    assert list(found) == ["student"]
    assert found["student"]["kl_to_teacher"] is None
    assert "is not there, and what compares with it is left out (Failed to connect" in caplog.text


def test_a_prefix_counts_once_after_each_begin_of_text_that_is_scored():
    ids = torch.tensor([[1, 5, 6, 1, 7, 1, 1, 8]])
    rows = PackedRows(torch.arange(1), ids, torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3]]))
    assert _prefix_bytes(rows, (1, 2)) == 2 * 3
    assert _prefix_bytes(rows, None) == 0


def test_the_table_shows_what_there_is_and_a_dash_for_the_rest():
    scores = {"loss": 1.5, "perplexity": 1234.5, "bits_per_byte": None, "top1_agreement": 0.5}
    head, row = table({"my_student": scores}, [Fidelity()])
    assert dict(zip(head, row, strict=True)) == {
        "model": "my student", "loss": "1.5000", "perplexity": "1234.50", "top-1 agreement": "50.0%",
    }  # fmt: skip


def test_models_and_rows_of_other_tokenizers_are_not_scored(recipe_tree, recipe, packed, teacher_folder, monkeypatch):
    import limbeck.models.loading as module

    def bent(*given, **named):
        model = load_causal_lm(*given, **named)
        plain = model.forward

        def forward(*args, **kwargs):
            outputs = plain(*args, **kwargs)
            outputs.logits = outputs.logits.abs()
            return outputs

        model.forward = forward
        return model

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_causal_lm", bent)
        with pytest.raises(LimbeckError, match="logits"):
            evaluate_recipe(recipe, {"student": str(teacher_folder)})
    manifest = json.loads((recipe.packed_dir / "manifest.json").read_text())
    changed = {**manifest, "tokenizer": {**manifest["tokenizer"], "hash": "0" * 16}}
    (recipe.packed_dir / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(LimbeckError, match="tokenizer"):
        evaluate_recipe(recipe, {"student": str(teacher_folder)})


def test_a_model_that_is_evaluated_has_the_datas_tokenizer_and_keeps_documents_apart(recipe, packed, tmp_path):
    other = save_model(tiny_model(), tmp_path / "other")
    data = json.loads((other / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(MismatchError, match="tokenizer"):
        evaluate_recipe(recipe, {"student": str(other)})
    mamba = tiny_model(model_type="mamba", state_size=8, intermediate_size=64)
    folder = save_model(mamba, tmp_path / "mamba")
    with pytest.raises(ConfigError, match="does not keep the documents"):
        evaluate_recipe(recipe, {"student": str(folder)})


def test_hidden_states_of_another_width_than_the_rows_are_long(packed):
    model = tiny_model(hidden_size=48)
    rows = packed.rows(range(len(packed)))
    kept = rows.labels >= 0
    with torch.no_grad():
        logits = model(**rows.model_inputs("per_document")).logits[kept]
    wanted = torch.nn.functional.cross_entropy(logits, rows.labels[kept])
    found = score_model(model, packed, np.ones(4096, dtype=np.int64))
    assert found.loss == pytest.approx(float(wanted), rel=1e-5)


# -- export ---------------------------------------------------------------------------------------------


class FakeLlama:
    """What `llama_cpp.Llama` gives, from a transformers model whose logits are bent a little."""

    model, made = None, []

    def __init__(self, path, n_ctx, n_batch, logits_all, verbose):
        assert logits_all
        FakeLlama.made.append((n_ctx, n_batch))

    def reset(self):
        self.scores = None

    def eval(self, ids):
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0] * 1.3
        self.scores = np.concatenate([logits.numpy(), np.full((5, logits.shape[1]), np.nan, np.float32)])

    def close(self):
        self.scores = None


def test_the_comparison_with_llama_cpp_is_what_it_says(tmp_path, monkeypatch):
    folder = save_model(tiny_model(seed=2, hidden_size=32), tmp_path / "m")
    model = load_causal_lm(str(folder), dtype="float32").eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20.0)
    model.save_pretrained(folder)
    FakeLlama.model = model
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=FakeLlama))
    rows = torch.randint(0, 4096, (3, 9), generator=torch.Generator().manual_seed(0))
    found = compare_with_llama_cpp(GGUFExport(folder), tmp_path / "x.gguf", rows)
    with torch.no_grad():
        logits = model(input_ids=rows).logits.double()
    p, q = logits.log_softmax(-1), (logits * 1.3).log_softmax(-1)
    assert FakeLlama.made[-1] == (9, 9)
    assert found["tokens"] == 27
    assert found["kl_mean"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found["top1_agreement"] == 1.0
    for name, x in (("torch", p), ("llama_cpp", q)):
        losses = [-float(x[row, t, rows[row, t + 1]]) for row in range(3) for t in range(8)]
        assert found[f"perplexity_{name}"] == pytest.approx(math.exp(sum(losses) / 24), rel=1e-3)


def test_a_file_says_whether_texts_begin_and_end_with_special_tokens(tmp_path):
    named = ("tq1_0", "tq2_0", "q4_0", "f16")  # q2_0 is newer than the package
    assert [_FILE_TYPES[name] for name in named] == [gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] for name in named]
    from tokenizers import processors

    folder = save_model(tiny_model(), tmp_path / "m")
    path = folder / "tokenizer.json"
    plain = path.read_text()
    from tokenizers import Tokenizer

    for template, begins, ends in (("$A", False, False), ("<|endoftext|> $A", True, False),
                                   ("<|endoftext|> $A <|endoftext|>", True, True)):  # fmt: skip
        tokenizer = Tokenizer.from_str(plain)
        special = [("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
        path.write_text(tokenizer.to_str())
        GGUFExport(folder).write(tmp_path / "m.gguf")
        fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
        told = {name: bool(fields[f"tokenizer.ggml.{name}"].contents()) for name in ("add_bos_token", "add_eos_token")}
        assert told == {"add_bos_token": begins, "add_eos_token": ends}
        assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_an_export_lies_beside_its_model(tmp_path):
    assert _default_output(tmp_path / "run", tmp_path / "run" / "final", "x") == tmp_path / "run" / "export" / "x"
    assert _default_output(tmp_path / "final", tmp_path / "final", "x") == tmp_path / "export" / "x"


def test_a_files_tokens_say_what_they_are(tmp_path):
    """Special ones control, added ones are the user's, and rows beyond the tokenizer's stand for no text."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = save_model(tiny_model(vocab_size=4104), tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("plainly_added")])
    tokenizer.save_pretrained(folder)
    GGUFExport(folder).write(tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    kinds = gguf.TokenType
    assert (len(tokens), len(types)) == (4104, 4104)
    assert (tokens[4096], types[4096]) == ("plainly_added", kinds.USER_DEFINED)
    assert (tokens[4100], types[4097:]) == ("[PAD4100]", [kinds.UNUSED] * 7)
    assert types[tokens.index("<|endoftext|>")] == kinds.CONTROL
    assert types.count(kinds.NORMAL) == 4096 - types.count(kinds.CONTROL)
    assert fields["llama.vocab_size"].contents() == 4104
    stored = {tensor["name"]: tensor["type"] for tensor in inspect_gguf(tmp_path / "m.gguf")["tensors"]}
    assert (stored["blk.0.attn_q.weight"], stored["blk.0.attn_norm.weight"]) == ("f16", "f32")
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize(("rest", "dtype"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
def test_what_is_not_ternary_is_as_precise_as_asked(tmp_path, rest, dtype):
    from safetensors import safe_open

    from limbeck.export.packed import export_packed
    from limbeck.export.source import ExportSource

    model = tiny_model()
    make_ternary(model, TernaryConfig(group_size=8))
    export_packed(ExportSource.open(save_model(model, tmp_path / "final")), tmp_path / "packed", rest)
    with safe_open(tmp_path / "packed" / "ternary.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {kind for name, kind in kinds.items() if name.endswith(".codes")} == {"U8"}
    assert {kind for name, kind in kinds.items() if not name.endswith((".codes", ".scales"))} == {dtype}
    written = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert written["dtype"] == {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]


def test_as_many_held_out_rows_as_hold_the_tokens_asked_for(recipe, packed, tmp_path):
    whole = PackedDataset(recipe.packed_dir, "validation")
    recipe.packed_dir.rename(tmp_path / "data")
    length = whole.max_length
    for count, rows in ((1, 1), (length, 1), (length + 1, 2), (10**9, len(whole))):
        found = held_out_rows(tmp_path / "student" / "final", count)
        assert found.tolist() == [
            PackedDataset(tmp_path / "data", "validation")[i]["input_ids"].tolist() for i in range(rows)
        ]
    assert held_out_rows(tmp_path / "a" / "b" / "c" / "d", 5) is None


def test_blocks_are_ggmls():
    assert all(kind.fits(2 * kind.columns, kind.columns) is None for kind in BLOCK_TYPES.values())
    for name in ("tq1_0", "tq2_0", "q4_0"):  # q2_0 is newer than the package
        kind = BLOCK_TYPES[name]
        known = gguf.GGMLQuantizationType[name.upper()]
        assert (kind.number, kind.columns, kind.bytes) == (int(known), *gguf.GGML_QUANT_SIZES[known])
    assert (BLOCK_TYPES["q2_0"].columns, BLOCK_TYPES["q2_0"].bytes) == (64, 2 + 64 // 4)


def test_a_described_file_has_a_line_a_tensor():
    tensor = {"name": "a.weight", "type": "F16", "shape": [4, 2], "bytes": 16, "bits_per_weight": 16.0}
    found = {"file": "x", "bytes": 99, "architecture": "llama", "weights": 8, "bits_per_weight": 16.0, "metadata": {},
             "tensors": [tensor, {**tensor, "name": "b"}]}  # fmt: skip
    lines = describe(found).splitlines()
    assert sum("16 bytes  16 bits/weight" in line for line in lines) == 2
    assert any(line.startswith("a.weight  F16") for line in lines)
    assert "0" in describe({**found, "tensors": [], "weights": 0})


@pytest.mark.parametrize(("kind", "pieces"), [("BPE", "Whitespace"), ("WordPiece", "ByteLevel")])
def test_both_halves_of_a_byte_level_bpe_are_asked_for(kind, pieces):
    with pytest.raises(LimbeckError, match="knows byte-level BPE, and"):
        splitting_rule({"model": {"type": kind}, "pre_tokenizer": {"type": pieces, "add_prefix_space": False}})


# -- students -------------------------------------------------------------------------------------------


def test_shadow_students_train_and_are_saved_and_packed_ones_say_they_do_not(tmp_path):
    from limbeck.export.packed import export_packed
    from limbeck.export.source import ExportSource

    model = tiny_model(**EXPERTS)
    make_ternary(model, TernaryConfig(group_size=8))
    source = ExportSource.open(save_model(model, tmp_path / "final"))
    assert source.model.hf_quantizer.is_trainable
    assert source.model.hf_quantizer.is_qat_trainable
    assert source.model.hf_quantizer.is_serializable()
    assert not source.model.hf_quantizer.requires_calibration
    export_packed(source, tmp_path / "packed", "f32")
    packed = load_causal_lm(str(tmp_path / "packed"), dtype="float32")
    assert not packed.hf_quantizer.is_trainable
    assert not packed.hf_quantizer.is_qat_trainable
    packed.save_pretrained(tmp_path / "again")
    again = load_causal_lm(str(tmp_path / "again"), dtype="float32")
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, packed(input_ids=ids).logits)


@pytest.mark.parametrize(("changes", "message"), [
    ({"hiden_size": 64}, "no key 'hiden_size' for model_type llama; did you mean hidden_size"),
    ({"vocab_size": 4095}, "vocab_size is 4095 and the tokenizer has 4096 ids"),
    ({"hidden_size": "wide"}, "does not describe a causal LM"),
])  # fmt: skip
def test_a_student_that_cannot_be_built_is_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_student(StudentConfig(config={**TINY, **changes}), {"vocab_size": 4096}, 0)


def test_a_student_is_built_as_its_section_says():
    keys = {"vocab_size": 4096, "eos_token_id": 3, "bos_token_id": 5}
    config = {**TINY, "head_dim": 24, "rope_theta": 5e5, "bos_token_id": 7}
    one, same, other = (build_student(StudentConfig(config=config), keys, seed) for seed in (1, 1, 2))
    assert (one.config.vocab_size, one.config.eos_token_id, one.config.bos_token_id) == (4096, 3, 7)
    assert one.model.layers[0].self_attn.q_proj.weight.shape == (48, 32)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not hasattr(one.config, "quantization_config")
    ternary = build_student(StudentConfig(config=TINY, ternary=TernaryConfig(group_size=8)), keys, 1)
    assert ternary.config.quantization_config["group_size"] == 8


def test_a_students_code_is_trusted_as_its_section_says(monkeypatch):
    import limbeck.students.build as module

    asked = []
    monkeypatch.setattr(module, "load_causal_lm", lambda name, **given: asked.append((name, given)) or tiny_model())
    section = StudentConfig(model="here", revision="v1", trust_remote_code=True, config={"rope_theta": 5.0})
    build_student(section, {"vocab_size": 4096}, 0)
    assert asked == [("here", {"revision": "v1", "trust_remote_code": True, "dtype": "float32", "rope_theta": 5.0})]


@pytest.mark.parametrize(("width", "grouped"), [(16, True), (12, False)])
def test_grouped_products_are_used_for_the_widths_they_take(monkeypatch, width, grouped):
    import limbeck.students.ternary as module

    used = []
    for name, products in {name: ALL_EXPERTS_FUNCTIONS[name] for name in ("grouped_mm", "batched_mm")}.items():
        spied = partial(lambda name, products, *given: used.append(name) or products(*given), name, products)
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, spied)
    assert module.ALL_EXPERTS_FUNCTIONS is ALL_EXPERTS_FUNCTIONS
    model = tiny_model(**{**EXPERTS, "moe_intermediate_size": width})
    make_ternary(model, TernaryConfig(group_size="row"))
    model(torch.arange(6)[None])
    assert set(used) == {"grouped_mm" if grouped else "batched_mm"}


def test_packed_experts_have_groups_along_their_inputs():
    held = PackedWeight(torch.Size([3, 20, 32]), 16)
    assert held.codes.shape == (3, 20, 8)
    assert held.scales.shape == (3, 20, 2)


# -- targets --------------------------------------------------------------------------------------------


def test_a_cache_writes_into_its_folder_alone(recipe, packed, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build_cache(recipe, tmp_path / "cache")
    assert not list((tmp_path / "here").iterdir())


def test_a_caches_targets_come_with_the_data(recipe, packed, tmp_path):
    """Workers of the loader read them, in any order; their items go through a pickle."""
    import pickle

    build_cache(recipe, recipe.cache_dir)
    cache = TeacherCache(recipe.cache_dir)
    assert cache.in_workers
    trainer = DistillationTrainer(tiny_model(), arguments(tmp_path), teacher=cache, train_dataset=packed)
    batch = trainer.data_collator([packed[3], packed[1]])
    expected = cache.read([3, 1]).tensors()
    assert all(tensor.shape[:2] == (2, packed.max_length) for tensor in expected.values())
    assert all(torch.equal(batch["targets"][name], expected[name]) for name in expected)
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copied.read([2]).token_ids, cache.read([2]).token_ids)
    with pytest.raises(IndexError, match=r"row 999 of \d+"):
        cache.read([999])
    assert not LocalTeacher(tiny_model(), top_k=4).in_workers


def test_a_positions_tail_is_its_own():
    targets = SparseTargets.from_logits(
        4.0 * torch.randn(64, 300, generator=torch.Generator().manual_seed(0)), 280, (1.0, 2.0)
    )
    together = targets.at_temperature(2.0)
    for i in range(64):
        for mine, alone in zip(together, targets[slice(i, i + 1)].at_temperature(2.0), strict=True):
            assert torch.equal(mine[i : i + 1], alone)


def test_fewer_ids_than_the_cache_has_places_for():
    targets = SparseTargets.from_logits(torch.randn(6, 50, generator=torch.Generator().manual_seed(0)), 3, (1.0,))
    spec = CodecSpec(5, 50, (1.0,))
    sections = encode(targets, spec)
    assert all(len(section) == 6 for section in sections.values())
    found = decode(sections, spec)
    assert (found.token_ids[:, 3:] == -1).all()
    assert torch.equal(found.token_ids[:, :3].long(), targets.token_ids.sort(dim=-1).values.long())


def test_a_split_that_is_not_cached_is_named(recipe, packed):
    build_cache(with_keys(recipe, teacher={"splits": ["train"]}), recipe.cache_dir)
    with pytest.raises(MismatchError, match="holds the splits train and not validation"):
        TeacherCache(recipe.cache_dir, "validation")


# -- checkpoints ----------------------------------------------------------------------------------------


def test_a_checkpoint_remembers_flops_best_and_settings(packed, tmp_path):
    trainer = DistillationTrainer(
        tiny_model(), arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps",
                                eval_steps=1, metric_for_best_model="eval_loss", greater_is_better=False,
                                include_num_input_tokens_seen="all"),
        train_dataset=packed, eval_dataset=packed,
    )  # fmt: skip
    trainer.settings_id = "mine"
    trainer.train()
    state = json.loads((tmp_path / "step_3" / "trainer_state.json").read_text())
    assert state["total_flos"] > 0
    assert state["best_model_checkpoint"] == str(tmp_path / f"step_{state['best_global_step']}")
    progress = json.loads((tmp_path / "step_3" / "progress.json").read_text())
    assert (progress["settings"], progress["settings_began"], progress["step"]) == ("mine", 0, 3)
    assert progress["groups"] == [str(group["name"]) for group in trainer.optimizer.param_groups]
    again = DistillationTrainer(
        tiny_model(seed=4), arguments(tmp_path / "other", max_steps=4), train_dataset=packed, eval_dataset=packed
    )
    again.settings_id = "another"
    again.train(resume_from_checkpoint=str(tmp_path / "step_2"))
    assert again.settings_began == 2
    assert again.state.best_global_step is None, "the best of another folder is not this run's"


def test_a_weight_of_ten_thousand_is_a_cause(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 10_500.0
    guard = StepGuard()
    guard.saw(torch.tensor([9]), torch.tensor(math.nan), None)
    with pytest.raises(LimbeckError, match=r"the largest weight is 1.05e\+04"):
        guard.check(1, 1.0, model, arguments(tmp_path), scaled=False)


def test_the_guard_looks_at_the_last_twenty_steps(tmp_path):
    guard, args = StepGuard(), SimpleNamespace(learning_rate=0.1, warmup_steps=3, fp16=False, max_grad_norm=1.0)
    model = torch.nn.Linear(2, 2)
    for step in range(1, 41):
        guard.saw(torch.tensor([step]), torch.tensor(1.0), None)
        guard.check(step, 1000.0 if step == 1 else 1.0, model, args, False)
    causes = guard._causes(41, model, args, True)
    assert not any("gradient norm went from" in cause for cause in causes), "the first step is long ago"
    guard.check(41, 50.0, model, args, False)
    assert any("went from 1 to 50 in the last 20 steps" in cause for cause in guard._causes(42, model, args, True))


def test_the_guard_says_what_is_wrong_with_the_weights():
    guard, args = StepGuard(), SimpleNamespace(learning_rate=0.1, warmup_steps=3, fp16=False, max_grad_norm=0)
    model = torch.nn.Linear(2, 2)
    for value, words in ((math.nan, "not finite after step 6"), (1e9, "the largest weight is 1e+09"), (0.1, "")):
        torch.nn.init.constant_(model.weight, value)
        causes = guard._causes(7, model, args, True)
        assert any(words in cause for cause in causes)
        assert sum("weight" in cause for cause in causes) == bool(words)


def test_a_run_without_optimizer_state_estimates_its_size_by_its_weights(packed, tmp_path):
    trainer = DistillationTrainer(tiny_model(), arguments(tmp_path), train_dataset=packed)
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    assert trainer._estimated_size() == sum(t.numel() * t.element_size() for t in tensors)
    trainer.train()
    moments = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert trainer._estimated_size() == sum(t.numel() * t.element_size() for t in [*tensors, *moments])


def test_what_a_kill_left_of_a_checkpoint_is_removed_and_whole_ones_stay(recipe_tree, packed, tmp_path):
    recipe = with_changes(recipe_tree, training={**recipe_tree["training"], "mode": "ce", "save_steps": 2})
    train_recipe(recipe, tmp_path / "s")
    folder = tmp_path / "s"
    (folder / "manifest.json").unlink()
    (folder / "step_9").mkdir()
    (folder / ".step_7.tmp").mkdir()
    (folder / "step_notes.txt").write_text("mine")
    train_recipe(recipe, folder)
    assert sorted(path.name for path in folder.glob("*step_*")) == ["step_2", "step_4", "step_notes.txt"]


def test_a_run_that_is_not_to_resume_forgets_its_checkpoints(recipe_tree, packed, tmp_path, caplog):
    settings = {**recipe_tree["training"], "mode": "ce", "save_steps": 2}
    folder = tmp_path / "s"
    train_recipe(with_changes(recipe_tree, training=settings), folder)
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "final")
    with stopped_after(1):
        train_recipe(with_changes(recipe_tree, training={**settings, "resume": False}), folder)
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_2"]


def test_a_log_line_is_brute_force_over_its_step(packed, tmp_path):
    """Before its first update the student is the one that was given."""
    student, teacher = student_and_teacher()
    rows = packed.rows(range(8))
    trainer = DistillationTrainer(
        student, arguments(tmp_path, max_steps=1, temperature=1.0, divergence="forward_kl"),
        teacher=LocalTeacher(teacher, top_k=3), train_dataset=torch.utils.data.Subset(packed, range(8)),
    )  # fmt: skip
    labels = rows.labels[rows.labels >= 0]
    p, q = distributions(rows, teacher, student)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    top = p.topk(3, dim=-1)
    mass, student_mass = top.values.sum(-1), q.gather(1, top.indices).sum(-1)
    ce = -q.gather(1, labels[:, None]).log().mean()
    kl = (top.values * (top.values / q.gather(1, top.indices)).log()).sum(-1)
    kl = (kl + (1 - mass) * ((1 - mass) / (1 - student_mass)).log()).mean()
    for name, expected in (
        ("ce_loss", ce), ("kl_loss", kl), ("teacher_mass", mass.mean()), ("student_mass", student_mass.mean()),
        ("top1_agreement", (p.argmax(-1) == q.argmax(-1)).double().mean()), ("loss", 0.5 * ce + 0.5 * kl),
    ):  # fmt: skip
        assert entry[name] == pytest.approx(float(expected), rel=2e-4), name


def test_weights_that_are_no_safetensors_are_not_unpickled(recipe_tree, packed, tmp_path):
    settings = {**recipe_tree["training"], "mode": "ce", "save_steps": 2, "max_steps": 4}
    folder = tmp_path / "s"
    with stopped_after(1):
        train_recipe(with_changes(recipe_tree, training=settings), folder)
    weights = folder / "step_2" / "model.safetensors"
    torch.save(dict(load_file(weights)), folder / "step_2" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises((LimbeckError, OSError), match="safetensors"):
        train_recipe(with_changes(recipe_tree, training=settings), folder)
    trainer = DistillationTrainer(tiny_model(), arguments(tmp_path / "other", max_steps=4), train_dataset=packed)
    with pytest.raises(OSError, match="safetensors"):
        trainer.train(resume_from_checkpoint=str(folder / "step_2"))
