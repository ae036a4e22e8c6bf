"""Compressing checkpoints: layers as the model computes them, files that others load, kills, the run's stage."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import digest, limbeck, save_model, with_keys
from limbeck.cli import main
from limbeck.compression import run as compression
from limbeck.compression.plan import CompressionPlan, planned_config
from limbeck.compression.reader import CheckpointReader, LayerModel
from limbeck.compression.run import Compression
from limbeck.config import ModelSource, Recipe, StudentConfig
from limbeck.config.compress import CompressConfig
from limbeck.config.recipe import ExportConfig
from limbeck.errors import ConfigError, LimbeckError
from limbeck.export.run import export_student
from limbeck.folders import StageFolder
from limbeck.models import load_causal_lm
from limbeck.pipeline import plan as plan_run
from limbeck.pipeline import run_pipeline
from limbeck.registration import MOE_BASES
from limbeck.students.build import build_student
from limbeck.students.compressed.experts import PROJECTIONS
from limbeck.students.ternary import ternary_weights

SIZES = {
    "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 4096,
    "num_hidden_layers": 3, "tie_word_embeddings": True, "max_position_embeddings": 128,
}  # fmt: skip
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MODELS = {
    "qwen3_moe": {**ROUTED, "mlp_only_layers": [1], "intermediate_size": 48, "norm_topk_prob": True},
    "qwen3_next": {**ROUTED, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 1,
                   "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                   "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 16, "head_dim": None, "intermediate_size": 48},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": None},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    "llama": {"intermediate_size": 48, "tie_word_embeddings": False},
    "qwen2": {"intermediate_size": 48, "head_dim": None},
    "smollm3": {"intermediate_size": 48, "no_rope_layers": [1, 0, 1], "head_dim": None, "pad_token_id": 0},
}  # fmt: skip
IDS = (torch.arange(48).reshape(2, 24) * 7 + 3) % 4096


def model_of(kind, **changes):
    torch.manual_seed(0)
    given = {"model_type": kind, **SIZES, **MODELS[kind], **changes}
    config = AutoConfig.for_model(**{key: value for key, value in given.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # layers of a new model hardly do anything
    return model


def compress(source, out, rows=None, attention="per_document", **section):
    plan = CompressionPlan.of(CompressConfig(**section), ModelSource(str(source)))
    folder = StageFolder(out, "compress", {"section": section, "rows": 0 if rows is None else len(rows)})
    return Compression(plan, rows, attention, folder, "cpu").run()


def attention_of(kind):
    return "packed" if kind == "qwen3_next" else "per_document"


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# -- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_alone_computes_what_it_does_in_the_model(kind, packed, tmp_path):
    """Documents kept apart or not, experts fused in memory and apart on disk, dense layers between."""
    model = model_of(kind)
    save_model(model, tmp_path)
    rows = packed.rows([0, 1])
    inputs = rows.model_inputs(attention_of(kind))
    with torch.no_grad():
        wanted = model.model(**inputs, output_hidden_states=True).hidden_states
    inputs.pop("input_ids")
    reader = CheckpointReader(tmp_path)
    for number in range(3):
        layer = LayerModel(reader, model.config, number, torch.float32)
        found = layer(wanted[number], **inputs)
        if number < 2:  # the last one is told after the model's norm
            torch.testing.assert_close(found, wanted[number + 1], rtol=1e-5, atol=1e-5)


def test_fused_tensors_on_disk_are_read_too(tmp_path):
    model = model_of("qwen3_moe")
    config = AutoConfig.for_model("compressed_qwen3_moe", **{**SIZES, **MODELS["qwen3_moe"]})
    own = AutoModelForCausalLM.from_config(config)  # an architecture of ours writes its names as they are in memory
    own.load_state_dict(model.state_dict())
    own.save_pretrained(tmp_path)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    layer = LayerModel(CheckpointReader(tmp_path), model.config, 2, torch.float32)
    assert torch.equal(layer.layer.mlp.experts.down_proj, model.model.layers[2].mlp.experts.down_proj)


# -- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MOE_BASES)
@pytest.mark.parametrize(
    "section",
    [
        {"method": "latent", "rank": 32},
        {"method": "shared_core", "rank": 16},
        {"method": "core_delta", "rank": 16},
        {"method": "prune", "keep": 1.0},
    ],
    ids=lambda section: section["method"],
)
def test_at_full_size_the_compressed_model_is_the_model(kind, section, packed, tmp_path):
    model = model_of(kind)
    manifest = compress(
        save_model(model, tmp_path / "teacher"), tmp_path / "small", packed, attention_of(kind), **section
    )
    small = load_causal_lm(str(tmp_path / "small"), dtype="float32").eval()
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=2e-3 * float(logits(model).abs().max()))
    assert max(layer.error for layer in manifest.layers) < 1e-3
    with torch.no_grad():
        out = small.generate(IDS[:, :6], max_new_tokens=4, do_sample=False, pad_token_id=0)
        whole = model.generate(IDS[:, :6], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_pruned_experts_are_plain_transformers(kind, packed, tmp_path):
    """Loaded without limbeck; each layer's experts and router rows are those of the teacher that contribute most."""
    model = model_of(kind)
    compress(save_model(model, tmp_path / "teacher"), tmp_path / "small", packed, method="prune", keep=0.5)
    if kind == "mixtral":  # one is enough of what takes a process of its own
        assert load_causal_lm(str(tmp_path / "small")).config.num_local_experts == 4
        return
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model, report = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'small')!r}, output_loading_info=True)\n"
        "assert not report['missing_keys'] and not report['unexpected_keys'], report\n"
        "assert 'limbeck' not in sys.modules\nprint(model.config.num_experts, model.config.model_type)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["4", kind]
    small = load_causal_lm(str(tmp_path / "small"), dtype="float32")
    whole, kept = model.model.layers[2].mlp, small.model.layers[2].mlp
    places = [
        next(e for e in range(8) if torch.equal(whole.gate.weight[e], row)) for row in kept.gate.weight
    ]  # fmt: skip
    assert places == sorted(places)
    for mine, theirs in enumerate(places):
        assert torch.equal(kept.experts.gate_up_proj[mine], whole.experts.gate_up_proj[theirs])
        assert torch.equal(kept.experts.down_proj[mine], whole.experts.down_proj[theirs])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "smollm3"])
