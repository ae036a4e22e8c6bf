"""A ternary student's folders: they fail loudly without limbeck, work with it, and have a plain form for everybody."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import save_model, tiny_model, with_keys
from limbeck.cli import main
from limbeck.config import TernaryConfig
from limbeck.export.packed import export_packed
from limbeck.export.plain import difference, export_plain
from limbeck.export.source import ExportSource
from limbeck.models import load_causal_lm
from limbeck.students.build import make_ternary
from limbeck.students.ternary import quantise, ternary_weights
from limbeck.students.weights_file import rename_weights
from limbeck.training.phases import train_recipe

IDS = torch.arange(24).reshape(2, 12)
MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
       "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 1}  # fmt: skip


def ternary_student(folder, **changes):
    model = tiny_model(**changes)
    make_ternary(model, TernaryConfig(group_size=32))
    save_model(model, folder)
    rename_weights(folder)
    return model


def typed(*words) -> tuple[int, str, str]:
    """The command line without a new interpreter: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def opened_without_limbeck(folder):
    """What a process that has never heard of limbeck gets."""
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\nassert 'limbeck' not in sys.modules\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", ["shadow", "packed"])
def test_without_limbeck_a_ternary_folder_is_refused(tmp_path, kind):
    ternary_student(tmp_path / "final")
    if kind == "packed":
        export_packed(ExportSource.open(tmp_path / "final"), tmp_path / "packed")
    done = opened_without_limbeck(tmp_path / ("final" if kind == "shadow" else "packed"))
    assert done.returncode != 0
    assert "no file named model.safetensors" in done.stderr


def test_with_limbeck_it_loads_by_plain_from_pretrained_and_can_be_saved_again(tmp_path):
    model = ternary_student(tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="float32").eval()
    wanted = model(input_ids=IDS).logits
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    again.save_pretrained(tmp_path / "mine")  # a script of the user's own
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype="float32").eval()
    assert torch.equal(mine(input_ids=IDS).logits, wanted)


def test_shards_are_renamed_together(tmp_path):
    model = tiny_model()
    make_ternary(model, TernaryConfig(group_size=32))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    rename_weights(tmp_path)
    assert not list(tmp_path.glob("model*"))
    again = load_causal_lm(str(tmp_path), dtype="float32").eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_every_folder_of_a_training_is_named_so(recipe, packed):
    """Checkpoints, best/ and final/: none is taken for a dense model."""
    ternary = with_keys(
        recipe, teacher={"use_cached_logits": False}, student={"ternary": {"group_size": 32}},
        training={"save_steps": 2, "eval_steps": 2},
    )  # fmt: skip
    train_recipe(ternary, recipe.student_dir)
    for name in ("step_2", "best", "final"):
        assert (recipe.student_dir / name / "ternary.safetensors").is_file(), name
        assert not (recipe.student_dir / name / "model.safetensors").exists(), name


