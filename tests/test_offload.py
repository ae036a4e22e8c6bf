"""Experts in files: the training that would have been, its checkpoints, and the memory it does not take."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import TINY, save_model, stopped_after, tiny_model, with_keys
from limbeck.config import Recipe, StudentConfig
from limbeck.errors import ConfigError
from limbeck.optim.hybrid import HybridOptimizer
from limbeck.pipeline import run_pipeline
from limbeck.students.build import build_student
from limbeck.students.ternary import ternary_weights
from limbeck.students.weights_file import rename_weights
from limbeck.training.offload import ExpertOffload, expert_tensors
from limbeck.training.phases import train_recipe
from limbeck.training.run import _offload

MOE = {
    "model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "decoder_sparse_step": 1, "tie_word_embeddings": True,
}  # fmt: skip


def moe(seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**MOE, "vocab_size": 4096, **changes})).eval()


@pytest.fixture
def moe_recipe(recipe, tmp_path):
    start = save_model(moe(), tmp_path / "start")
    return Recipe.model_validate({
        **recipe.model_dump(exclude_unset=True), "student": {"model": str(start)},
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [],
                     "learning_rate": 1e-3, "save_steps": 2, "activation_checkpointing": True, "device": "cpu"},
    })  # fmt: skip


def trained(recipe, folder):
    train_recipe(with_keys(recipe, training={"output_dir": str(folder)}), folder)
    files = sorted((folder / "final").glob("*.safetensors"))
    return {name: value for path in files for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    "keys", [{"optimizer": {"name": "adamw"}},
             {"optimizer": {"name": "muon_lion"}, "training": {"gradient_accumulation_steps": 2},
              "student": {"ternary": {"preset": "experts", "group_size": 32, "warmup_steps": 2}}}],
    ids=["adamw", "muon, ternary, accumulated"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["disk", "cpu"])
def test_where_the_experts_are_changes_nothing(moe_recipe, tmp_path, keys, kind):
    """Weights after four steps, and after a stop and a resume: those of the experts in memory."""
    recipe = with_keys(moe_recipe, **keys)
    run_pipeline(recipe, "cache")
    wanted = trained(recipe, tmp_path / "whole")
    away = with_keys(recipe, training={"offload_experts": kind, "offload_dir": str(tmp_path / "files")})
    found = trained(away, tmp_path / "away")
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    folder = tmp_path / "cut"
    with stopped_after(1):
        trained(away, folder)
    assert (folder / "step_2").is_dir()
    again = trained(away, folder)
    for name, value in found.items():
        assert torch.equal(again[name], value), name
    assert not (tmp_path / "files").exists()


def test_experts_gradients_and_state_are_files(tmp_path):
    model_folder = save_model(moe(), tmp_path / "start")
    keep = tmp_path / "files" / "thesis.txt"
    keep.parent.mkdir()
    keep.write_text("somebody's")
    dead = tmp_path / "files" / "limbeck-offload-999999999"
    dead.mkdir()
    offload = ExpertOffload("disk", tmp_path / "files", "cpu")
    assert not dead.exists()
    model = offload.build(StudentConfig(model=str(model_folder)), {"vocab_size": 4096}, 0)
    reference = moe()
    ids = torch.arange(24)[None] * 7 % 4096
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    held = expert_tensors(model)
    assert len(held) == 4
    optimizer = HybridOptimizer([{"params": list(held.values()), "algorithm": "adamw", "lr": 1e-3}])
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    reference(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in held.items():
        files = {path.name.removeprefix(f"{name}.") for path in offload.folder.glob(f"{name}.*")}
        assert files == {"weight", "grad", "exp_avg", "exp_avg_sq"}
        on_disk = torch.from_file(str(offload.folder / f"{name}.grad"), size=parameter.numel(), dtype=torch.float32)
        own = dict(reference.named_parameters())[name]
        torch.testing.assert_close(on_disk.reshape(own.shape), 2 * own.grad, rtol=1e-4, atol=1e-7)
        weight = torch.from_file(str(offload.folder / f"{name}.weight"), size=own.numel(), dtype=torch.float32)
        assert torch.equal(weight.reshape(own.shape), parameter)
        assert not torch.equal(parameter, own)
    offload.close()
    assert list((tmp_path / "files").iterdir()) == [keep]


def test_stages_never_hold_the_whole_student(moe_recipe, tmp_path, monkeypatch):
    """Not when the stages are checked, not when a stage starts from the one before it."""
    run_pipeline(moe_recipe, "cache")
    tree = moe_recipe.model_dump(exclude_unset=True)
    tree["training"] = {**tree["training"], "offload_experts": "disk", "output_dir": None}
    del tree["training"]["max_steps"]
    stages = [{"stage_name": name, "max_steps": 2} for name in ("one", "two")]
    recipe = Recipe.model_validate({**tree, "stages": {"enabled": True, "configs": stages}})

    def whole(*args, **kwargs):
        raise AssertionError("all weights at once")

    monkeypatch.setattr("limbeck.students.build.load_causal_lm", whole)
    assert run_pipeline(recipe, "train").stages[-1].state == "done"


def test_a_ternary_start_stays_ternary(tmp_path):
    given = {"model": str(save_model(moe(), tmp_path / "start")), "ternary": {"preset": "experts", "group_size": 32}}
    student = build_student(StudentConfig.model_validate(given), {"vocab_size": 4096}, 0)
    student.save_pretrained(tmp_path / "ternary")
    start = StudentConfig(model=str(tmp_path / "ternary"))
    rename_weights(tmp_path / "ternary")  # as training saves it
    model = ExpertOffload("disk", tmp_path / "files", "cpu").build(start, {"vocab_size": 4096}, 0)
    ids = torch.arange(24)[None] * 7 % 4096
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, student(ids).logits, rtol=0, atol=1e-5)
    assert len(list(ternary_weights(model))) == 4


def test_what_cannot_be_kept_elsewhere_is_refused(moe_recipe, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="activation_checkpointing is false"):
        with_keys(moe_recipe, training={"offload_experts": "disk", "activation_checkpointing": False})
    offload = ExpertOffload("disk", tmp_path / "files", "cpu")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no fused routed experts"):
        offload.build(StudentConfig(config=TINY), {"vocab_size": 4096}, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    away = with_keys(moe_recipe, training={"offload_experts": "disk"})
    with pytest.raises(ConfigError, match="there are 2 ranks; it is for one process"):
        _offload(away, tmp_path)


_LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from limbeck.recipe import load_recipe
from limbeck.pipeline import run_pipeline
import limbeck.training.trainer, limbeck.teachers.local, limbeck.training.phases, limbeck.evaluation.run
import accelerate, peft, tensorboard
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
held = int(fields["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]),) * 2)
run_pipeline(load_recipe(Path(sys.argv[1])), "train")
"""