def test_dense_models_lose_layers_and_channels(kind, packed, tmp_path):
    model = model_of(kind)
    manifest = compress(save_model(model, tmp_path / "teacher"), tmp_path / "small", packed, keep_layers=2, keep_ffn=32)
    small = load_causal_lm(str(tmp_path / "small"), dtype="float32").eval()
    assert (small.config.num_hidden_layers, small.config.intermediate_size) == (2, 32)
    kept = [layer.layer for layer in manifest.layers]
    rows = packed.rows(range(len(packed)))
    with torch.no_grad():
        states = model.model(**rows.model_inputs("per_document"), output_hidden_states=True).hidden_states
        last = model.model.layers[-1]  # its output is told after the norm, so it is listened to
        heard = []
        hook = last.register_forward_hook(
            lambda module, given, out: heard.append(out[0] if isinstance(out, tuple) else out)
        )
        model.model(**rows.model_inputs("per_document"))
        hook.remove()
    states = [*states[:-1], heard[0]]
    valid = rows.doc_ids >= 0
    change = [
        float((1 - torch.nn.functional.cosine_similarity(a, b, dim=-1))[valid].mean())
        for a, b in itertools.pairwise(states)
    ]  # fmt: skip
    assert kept == sorted(sorted(range(3), key=lambda number: -change[number])[:2])
    for place, number in enumerate(kept):
        assert torch.equal(
            small.model.layers[place].self_attn.q_proj.weight, model.model.layers[number].self_attn.q_proj.weight
        )
        if kind == "smollm3":
            one, other = small.model.layers[place].self_attn, model.model.layers[number].self_attn
            assert one.use_rope == other.use_rope
    # Channels that all stay change nothing.
    compress(tmp_path / "teacher", tmp_path / "same", packed, keep_ffn=48)
    same = load_causal_lm(str(tmp_path / "same"), dtype="float32").eval()
    torch.testing.assert_close(logits(same), logits(model), rtol=1e-3, atol=1e-3)


def test_without_a_text_layers_are_evenly_spaced_and_weights_decide(tmp_path):
    save_model(model_of("llama"), tmp_path / "teacher")
    manifest = compress(tmp_path / "teacher", tmp_path / "small", keep_layers=2, keep_ffn=16)
    assert [layer.layer for layer in manifest.layers] == [0, 2]
    save_model(model_of("qwen3_moe"), tmp_path / "moe")
    assert compress(tmp_path / "moe", tmp_path / "latent", method="latent", rank=32).layers[0].error < 1e-3


