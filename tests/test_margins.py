"""Further lines that deliberate errors got past: what is written, counted, bounded and left behind."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from conftest import TINY, save_model, tiny_model, with_keys
from limbeck import SparseTargets, TeacherCache
from limbeck.config import LossConfig, Recipe, TernaryConfig
from limbeck.errors import LimbeckError
from limbeck.evaluation import fidelity
from limbeck.export.architectures.base import architecture
from limbeck.export.disk import DiskTensors
from limbeck.export.gguf import GGUFExport
from limbeck.export.packed import export_packed
from limbeck.export.run import export_student
from limbeck.export.source import ExportSource
from limbeck.losses.objectives import Distillation
from limbeck.students.build import make_ternary
from limbeck.targets.codec import CodecSpec, decode, encode
from limbeck.teachers.build_cache import build_cache
from limbeck.training.checkpoints import remove
from limbeck.training.metrics import StepMetrics


class Recorder:
    """A GGUF writer that notes what it is told."""

    def __init__(self):
        self.told = {}

    def __getattr__(self, name):
        return lambda value: self.told.__setitem__(name.removeprefix("add_"), value)


def numbers_of(**changes):
    recorder = Recorder()
    config = {**TINY, "vocab_size": 300, "head_dim": 16, **changes}
    architecture(tiny_model(**config).config).add_numbers(recorder)
    return recorder.told


def test_yarns_speeds_have_defaults():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    told = numbers_of(model_type="qwen3", rope_parameters=rope)
    assert (told["rope_scaling_yarn_beta_fast"], told["rope_scaling_yarn_beta_slow"]) == (32.0, 1.0)
    told = numbers_of(model_type="qwen3", rope_parameters={**rope, "beta_fast": 32, "beta_slow": 1})
    assert (told["rope_scaling_yarn_beta_fast"], told["rope_scaling_yarn_beta_slow"]) == (32.0, 1.0)
    with pytest.raises(LimbeckError, match="beta_fast: 16.0 and llama.cpp runs qwen3 with 32.0"):
        numbers_of(model_type="qwen3", rope_parameters={**rope, "beta_fast": 16.0})


@pytest.mark.parametrize(("layers", "full", "interval"), [(3, [2], 2), (4, [2, 4], 2), (2, [1, 2], 1)])
def test_full_attention_in_every_nth_layer_as_far_as_there_are_layers(layers, full, interval):
    kinds = ["full_attention" if number in full else "linear_attention" for number in range(1, layers + 1)]
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
               "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "norm_topk_prob": True}  # fmt: skip
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
             "linear_value_head_dim": 8}  # fmt: skip
    told = numbers_of(model_type="qwen3_next", num_hidden_layers=layers, layer_types=kinds, **experts, **sizes)
    assert told["full_attention_interval"] == interval


def test_the_type_goes_by_the_inputs_of_every_weight(tmp_path):
    """Of experts `[E, out, in]` too: 128 inputs are no multiple of TQ2_0's 256."""
    model = tiny_model(
        model_type="qwen3_moe", hidden_size=256, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=128,
        decoder_sparse_step=1, head_dim=128,
    )  # fmt: skip
    make_ternary(model, TernaryConfig(group_size="row", preset="experts"))
    export = GGUFExport(save_model(model, tmp_path / "m"))
    assert export.layout.choose(DiskTensors(export.folder)) == "q2_0"


def test_an_export_says_sizes_and_checks_when_asked(tmp_path):
    model = tiny_model()
    make_ternary(model, TernaryConfig(group_size=32))
    folder = save_model(model, tmp_path / "run" / "final")
    recipe = Recipe.model_validate({"export": {"input": str(tmp_path / "run"), "output": str(tmp_path / "m.gguf")}})
    plain, checked = (export_student(recipe.export, tmp_path / "run", "run", verify=verify) for verify in (False, True))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert plain["checkpoint_mb"] == pytest.approx(size / 1e6)
    assert plain["gguf_mb"] == pytest.approx((tmp_path / "m.gguf").stat().st_size / 1e6)
    assert "weights_equal" not in plain
    assert checked["weights_equal"] is True
    export_packed(ExportSource.open(folder), tmp_path / "packed", "f32")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (folder / name).read_bytes()


def test_a_finished_folder_holds_what_is_documented(packed):
    names = {path.name for path in packed.folder.iterdir() if path.suffix != ".parquet"}
    assert names - {".lock"} == {"inputs.json", "manifest.json"}