@pytest.mark.slow
def test_a_student_larger_than_the_memory_it_may_take(recipe, tmp_path):
    """600 MB of experts in float32, 2.4 GB with gradients and moments, in a process that may hold 900 MB beside its
    imports; in memory the same training ends for want of it."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 48, "num_hidden_layers": 8}
    start = tmp_path / "start"
    save_model(tiny_model(), start)  # for its tokenizer
    (start / "model.safetensors").unlink()
    moe(**sizes).bfloat16().save_pretrained(
        start, max_shard_size="50MB"
    )  # the limit counts whole files that are mapped
    tree = {
        **recipe.model_dump(mode="json", exclude_unset=True), "student": {"model": str(start)},
        "teacher": {"model": recipe.teacher.model, "top_k": 16, "splits": ["train"]},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": [],
                     "learning_rate": 1e-4, "save_steps": 2, "activation_checkpointing": True, "device": "cpu"},
    }  # fmt: skip
    run_pipeline(Recipe.model_validate(tree), "cache")
    results = {}
    for kind in (None, "disk"):
        tree["training"] |= {"offload_experts": kind, "output_dir": str(tmp_path / f"student-{kind}")}
        path = tmp_path / f"{kind}.yaml"
        path.write_text(json.dumps(tree))
        words = [sys.executable, "-c", _LIMITED, str(path), str(900 << 20)]
        results[kind] = subprocess.run(words, capture_output=True, text=True)
    assert results[None].returncode != 0
    assert "memory" in results[None].stderr.lower()
    assert results["disk"].returncode == 0, results["disk"].stderr[-3000:]
