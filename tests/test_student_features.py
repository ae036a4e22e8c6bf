"""RetNet-HRM and mHC-lite students with what any student has: teachers, losses, stages, checkpoints, exports."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import TINY, digest, limbeck, loss_request, stopped_after, tiny_model, with_keys
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher, TeacherCache
from limbeck.config import Recipe, SamplingConfig, StudentConfig
from limbeck.config.presets import PRESETS
from limbeck.config.recipe import ExportConfig
from limbeck.data.dataset import PackedDataset
from limbeck.errors import ConfigError, LimbeckError
from limbeck.export.run import export_student, next_steps
from limbeck.losses.halting import Halting
from limbeck.losses.objective import Batch, Outputs
from limbeck.models import LogitTransform, load_causal_lm
from limbeck.recipe import load_recipe
from limbeck.registry import DIVERGENCES
from limbeck.students.build import build_student
from limbeck.students.outline import outline_of
from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.build_cache import build_cache
from limbeck.teachers.remote import RemoteTeacher
from limbeck.training.head import attach_objectives
from limbeck.training.phases import train_recipe
from limbeck.training.run import train_inputs
from serving import limbeck_app, running

RETNET = {
    "model_type": "retnet_hrm", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "chunk_size": 8, "memory_heads": 2, "memory_chunk": 4,
}  # fmt: skip
STUDENTS = {
    "retnet": {"config": RETNET},
    "retnet-hrm": {"config": {**RETNET, "H_cycles": 2, "L_cycles": 2}},
    "titan-retnet-hrm": {"config": {**RETNET, "H_cycles": 1, "L_cycles": 2, "segments": 2, "halting": True,
                                    "memory": True}},
    "mhc": {"config": TINY, "mhc": {"streams": 3}},
}  # fmt: skip
#: The two that have everything; their parts are tried alone by `make test-all`.
WHOLE = ("titan-retnet-hrm", "mhc")
EACH = pytest.mark.parametrize(
    "name", [name if name in WHOLE else pytest.param(name, marks=pytest.mark.slow) for name in STUDENTS]
)
KEYS = {"vocab_size": 4096, "eos_token_id": 0}


def built(name, **changes):
    return build_student(StudentConfig.model_validate({**STUDENTS[name], **changes}), KEYS, seed=0)


def trained(packed, folder, name, teacher=None, student=None, **changes):
    arguments = DistillationArguments(**{
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "seed": 0, "data_seed": 0, **changes,
    })  # fmt: skip
    trainer = DistillationTrainer(
        student or built(name), arguments, teacher=teacher, train_dataset=packed, eval_dataset=packed
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# -- teachers and losses --------------------------------------------------------------------------------------------


@EACH
def test_cached_and_remote_teachers_train_what_the_local_one_does(recipe, packed, tmp_path, name, teacher_folder):
    local = LocalTeacher(load_causal_lm(str(teacher_folder), dtype="float32"), top_k=16, temperatures=(1.0, 2.0))
    build_cache(with_keys(recipe, teacher={"splits": ["train"]}), tmp_path / "cache")
    found = {"local": losses(trained(packed, tmp_path / "a", name, local)),
             "cached": losses(trained(packed, tmp_path / "b", name, TeacherCache(tmp_path / "cache")))}  # fmt: skip
    with running(limbeck_app(teacher_folder)) as url:
        remote = RemoteTeacher.connect([url], top_k=16, temperatures=(1.0, 2.0))
        found["remote"] = losses(trained(packed, tmp_path / "c", name, remote))
        remote.close()
    for kind, curve in found.items():
        assert curve == pytest.approx(found["local"], rel=1e-3), kind


@EACH
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_every_divergence_gives_every_parameter_a_gradient(packed, tmp_path, name, divergence):
    teacher = LocalTeacher(tiny_model(seed=9), top_k=8, temperatures=(1.0, 2.0))
    student = built(name)
    before = {key: p.detach().clone() for key, p in student.named_parameters()}
    loss = {"alpha": 0.7, "temperature": 2.0, "divergence": divergence}
    trainer = trained(packed, tmp_path, name, teacher, student, loss=loss)
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    for key, parameter in student.named_parameters():
        assert not torch.equal(parameter, before[key]), key


@EACH
def test_sampled_targets_and_cross_entropy_alone(packed, tmp_path, name):
    teacher = LocalTeacher(tiny_model(seed=9), temperatures=(1.0,), sampling=SamplingConfig(head=4, draws=8))
    sampled = trained(packed, tmp_path / "a", name, teacher, loss={"alpha": 0.5, "temperature": 1.0})
    alone = trained(packed, tmp_path / "b", name)
    assert losses(sampled)[-1] < losses(sampled)[0]
    assert losses(alone)[-1] < losses(alone)[0]


@EACH
def test_eight_by_one_is_one_by_eight_and_recomputing_changes_nothing(packed, tmp_path, name):
    teacher = LocalTeacher(tiny_model(seed=9), top_k=8)
    whole = losses(trained(packed, tmp_path / "a", name, teacher, per_device_train_batch_size=8))
    parts = trained(packed, tmp_path / "b", name, teacher, per_device_train_batch_size=1,
                    gradient_accumulation_steps=8)  # fmt: skip
    again = trained(packed, tmp_path / "c", name, teacher, per_device_train_batch_size=8, gradient_checkpointing=True)
    assert losses(parts) == pytest.approx(whole, rel=1e-4)
    assert losses(again) == pytest.approx(whole, rel=1e-5)


@EACH
def test_every_optimizer_trains_it_and_bfloat16_does(packed, tmp_path, name):
    teacher = LocalTeacher(tiny_model(seed=9), top_k=8)
    for kind in ("adamw", "lion", "muon_lion", "muon_adamw"):
        trainer = trained(packed, tmp_path / kind, name, teacher, optimizer={"name": kind}, max_steps=2)
        algorithms = {group["algorithm"] for group in trainer.optimizer.param_groups}
        assert algorithms == set(kind.split("_"))
    narrow = trained(packed, tmp_path / "bf16", name, teacher, bf16=True)
    assert losses(narrow)[-1] < losses(narrow)[0]


# -- stages, checkpoints, exports -----------------------------------------------------------------------------------


@EACH
def test_stages_ternary_weights_and_exports(recipe, packed, tmp_path, name):
    first = {"stage_name": "ce", "max_steps": 2, "training": {"mode": "ce"}}
    stages = {"enabled": True, "configs": [first, {"stage_name": "kd", "max_steps": 2}]}
    student = {**STUDENTS[name], "ternary": {"group_size": 32}}
    tree = {**recipe.model_dump(exclude_unset=True), "student": student, "stages": stages, "seed": 1}
    tree["training"].pop("max_steps")
    tree["teacher"]["use_cached_logits"] = False
    made = Recipe.model_validate(tree)
    train_recipe(made, made.student_dir)
    final = made.student_dir / "final"
    for kind, rest in (("packed", "bf16"), ("hf", "f32")):
        section = ExportConfig(format=kind, rest=rest, output=tmp_path / kind)
        export_student(section, final, "x", verify=True)
    told = next_steps("hf", str(tmp_path / "hf"), "x")
    assert "import limbeck" in told[-1]  # transformers alone does not know these
    assert not any("vllm" in line for line in told)
    target = ExportConfig(format="gguf", output=tmp_path / "x.gguf")
    config = load_causal_lm(str(final), dtype="float32").config.to_dict()
    if config.get("memory") or config.get("halting"):  # which the engine has not
        with pytest.raises(LimbeckError, match="is true, and limbeck's engine"):
            export_student(target, final, "x")
        assert not (tmp_path / "x.gguf").exists()
    else:
        assert export_student(target, final, "x", verify=True)["weights_equal"]
    ids = torch.randint(1, 4096, (2, 20), generator=torch.Generator().manual_seed(3))
    # A process that imports limbeck and asks transformers alone.
    code = (
        "import limbeck, torch, sys; from transformers import AutoModelForCausalLM as A; from safetensors.torch "
        "import save_file; ids = torch.tensor(eval(sys.argv[1])); save_file({str(n): A.from_pretrained(f, "
        "dtype='float32').eval()(ids).logits.detach() for n, f in enumerate(sys.argv[3:])}, sys.argv[2])"
    )
    out = tmp_path / "logits.safetensors"
    folders = map(str, (final, tmp_path / "packed", tmp_path / "hf"))
    subprocess.run([sys.executable, "-c", code, str(ids.tolist()), str(out), *folders], check=True, timeout=200,
                   capture_output=True)  # fmt: skip
    found = dict(zip(("final", "packed", "hf"), (load_file(out)[str(n)] for n in range(3)), strict=True))
    # What is not ternary is bfloat16 in the packed folder.
    held = AutoModelForCausalLM.from_pretrained(final).eval()
    with torch.no_grad():
        torch.testing.assert_close(held(ids).logits, found["final"])
        for parameter in held.parameters():
            if not any(parameter is held.get_parameter(n) for n in held.config.quantization_config.weights):
                parameter.copy_(parameter.bfloat16())
        torch.testing.assert_close(held(ids).logits, found["packed"], rtol=1e-4, atol=1e-4)


@EACH
def test_a_resumed_run_ends_with_the_same_bytes(recipe, packed, tmp_path, name):
    training = {"max_steps": 6, "save_steps": 2, "eval_steps": 2}
    made = with_keys(recipe, training=training, teacher={"use_cached_logits": False})
    made = made.model_copy(update={"student": StudentConfig.model_validate(STUDENTS[name])})
    train_recipe(made, tmp_path / "whole")
    with stopped_after(2):
        train_recipe(made, tmp_path / "cut")
    train_recipe(made, tmp_path / "cut")
    for file in ("final/model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def written(tree: dict, folder, name: str):
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps({**tree, "output_dir": str(folder), "student": STUDENTS[name]}))
    return path


@pytest.mark.parametrize("name", ["titan-retnet-hrm", pytest.param("mhc", marks=pytest.mark.slow)])
def test_two_gloo_ranks_train_as_one_and_a_killed_run_continues(recipe_tree, tmp_path, name):
    training = {**recipe_tree["training"], "warmup_steps": 4, "max_steps": 16, "save_steps": 2, "eval_steps": 8}
    one, two = ({**recipe_tree, "training": {**training, "per_device_train_batch_size": size}} for size in (8, 4))
    limbeck("train", written(one, tmp_path / "one", name))
    again = written(one, tmp_path / "killed", name)
    process = subprocess.Popen([sys.executable, "-m", "limbeck", "train", str(again)], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "student" / "step_4").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training ended before it could be killed"
    done = limbeck("train", again)
    assert "continuing from" in done.stderr
    files = "student/final/*.safetensors"
    assert digest(tmp_path / "killed", files) == digest(tmp_path / "one", files) != {}
    ranks = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck",
         "train", str(written(two, tmp_path / "two", name))],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ranks.returncode == 0, ranks.stderr[-3000:]
    first, second = (load_file(tmp_path / n / "student" / "final" / "model.safetensors") for n in ("one", "two"))
    assert first.keys() == second.keys()
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 2e-3


# -- the halting head's loss ----------------------------------------------------------------------------------------


def test_the_halting_head_is_taught_where_the_student_agrees_with_the_teacher():
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 5, 8), torch.nn.Linear(8, 11, bias=False)
    logits = torch.nn.functional.linear(hidden, head.weight)[0]
    best = logits.argmax(-1)
    teacher = torch.full((1, 5, 11), -4.0)
    agree = torch.tensor([True, False, True, True, False])
    for place, (same, own) in enumerate(zip(agree, best, strict=True)):
        teacher[0, place, int(own) if same else (int(own) + 1) % 11] = 3.0
    targets = SparseTargets.from_logits(teacher, 4)
    labels = torch.tensor([[1, 2, -100, 4, 5]])
    halts = torch.tensor([[0.3, -1.0, 9.0, 2.0, 0.5]])

    class Model:
        @staticmethod
        def halting_logits(hidden):
            return halts

    outputs = Outputs(hidden, head, LogitTransform(), model=Model())
    loss, metrics = Halting(0.5)(outputs, Batch(labels, targets, num_items=10))
    p = torch.tensor([0.3, -1.0, 2.0, 0.5]).sigmoid()
    wanted = torch.tensor([1.0, 0.0, 1.0, 0.0])
    each = -(wanted * p.log() + (1 - wanted) * (1 - p).log())
    assert float(loss) == pytest.approx(0.5 * float(each.sum()) / 10, rel=1e-6)
    assert float(metrics["halting_loss"]) == pytest.approx(float(each.sum()), rel=1e-6)
    assert float(metrics["halted"]) == 3
    # Without a teacher the next token takes its place.
    labels[0, 0] = best[0]
    without, _ = Halting(1.0)(outputs, Batch(labels))
    right = torch.tensor([float(labels[0, i] == best[i]) for i in (0, 1, 3, 4)])
    each = -(right * p.log() + (1 - right) * (1 - p).log())
    assert float(without) == pytest.approx(float(each.mean()), rel=1e-6)


def test_a_halting_student_logs_its_loss_and_trains_every_segment(packed, tmp_path):
    trainer = trained(packed, tmp_path, "titan-retnet-hrm", LocalTeacher(tiny_model(seed=9), top_k=8), loss={
        "alpha": 0.5, "temperature": 1.0, "halting": 0.25})  # fmt: skip
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    total = 0.5 * line["ce_loss"] + 0.5 * line["kl_loss"] + 0.25 * line["halting_loss"]
    assert line["loss"] == pytest.approx(total, rel=1e-4)
    assert line["halted"] == 0.0  # its bias is -5 at first


def test_every_segment_has_its_part_of_the_loss():
    student = built("titan-retnet-hrm").train()
    for parameter in student.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(1, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    each = []
    for hidden in student.model(ids).segments:
        log_p = student.lm_head(hidden).log_softmax(-1)[:, :-1]
        each.append(-log_p.gather(-1, ids[:, 1:, None]).mean())
    attach_objectives(student)
    found = student(ids, loss_request=loss_request(labels, student=student, halting=0.0))
    assert abs(float(each[0] - each[1])) > 0.01
    assert float(found.loss) == pytest.approx(float(each[0] + each[1]) / 2, rel=1e-5)
    assert float(found.metrics["ce_loss"]) / 22 == pytest.approx(float(found.loss), rel=1e-5)


# -- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_size_that_its_name_says(name):
    student = outline_of(StudentConfig(preset=name), {"vocab_size": 32000}, 256)
    count = sum({id(p): p.numel() for p in student.parameters()}.values())
    size = name.rpartition("-")[2]
    if size == "small":
        assert student.config.hidden_size <= 256
    else:
        assert count == pytest.approx(int(size.removesuffix("m")) * 1e6, rel=0.05)
    assert hasattr(student, "ternary_state") == name.startswith("nano")


def test_any_key_of_a_preset_can_be_overruled(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("student: {preset: nano-small, config: {num_hidden_layers: 3}, mhc: {streams: 4}}\n")
    made = load_recipe(path, {"student": {"ternary": None, "config": {"hidden_size": 128}}})
    assert made.student.config["num_hidden_layers"] == 3
    assert made.student.config["hidden_size"] == 128
    assert made.student.config["num_attention_heads"] == 4
    assert made.student.mhc.streams == 4
    assert made.student.ternary is None
    again = Recipe.model_validate(json.loads(made.model_dump_json()))
    assert again.student == made.student
    other = load_recipe(path, {"student": {"model": "tiny-python"}})
    assert other.student.config == {}
    assert other.student.preset is None


LLAMA_RECIPE = "student: {config: {model_type: llama, num_hidden_layers: 7}, ternary: {group_size: 64}}\n"


@pytest.mark.parametrize(
    ("text", "given", "config", "kept"),
    [
        (LLAMA_RECIPE, {"preset": "retnet-small"}, {}, {"ternary"}),
        (LLAMA_RECIPE, {"preset": "retnet-small", "config": {"hidden_size": 128}}, {"hidden_size": 128}, {"ternary"}),
        ("student: {preset: nano-small}\n", {"preset": "retnet-small"}, {}, set()),
        ("student: {preset: nano-small, mhc: {streams: 4}, config: {max_position_embeddings: 9}}\n",
         {"preset": "nano-125m"}, {"max_position_embeddings": 9}, {"ternary", "mhc"}),
        ("student: {preset: retnet-hrm-small, config: {chunk_size: 64}}\n", {"preset": "retnet-small"},
         {"chunk_size": 64}, set()),
        ("student: {preset: retnet-hrm-small, config: {chunk_size: 64}}\n", {"preset": "nano-small"}, {},
         {"ternary", "mhc"}),
    ],
)  # fmt: skip
def test_a_preset_as_a_flag_takes_the_place_of_the_recipes_student(tmp_path, text, given, config, kept):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    for number in range(2):  # the recipe as its author wrote it, and as a run saves it
        made = load_recipe(path, {"student": given}).student
        assert made.config == {**PRESETS[given["preset"]]["config"], **config}, number
        assert {key for key in ("ternary", "mhc") if getattr(made, key) is not None} == kept
        path.write_text(load_recipe(path).model_dump_json())


def test_pretrained_weights_as_a_flag_take_the_place_of_a_preset(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("student: {preset: nano-small}\n")
    for _ in range(2):
        made = load_recipe(path, {"student": {"model": "tiny-python", "config": {"use_cache": False}}}).student
        assert made.config == {"use_cache": False}
        assert (made.preset, made.ternary, made.mhc) == (None, None, None)
        path.write_text(load_recipe(path).model_dump_json())


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ("{preset: retnet-smal}", "Did you mean retnet-small"),
        ("{preset: retnet-small, model: tiny-python}", "one of the two"),
        ("{preset: nano-small, mhc: {streams: 5}}", "streams must be at most 4"),
        ("{preset: [nano-small]}", "student.preset"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(tmp_path, student, words):
    path = tmp_path / "r.yaml"
    path.write_text(f"student: {student}\n")
    with pytest.raises(ConfigError, match=words):
        load_recipe(path)


def test_what_a_student_is_trained_with_is_among_its_inputs(recipe, packed):
    ce = with_keys(recipe, training={"mode": "ce"})
    rate = {"mhc": {"learning_rate": 0.1}}
    for change in ({"student": {"mhc": {"streams": 2}}}, {"loss": {"halting": 0.1}}, {"optimizer": rate}):
        assert train_inputs(with_keys(ce, **change), packed) != train_inputs(ce, packed), change


def test_mhc_lr_is_the_rate_of_the_streams(recipe_file, tmp_path):
    tree = json.loads(recipe_file.read_text())
    tree["student"]["mhc"] = {"streams": 2}
    recipe_file.write_text(json.dumps(tree))
    done = limbeck("train", recipe_file, "--mhc-lr", "0.005")
    assert "mhc · adamw · no decay" in done.stderr
    assert "lr 0.005" in done.stderr
    assert PackedDataset(tmp_path / "run" / "data")  # packed on the way