def test_auto_takes_what_errs_least_layer_by_layer(packed, tmp_path):
    wider = {"num_experts": 16, "moe_intermediate_size": 32, "hidden_size": 64}
    source = save_model(model_of("qwen3_moe", **wider), tmp_path / "teacher")
    errors = {}
    for method in ("latent", "core_delta", "prune"):
        manifest = compress(source, tmp_path / method, packed, method=method, keep=0.6)
        errors[method] = [layer.error for layer in manifest.layers]
    found = compress(source, tmp_path / "auto", packed, method="auto", keep=0.6)
    for number in (0, 2):
        best = min(errors.values(), key=lambda values, number=number: values[number])
        assert found.layers[number].error <= best[number] + 1e-6
    small = load_causal_lm(str(tmp_path / "auto"), dtype="float32").eval()
    assert torch.isfinite(logits(small)).all()
    assert found.layers[1].description == {"method": "none"}


@pytest.mark.parametrize("section", [{"method": "latent", "keep": 0.5}, {"method": "prune"}, {"keep_layers": 2}])
def test_what_is_planned_is_what_is_made(section, packed, tmp_path):
    source = save_model(model_of("qwen3_moe", mlp_only_layers=[]), tmp_path / "teacher")
    planned = planned_config(CompressionPlan.of(CompressConfig(**section), ModelSource(str(source))))
    compress(source, tmp_path / "small", packed, **section)
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in AutoModelForCausalLM.from_config(planned).named_parameters()}
    found = {name: p.shape for name, p in load_causal_lm(str(tmp_path / "small")).named_parameters()}
    assert found == wanted


# -- students -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "experts"),
    [
        ({"method": "latent", "rank": 16}, {"gate_up_proj", "down_proj"}),
        ({"method": "core_delta", "rank": 8}, {f"shared_core.{name}.weight" for name in PROJECTIONS}),
    ],
    ids=["latent", "core_delta"],
)  # fmt: skip
def test_compressed_students_are_ternary_trained_and_exported(section, experts, packed, tmp_path):
    """Preset experts takes what stands for whole experts; every parameter learns; the packed folder is the student."""
    compress(save_model(model_of("qwen3_moe"), tmp_path / "teacher"), tmp_path / "small", packed, **section)
    given = {"model": str(tmp_path / "small"), "ternary": {"preset": "experts", "group_size": 16}}
    student = build_student(StudentConfig.model_validate(given), {"vocab_size": 4096}, seed=0)
    chosen = {name.split("mlp.experts.")[1] for name, _ in ternary_weights(student)}
    assert chosen == experts
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student.train()
    student(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in student.parameters())
    optimizer.step()
    student.eval().save_pretrained(tmp_path / "trained")
    again = load_causal_lm(str(tmp_path / "trained"), dtype="float32").eval()
    assert torch.equal(logits(again), logits(student))
    export = ExportConfig(format="packed", output=tmp_path / "packed", rest="f32")
    export_student(export, tmp_path / "trained", "small", verify=True)
    packed_model = load_causal_lm(str(tmp_path / "packed"), dtype="float32").eval()
    torch.testing.assert_close(logits(packed_model), logits(student), rtol=1e-4, atol=1e-4)


# -- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [{"method": "latent", "keep": 0.5}, {"keep_layers": 2}])
def test_stopped_at_any_write_it_ends_with_the_same_bytes(section, packed, tmp_path, monkeypatch):
    """The work is cut short before each of its writes in turn, as by a kill, and goes on."""
    source = save_model(model_of("qwen3_moe"), tmp_path / "teacher")
    compress(source, tmp_path / "whole", packed, **section)
    wanted = digest(tmp_path / "whole", "*.safetensors", "config.json", "*.index.json", "manifest.json")
    writes = {name: getattr(compression, name) for name in ("commit_file", "write_json")}
    allowed, left = 0, [0]

    def limited(name):
        def write(*args):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return writes[name](*args)

        return write

    for name in writes:
        monkeypatch.setattr(compression, name, limited(name))
    while True:
        left[0] = 1 + allowed % 3
        allowed += 1
        try:
            compress(source, tmp_path / "cut", packed, **section)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "cut" / "manifest.json").exists()
    assert allowed > 4
    found = digest(tmp_path / "cut", "*.safetensors", "config.json", "*.index.json", "manifest.json")
    assert found == wanted
    assert not (tmp_path / "cut" / "work").exists()


