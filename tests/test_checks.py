"""What a late stage would refuse is refused before the first one: nothing is written, `--dry-run` says the same."""

import contextlib
import io
import json

import pytest
import torch

from conftest import TINY, limbeck, save_model, tiny_model, with_keys
from limbeck.cli import main
from limbeck.data.tokenizer import load_tokenizer, train_tokenizer
from limbeck.errors import LimbeckError
from limbeck.models import load_causal_lm
from limbeck.pipeline import plan, run_pipeline
from limbeck.students.build import build_student
from limbeck.students.outline import outline_of

WIDE = {**TINY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def refused(recipe, told, last=None):
    """The plan refuses it so (and a run by the same check), and no folder is there afterwards."""
    for attempt in (plan,) if last is None else (plan, run_pipeline):
        with pytest.raises(LimbeckError) as found:
            attempt(recipe, last)
        assert told in str(found.value), str(found.value)
    assert not recipe.root.exists()


@pytest.mark.parametrize(("keys", "told"), [
    ({"student": {"config": {**TINY, "max_position_embeddings": 16}}},
     "the student has a context of 16 tokens. Set --seq-len 16, or raise student.config.max_position_embeddings."),
    ({"student": {"config": {**TINY, "vocab_size": 100}}}, "vocab_size is 100 and the tokenizer has 4096 ids"),
    ({"student": {"config": {**TINY, "hidden_sise": 64}}}, "student.config has no key 'hidden_sise'"),
    ({"student": {"ternary": {"group_size": 48}}}, "group_size is 48 and a ternary weight has rows of 32"),
    ({"student": {"ternary": {"exclude": ["nothing_like_it"]}}}, "'nothing_like_it' matches none of the weights"),
    ({"parameter_lr_multipliers": [{"pattern": "nope", "lr_multiplier": 0.5}]}, "'nope' matches no parameter"),
    ({"training": {"warmup_steps": 9}}, "training.warmup_steps is 9 and the run has 4 steps"),
    ({"student": {"ternary": {"group_size": 16, "warmup_steps": 9}}}, "student.ternary.warmup_steps is 9 and the run"),
    ({"tokenizer": {"train_vocab_size": 300}}, "has a tokenizer already, whose ids its targets are"),
    ({"pipeline": {"export": ["packed"]}}, "pipeline.export has packed, which cannot be: the student has no ternary"),
    ({"pipeline": {"export": ["gguf"]}, "export": {"type": "tq2_0"}}, "--type is tq2_0"),
    ({"pipeline": {"export": ["hf"]}, "export": {"rest": "fp8"}}, "--rest is fp8 and --format hf writes"),
    ({"pipeline": {"export": ["gguf"]}, "student": {"ternary": {"group_size": 32}}, "export": {"group_size": 64}},
     "--group-size is 64 and the student was trained with groups of 32"),
    ({"pipeline": {"export": ["gguf"]}, "student": {"ternary": {"group_size": 16}}},
     "pipeline.export has gguf, which cannot be: no type holds every ternary weight exactly"),
    ({"pipeline": {"export": ["gguf"]}, "student": {"config": {**TINY, "model_type": "olmo"}}},
     "model_type olmo can not be exported to GGUF"),
    ({"pipeline": {"export": ["gguf"]}, "student": {"config": {**TINY, "attention_bias": True}}},
     "attention_bias is True"),
])  # fmt: skip
def test_refused_before_the_first_stage(recipe, keys, told):
    refused(with_keys(recipe, **keys), told)


def test_a_run_refuses_what_its_plan_does(recipe):
    refused(with_keys(recipe, student={"ternary": {"group_size": 48}}), "group_size is 48", "train")


def test_a_student_that_mixes_documents_is_refused_at_the_start(recipe):
    config = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}
    own = recipe.model_copy(update={"student": recipe.student.model_copy(update={"config": config})})
    refused(own, "does not keep the documents of a packed row apart. Set dataset.attention: packed")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_at_the_start(recipe, tmp_path):
    folder = tmp_path / "t"
    load_tokenizer(str(recipe.teacher.model)).hf.save_pretrained(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "NFKC"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    own = with_keys(
        recipe, tokenizer={"name": str(folder)}, training={"mode": "ce"}, pipeline={"export": ["gguf"]},
        student={"config": WIDE},
    )  # fmt: skip
    refused(own, "the tokenizer normalises text by NFKC")


def test_weights_of_another_vocabulary_are_refused(recipe, tmp_path):
    folder = tmp_path / "other"
    train_tokenizer(recipe.dataset, 4096, folder)
    size = load_tokenizer(str(folder)).vocab_size
    tiny_model(vocab_size=max(size, 4096)).save_pretrained(folder)
    own = with_keys(recipe, student={"model": str(folder), "config": {}})
    refused(own, "was trained with ids of its own tokenizer")


def test_weights_bring_their_own_architecture(recipe, tmp_path):
    folder = save_model(tiny_model(), tmp_path / "m")
    refused(
        with_keys(recipe, student={"model": str(folder), "config": {"model_type": "gpt2"}}),
        "student.config.model_type is gpt2 and",
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    refused(with_keys(recipe, student={"model": str(folder), "config": {}}), "cannot be read: ")
    (folder / "config.json").unlink()
    refused(
        with_keys(recipe, student={"model": str(folder), "config": {}}), "has no config.json. Name a model's folder"
    )


def test_a_teacher_of_another_tokenizer_is_refused_by_names(recipe, tmp_path):
    folder = tmp_path / "teacher"
    train_tokenizer(recipe.dataset, 300, folder)
    tiny_model(vocab_size=load_tokenizer(str(folder)).vocab_size).save_pretrained(folder)
    own = with_keys(recipe, teacher={"model": str(folder)}, tokenizer={"name": recipe.teacher.model})
    refused(own, f"teacher {folder} has the tokenizer {folder} and the data has {recipe.teacher.model}")


def test_the_outline_is_the_student_without_weights(recipe):
    section = with_keys(recipe, student={"ternary": {"group_size": 32}}).student
    keys = load_tokenizer(str(recipe.teacher.model)).model_keys
    outline, student = outline_of(section, keys, 32), build_student(section, keys, 0)
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    assert {name: tensor.shape for name, tensor in outline.state_dict().items()} == shapes
    assert all(parameter.device == torch.device("meta") for parameter in outline.parameters())
    assert outline.config.quantization_config["weights"] == student.config.quantization_config["weights"]


def test_a_dry_run_says_what_each_stage_needs_and_writes_nothing(recipe_tree, tmp_path):
    tree = {**recipe_tree, "student": {"config": WIDE, "ternary": {"group_size": 256}},
            "pipeline": {"export": ["gguf", "packed"]}}  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(tree))
    done = limbeck("run", path, "--dry-run")
    student = load_causal_lm(str(recipe_tree["teacher"]["model"]))
    assert "to rows of 32 tokens of" in done.stdout
    assert "16 ids a position, temperatures [1.0, 2.0]" in done.stdout
    assert "LlamaForCausalLM, " in done.stdout
    assert "4 steps" in done.stdout
    assert "gguf (llama, tq2_0), packed" in done.stdout
    assert not (tmp_path / "run").exists()
    assert student is not None


def test_a_dry_run_tells_that_an_endpoint_is_gone(recipe_file):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = main(["run", str(recipe_file), "--dry-run", "--teacher-endpoint", "http://127.0.0.1:1",
                     "--teacher.retries", "0"])  # fmt: skip
    assert code == 1
    assert "Failed to connect to teacher endpoint: http://127.0.0.1:1" in stderr.getvalue()


def test_a_dry_run_with_a_remote_teacher_writes_nothing_and_is_asked_again(recipe, corpus):
    from limbeck.teachers.sources import RemoteSource
    from serving import running, vllm_app

    with running(vllm_app(load_causal_lm(recipe.teacher.model, dtype="float32"))) as url:
        own = with_keys(recipe, teacher={"endpoint": url}, loss={"temperature": 1.0})
        plan(own)
        assert not own.root.exists()
        assert not RemoteSource.of(own).memory.was_asked()