@pytest.mark.parametrize(("compression", "filter_"), [("gzip", "gzip"), ("none", None)])
def test_sections_are_compressed_as_asked(recipe, packed, compression, filter_):
    build_cache(with_keys(recipe, teacher={"compression": compression}), recipe.cache_dir)
    assert len(TeacherCache(recipe.cache_dir)) == len(packed)
    with h5py.File(next(recipe.cache_dir.glob("train-*.h5"))) as file:
        assert {file[name].compression for name in file} == {filter_}
        assert {file[name].shuffle for name in file} == {filter_ is not None}


def test_a_position_without_support_stays_without(packed):
    spec = CodecSpec(3, 50, (1.0, 2.0))
    ids = torch.tensor([[4, 7, 9], [-1, -1, -1]], dtype=torch.int32)
    logprobs = torch.tensor([[0.5, 0.2, 0.1], [0.0, 0.0, 0.0]]).log()
    held = SparseTargets(ids, logprobs, torch.tensor([[0.0, 1.5], [0.0, 0.0]]), (1.0, 2.0), vocab_size=50)
    found = decode(encode(held, spec), spec)
    assert found.token_ids[1].tolist() == [-1] * 3
    assert found.logprobs[1].tolist() == [-float("inf")] * 3
    assert found.log_z[1].tolist() == [0.0, 0.0]


def test_waiting_for_a_cache_is_waiting_for_the_teacher(monkeypatch):
    import limbeck.training.metrics as module

    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def drained(by_loader):
        metrics = StepMetrics()
        for what, seconds in (("teacher", 1.0), ("data", 2.0)):
            with metrics.waiting(what):
                clock[0] += seconds
        clock[0] += 7.0
        metrics.add(torch.tensor(40), {"ce_loss": torch.tensor(80.0)})
        return metrics.drain(lambda values: values, distils=True, targets_by_loader=by_loader)

    apart, together = drained(False), drained(True)
    assert (apart["teacher_wait_share"], apart["data_wait_share"]) == pytest.approx((0.1, 0.2))
    assert (together["teacher_wait_share"], together["data_wait_share"]) == pytest.approx((0.3, 0.0))
    assert apart["tokens_per_second"] == pytest.approx(4.0)
    assert apart["ce_loss"] == pytest.approx(2.0)


def test_metrics_are_sums_over_positions_whatever_their_shape():
    metrics = StepMetrics()
    metrics.add(torch.tensor(3), {"a_loss": torch.tensor(6.0), "load": torch.tensor([3.0, 0.0])})
    metrics.add(torch.tensor(1), {"a_loss": torch.tensor(2.0), "load": torch.tensor([0.0, 1.0])})
    tokens, means = metrics.means(lambda values: 2 * values)  # two ranks alike
    assert tokens == 8
    assert means == {"a_loss": 2.0, "load/000": 0.75, "load/001": 0.25}
    other = StepMetrics()
    other.restore(metrics.state(lambda values: values), main=True)
    assert other.means(lambda values: values) == (4.0, means)
    silent = StepMetrics()
    silent.restore(metrics.state(lambda values: values), main=False)
    assert silent.means(lambda values: values)[0] == 0.0


def test_throughput_counts_the_time_in_the_model(packed, monkeypatch):
    calls = []
    monkeypatch.setattr(fidelity, "_now", lambda model: calls.append(0) or float(len(calls)))
    found = fidelity.score_model(tiny_model(), packed, np.ones(4096, dtype=np.int64), batch_size=16)
    assert found.tokens_per_second == pytest.approx(found.tokens / (len(calls) / 2))


@pytest.mark.parametrize(("start", "end"), [(1.0, 4.0), (4.0, 1.0)])
def test_a_ramp_of_the_temperature_takes_the_declared_ones_between_its_ends(start, end):
    loss = LossConfig(temperature=end, temperature_initial=start, temperature_warmup_steps=30)
    objective = Distillation(loss, (0.5, 1.0, 2.0, 4.0, 8.0))
    seen = [objective.scheduled(step)["temperature"] for step in range(32)]
    assert (seen[0], seen[-1]) == (start, end)
    assert list(dict.fromkeys(seen)) == sorted((1.0, 2.0, 4.0), reverse=start > end)


def test_what_is_no_checkpoint_any_more_is_removed_too(tmp_path):
    (tmp_path / "step_3").mkdir()
    (tmp_path / "step_3" / "x").write_text("y")
    remove(tmp_path / "step_3")
    assert not (tmp_path / "step_3").exists()


def test_files_of_text_make_a_folder_of_text(tmp_path):
    from limbeck.data.sources import _is_hub_folder

    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"")
    plain = SimpleNamespace(config_name=None, recursive=False)
    assert not _is_hub_folder(plain, tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "README.md")
    assert _is_hub_folder(plain, tmp_path)
    assert not _is_hub_folder(SimpleNamespace(config_name=None, recursive=True), tmp_path)
    assert _is_hub_folder(SimpleNamespace(config_name="en", recursive=True), tmp_path)