@pytest.mark.parametrize("moment", ["sha256_file", "copy2", "rmtree"])
def test_stopped_while_it_finishes_no_layer_is_made_again(moment, packed, tmp_path, monkeypatch, capsys):
    """While checksums are taken, in the middle of a tokenizer's file, while the work is removed."""
    source = save_model(model_of("qwen3_moe"), tmp_path / "teacher")
    section = {"method": "latent", "keep": 0.5}
    compress(source, tmp_path / "whole", packed, **section)
    with monkeypatch.context() as patch:

        def stops(one, other=None, **kwargs):
            if moment == "copy2":
                Path(other).write_bytes(Path(one).read_bytes()[:10])
            raise KeyboardInterrupt

        owner = compression if moment == "sha256_file" else __import__("shutil")
        patch.setattr(owner, moment, stops)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "cut", packed, **section)
    monkeypatch.setattr(Compression, "_compress", None)  # nothing is left to compress
    compress(source, tmp_path / "cut", packed, **section)
    names = ("*.safetensors", "*.json")
    assert digest(tmp_path / "cut", *names) == digest(tmp_path / "whole", *names)


def test_killed_for_real_the_command_goes_on(corpus, tmp_path):
    source = save_model(model_of("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[]), tmp_path / "teacher")
    command = ["compress", source, "--method", "latent", "--calibration", corpus, "--seq-len", "32"]
    limbeck(*command, "--output", tmp_path / "whole", "--output_dir", tmp_path / "run")
    words = [sys.executable, "-m", "limbeck", *map(str, command), "--output", str(tmp_path / "cut"),
             "--output_dir", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cut" / "work").glob("layer-*.json"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "layer 0: latent" not in done.stderr
    wanted, found = (digest(tmp_path / name, "*.safetensors", "config.json") for name in ("whole", "cut"))
    assert len(found) == 6 + 2 + 1
    assert found == wanted


@pytest.mark.slow
def test_a_model_larger_than_the_memory_it_may_take(tmp_path):
    """1.6 GB of weights through a process that may hold half of it beside what its imports take."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from compress import LARGE, synthetic

    source = synthetic(tmp_path / "large", 16, {**LARGE, "num_experts": 32})
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    script = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import compress
from transformers import AutoModelForCausalLM
import accelerate, safetensors.torch
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
held = int(fields["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[4]),) * 2)
compress.compressed(sys.argv[2], {"method": "latent", "keep": 0.5}, compress.RandomRows(), Path(sys.argv[3]))
"""
    benchmarks = str(Path(__file__).parents[1] / "benchmarks")
    words = [sys.executable, "-c", script, benchmarks, str(source), str(tmp_path / "small"), str(size // 2)]
    # The limit counts address space: blocks go back to the system when they are freed, and oneDNN keeps no shapes.
    frugal = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **frugal}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert size > 1.5e9
    assert (tmp_path / "small" / "manifest.json").exists()


# -- the run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def moe_recipe(recipe, tmp_path):
    teacher = save_model(model_of("qwen3_moe", mlp_only_layers=[]), tmp_path / "moe")
    return Recipe.model_validate({
        **recipe.model_dump(exclude_unset=True), "teacher": {"model": str(teacher), "top_k": 16}, "student": {},
        "compress": {"method": "core_delta", "rank": 8, "calibration_rows": 4},
    })  # fmt: skip


def test_compressing_is_a_stage_of_the_run(moe_recipe, capsys):
    """Planned before anything is there; made, trained from and scored; found done; made again when its keys change."""
    before = {stage.name: stage.state for stage in plan_run(moe_recipe)}
    assert before == dict.fromkeys(("pack", "compress", "cache", "train", "evaluate"), "to run")
    report = run_pipeline(moe_recipe)
    assert list(report.results["evaluation"]) == ["teacher", "compressed", "student_kd"]
    assert "core_delta 8" in report.texts[0]
    start = load_file(moe_recipe.root / "checkpoint-0" / "layer-00000.safetensors")
    trained = AutoModelForCausalLM.from_pretrained(moe_recipe.student_dir / "final")
    assert type(trained).__name__ == "CompressedQwen3MoeForCausalLM"
    for name, parameter in trained.named_parameters():
        if name in start:
            assert not torch.equal(parameter, start[name]), name
            torch.testing.assert_close(parameter, start[name], rtol=0, atol=0.1)
    again = run_pipeline(moe_recipe)
    assert {stage.state for stage in again.stages} == {"skipped"}
    other = with_keys(moe_recipe, compress={"rank": 16})
    states = {stage.name: stage.state for stage in run_pipeline(other, "train").stages}
    assert states == {"pack": "skipped", "compress": "done", "cache": "skipped", "train": "done"}
    back = run_pipeline(moe_recipe, "train")
    assert {stage.state for stage in back.stages} == {"skipped"}


def test_stages_train_what_their_patterns_name(moe_recipe):
    def rules(*pairs):
        return [{"pattern": pattern, "lr_multiplier": factor} for pattern, factor in pairs]

    recipe = Recipe.model_validate({
        **moe_recipe.model_dump(exclude_unset=True),
        "training": {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": [], "logging_steps": 1},
        "stages": {"enabled": True, "configs": [
            {"stage_name": "router", "max_steps": 2,
             "parameter_lr_multipliers": rules((r".*mlp\.gate\..*", 1.0), (".*", 0.0))},
            {"stage_name": "all", "max_steps": 2, "parameter_lr_multipliers": rules(
                (".*shared_core.*", 0.5), (".*wrapper.*", 1.0), (".*embed_tokens.*|.*lm_head.*", 0.0),
                (".*norm.*", 0.1))},
        ]},
    })  # fmt: skip
    run_pipeline(recipe, "train")
    start = {}
    for path in (recipe.root / "checkpoint-0").glob("*.safetensors"):
        start |= load_file(path)
    after = {
        name: load_file(recipe.student_dir / name / "final" / "model.safetensors") for name in ("router", "all")
    }  # fmt: skip
    for name in after["router"]:
        moved = not torch.equal(after["router"][name], start[name])
        assert moved == ("mlp.gate." in name), name
        assert torch.equal(after["all"][name], after["router"][name]) == ("embed_tokens" in name), name


def test_tiny_lays_the_recipes_own_keys_over_it(moe_recipe, tmp_path):
    tree = {
        **json.loads(moe_recipe.model_dump_json(exclude_unset=True)),
        "tiny": {"name": "little", "training": {"max_steps": 2}},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(tree))
    shown = json.loads(limbeck("config", "show", tmp_path / "r.yaml", "--json").stdout)
    assert shown["name"] == "small"
    done = limbeck("train", tmp_path / "r.yaml", "--tiny", "--dry-run")
    assert "2 steps" in done.stdout
    tree.pop("tiny")
    (tmp_path / "r.yaml").write_text(json.dumps(tree))
    refused = limbeck("train", tmp_path / "r.yaml", "--tiny", "--dry-run", check=False)
    assert refused.returncode == 2
    assert "has no section `tiny`" in refused.stderr


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"compress": {"method": None}}, "says nothing to do"),
        ({"compress": {"keep": 0.5}}, "compress.keep is 0.5 and compress.rank is 8"),
        ({"student": {"model": "elsewhere"}}, "student.model is elsewhere and compress makes"),
        ({"student": {"preset": "nano-small"}}, "leave student.preset"),
    ],
)
def test_keys_that_exclude_each_other(moe_recipe, keys, said):
    with pytest.raises(ValueError, match=said):
        with_keys(moe_recipe, **keys)


@pytest.mark.parametrize(
    ("kind", "section", "said"),
    [
        ("llama", {"method": "latent"}, "compress.method is latent and .* is a llama; .*Dense models take"),
        ("qwen3_moe", {"keep_ffn": 8}, "compress.keep_ffn is 8 and .* is a qwen3_moe"),
        ("llama", {"keep_layers": 9}, "compress.keep_layers is 9 and .* has 3"),
        ("llama", {"keep_ffn": 99}, "compress.keep_ffn is 99 and .* has 48"),
        ("qwen3_moe", {"method": "latent", "rank": 33}, "compress.rank is 33 .* 16 × 32; latent takes multiples"),
        ("qwen3_moe", {"method": "latent", "rank": 10}, "takes multiples of 8 up to 32"),
        ("qwen3_moe", {"method": "shared_core", "keep": 0.2}, "keep 0.2 leaves shared_core no rank"),
        ("qwen3_moe", {"method": "prune", "keep": 0.1}, "leaves 1 of 8 experts and a token takes 2"),
    ],
)  # fmt: skip
def test_what_a_model_has_not_is_refused_at_once(kind, section, said, tmp_path):
    source = save_model(model_of(kind), tmp_path / "teacher")
    with pytest.raises(ConfigError, match=said):
        CompressionPlan.of(CompressConfig(**section), ModelSource(str(source)))


def test_checkpoints_that_are_not_what_their_config_says(tmp_path):
    source = save_model(model_of("qwen3_moe"), tmp_path / "teacher")
    config = json.loads((source / "config.json").read_text())
    for change, said in ({"num_local_experts": 9}, "48 matrices for|16 matrices for"), ({"head_dim": 8}, "has shape"):
        (source / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(LimbeckError, match=said):
            compress(source, tmp_path / said[:3], method="latent", rank=8)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.2.mlp.gate.weight"]
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(LimbeckError, match=r"has no tensor mlp.gate.weight of layer 2"):
        compress(source, tmp_path / "gone", method="latent", rank=8)


def test_layouts_that_transformers_loads_are_read(packed, tmp_path):
    """A second copy of the weights, constants of older versions, the body's names alone; and a broken index."""
    from safetensors.torch import save_file

    model = model_of("llama", tie_word_embeddings=True)
    source = save_model(model, tmp_path / "teacher")
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, source / "consolidated.safetensors")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    body = {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file(body, source / "model.safetensors", metadata={"format": "pt"})
    compress(source, tmp_path / "small", packed, keep_ffn=48)
    same = load_causal_lm(str(tmp_path / "small"), dtype="float32").eval()
    torch.testing.assert_close(logits(same), logits(model), rtol=1e-3, atol=1e-3)
    outside = '{"weight_map": {"embed_tokens.weight": "../x.safetensors"}}'
    broken = {"{": "JSON", '{"metadata": {}}': "no weight_map", outside: "outside that folder"}
    for text, said in broken.items():
        (source / "model.safetensors.index.json").write_text(text)
        with pytest.raises(LimbeckError, match=said):
            CheckpointReader(source).tensor("embed_tokens.weight")


def test_each_tensor_keeps_the_precision_of_its_file(packed, tmp_path):
    """bfloat16 beside float32 state weights of the delta nets, as checkpoints of Qwen3-Next have them."""
    from safetensors.torch import save_file

    source = save_model(model_of("qwen3_next").bfloat16(), tmp_path / "teacher")
    tensors = load_file(source / "model.safetensors")
    tensors = {name: t.float() if name.endswith(("A_log", "dt_bias")) else t for name, t in tensors.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    compress(source, tmp_path / "small", packed, "packed", method="latent", keep=0.5)
    found = load_file(tmp_path / "small" / "layer-00000.safetensors")
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in found.items()}
    assert kinds["gate_up_proj"] == torch.bfloat16
    assert kinds["A_log"] == torch.float32


def test_what_rows_cannot_measure_is_refused_before_any_work(moe_recipe, tmp_path):
    def refused(said, kind="qwen3_moe", dataset=None, **changes):
        source = save_model(model_of(kind, **changes), tmp_path / said[:8].strip())
        with pytest.raises(ConfigError, match=said):
            plan_run(with_keys(moe_recipe, compress={"model": str(source)}, dataset=dataset or {}), "compress")

    refused("knows 100", vocab_size=100)
    refused("has a context of 16", max_position_embeddings=16)
    refused("linear attention, which carries", "qwen3_next")


def test_the_same_work_written_otherwise_is_found_done(moe_recipe):
    recipe = with_keys(moe_recipe, compress={"method": "prune", "rank": None, "calibration_rows": 100000})
    run_pipeline(recipe, "compress")
    same = with_keys(recipe, compress={"keep": 0.5, "calibration_rows": 90000})
    assert {stage.state for stage in run_pipeline(same, "compress").stages} == {"skipped"}


def test_the_command_without_a_method_or_a_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(save_model(model_of("qwen3_moe"), tmp_path / "teacher"))
    assert main(["compress", source]) == 2
    assert "needs to know how" in capsys.readouterr().err
    assert main(["compress", source, "--method", "latent", "--output", "small"]) == 0
    shown = capsys.readouterr()
    assert "no --calibration" in shown.err
    assert "latent 8" in shown.out
    assert main(["compress", source, "--method", "prune", "--output", "p"]) == 2
    assert "no calibration text" in capsys.readouterr().err