@pytest.mark.parametrize("shape", [{}, MOE], ids=["llama", "qwen3_moe"])
def test_the_plain_form_holds_s_times_code_and_loads_without_limbeck(tmp_path, shape):
    student = ternary_student(tmp_path / "final", **shape)
    source = ExportSource.open(tmp_path / "final")
    export_plain(source, tmp_path / "hf", "bf16")
    done = opened_without_limbeck(tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    plain = load_causal_lm(str(tmp_path / "hf"), dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    held = dict(plain.named_parameters())
    for name, weight in ternary_weights(student):
        assert torch.equal(held[name], quantise(weight, 32, "absmean").dequantise()), name  # exact in bfloat16
    norm = "model.norm.weight"
    assert torch.equal(held[norm], dict(student.named_parameters())[norm].bfloat16().float())
    student.ternary_state.activation_bits = None
    precise = ExportSource.open(tmp_path / "final")
    export_plain(precise, tmp_path / "f32", "f32")
    exact = load_causal_lm(str(tmp_path / "f32"), dtype="float32").eval()
    torch.testing.assert_close(exact(input_ids=IDS).logits, student(input_ids=IDS).logits, atol=2e-5, rtol=1e-4)


def test_the_difference_is_the_definition(tmp_path):
    student = ternary_student(tmp_path / "final")
    source = ExportSource.open(tmp_path / "final")
    export_plain(source, tmp_path / "hf", "f16")
    found = difference(source, tmp_path / "hf", IDS)
    plain = load_causal_lm(str(tmp_path / "hf"), dtype="auto")
    with torch.no_grad():
        p, q = (m(input_ids=IDS).logits.float().log_softmax(-1) for m in (student, plain))
    assert found["tokens"] == IDS.numel()
    assert found["kl_mean"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-9)
    assert found["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).float().mean())


def test_the_command_says_what_to_type_next(tmp_path):
    ternary_student(tmp_path / "run" / "student" / "final", hidden_size=256, intermediate_size=256)
    run = tmp_path / "run"
    done = json.loads(typed("export", run, "--format", "hf", "--json")[1])
    assert any(line.startswith("vllm serve ") for line in done["next"])
    text = typed("export", run, "--type", "q4_0")[1]
    assert "llama-cli -m " in text
    assert "ollama create run -f " in text
    assert (run / "export" / "run.Modelfile").read_text() == "FROM ./run.gguf\n"
    found = json.loads(typed("inspect", run / "export" / "run.gguf", "--json")[1])
    assert found["metadata"]["general.name"] == "run"
    code, _, told = typed("export", run, "--format", "hf", "--rest", "fp8")
    assert (code, "--rest is fp8 and --format hf writes bf16, f16, f32" in told) == (2, True)


def test_gpt2s_transposed_layers_are_ternary_along_their_inputs(tmp_path):
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_inner": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**gpt2, vocab_size=4096, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    dense = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    names = make_ternary(model, TernaryConfig(group_size=16, activation_bits=None))
    assert len(names) == 4
    wanted = AutoModelForCausalLM.from_config(config).eval()
    state = dict(dense)
    for name in names:  # the definition, written out: mean magnitude of 16 inputs of one output
        columns = dense[name].t().reshape(dense[name].shape[1], -1, 16)
        scale = columns.abs().mean(-1, keepdim=True).bfloat16().float().clamp(2.0**-14)
        state[name] = ((columns / scale).round().clamp(-1, 1) * scale).reshape(dense[name].shape[1], -1).t()
    wanted.load_state_dict(state, strict=False)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    save_model(model, tmp_path / "final")
    rename_weights(tmp_path / "final")
    source = ExportSource.open(tmp_path / "final")
    export_packed(source, tmp_path / "packed", "f32")
    packed = load_causal_lm(str(tmp_path / "packed"), dtype="float32").eval()
    torch.testing.assert_close(packed(input_ids=IDS).logits, wanted(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    export_plain(source, tmp_path / "hf", "f32")
    plain = load_causal_lm(str(tmp_path / "hf"), dtype="float32").eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, wanted(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["hf", "packed"])
def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path, kind):
    ternary_student(tmp_path / "final")
    mine = tmp_path / "mine"
    (mine / "thesis").mkdir(parents=True)
    (mine / "thesis" / "chapter.tex").write_text("years")
    _, _, told = typed("export", tmp_path / "final", "--format", kind, "--output", mine)
    assert f"{mine} would be replaced and holds thesis. Name a new folder with --output." in told
    assert (mine / "thesis" / "chapter.tex").read_text() == "years"
    _, _, told = typed("export", tmp_path / "final", "--format", kind, "--output", tmp_path / "final")
    assert "final would be replaced and holds" in told
    for _ in range(2):  # its own it replaces
        assert typed("export", tmp_path / "final", "--format", kind, "--output", tmp_path / "out")[0] == 0
