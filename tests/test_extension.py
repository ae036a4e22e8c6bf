"""Parts from outside the package: the files that docs/adding-a-*.md print, named by a recipe and run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from fastapi import FastAPI, Request
from safetensors.torch import load_file

from conftest import TINY, limbeck, loss_request, save_model, stopped_after, tiny_model
from limbeck import LocalTeacher, SparseTargets, fused_distillation_loss
from limbeck.cli.options import parse_flags
from limbeck.config import Recipe
from limbeck.config.base import merged
from limbeck.errors import ConfigError
from limbeck.losses.objective import Batch, Objective, Objectives
from limbeck.models import load_causal_lm
from limbeck.optim.hybrid import ALGORITHMS
from limbeck.pipeline import build_stages
from limbeck.plugins import load_plugins, plugin_identity
from limbeck.recipe import load_recipe
from limbeck.registry import DIVERGENCES, STAGES, Choice, Registry
from limbeck.stages.train import TrainStage
from limbeck.training.head import LossRequest, attach_objectives
from limbeck.training.metrics import StepMetrics
from limbeck.training.own_parameters import FILE
from limbeck.training.phases import train_recipe
from serving import running

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.stem.removeprefix("adding-a-").removeprefix("adding-an-") for path in DOCS.glob("adding-a*.md"))


def page(name, folder) -> dict:
    """Write the file that a page prints into `folder`; the recipe's keys that it prints, with the file's place."""
    text = next(DOCS.glob(f"adding-a*-{name}.md")).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (keys,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    tree = yaml.safe_load(keys)
    (file,) = tree["plugins"]
    (folder / file).write_text(code)
    return {**tree, "plugins": [str(folder / file)]}


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """One folder for what this process imports: a part from two files would be two parts of one name."""
    return tmp_path_factory.mktemp("parts")


@pytest.mark.parametrize("name", PAGES)
def test_a_part_is_a_file_of_less_than_thirty_lines(name, tmp_path):
    (file,) = page(name, tmp_path)["plugins"]
    code = Path(file).read_text()
    assert f"`{Path(file).name}`" in next(DOCS.glob(f"adding-a*-{name}.md")).read_text()
    assert sum(1 for line in code.splitlines() if line.strip()) < 30


def test_a_run_with_parts_from_outside(recipe_tree, tmp_path):
    """A divergence, an objective, a student, a suite and a stage of one's own in one recipe."""
    trees = [page(name, tmp_path) for name in ("divergence", "objective", "student", "suite", "stage")]
    tree = {**recipe_tree, "student": {}}
    for part in trees:
        tree = {**merged(tree, part), "plugins": [*tree.get("plugins", []), *part["plugins"]]}
    tree["training"] = {**tree["training"], "logging_steps": 1, "save_steps": 2}
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    found = json.loads(limbeck("run", recipe, "--json").stdout)
    assert [stage["name"] for stage in found["stages"]] == ["pack", "cache", "train", "evaluate", "card"]
    assert found["card"] == "small: 4 steps\n"
    scores = found["evaluation"]["student_kd"]
    assert 1 <= scores["first_choices"] <= 4 * 32
    assert scores["loss"] > 0
    student = tmp_path / "run" / "student"
    log = json.loads((student / "step_4" / "trainer_state.json").read_text())["log_history"][0]
    assert log["calm_loss"] > 0
    assert log["loss"] == pytest.approx(0.5 * log["ce_loss"] + 0.5 * 4.0 * log["kl_loss"] + 0.1 * log["calm_loss"])
    config = json.loads((student / "final" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (3, 64)
    again = json.loads(limbeck("run", recipe, "--json").stdout)
    assert {stage["state"] for stage in again["stages"]} == {"skipped"}
    Path(trees[1]["plugins"][0]).write_text(Path(trees[1]["plugins"][0]).read_text() + "\n# changed\n")
    planned = json.loads(limbeck("run", recipe, "--dry-run", "--json").stdout)
    states = {stage["name"]: stage["state"] for stage in planned["stages"]}
    assert (states["pack"], states["cache"], states["train"]) == ("done", "done", "to run")


def test_renyis_divergence_is_its_formula(once):
    load_plugins(page("divergence", once)["plugins"])
    p, q = torch.rand(2, 3, 5, dtype=torch.float64).softmax(-1)
    found = DIVERGENCES.build(Choice(name="renyi", order=0.3))(p.log(), q.log(), torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(found, (p**0.3 * q**0.7).sum(-1).log() / (0.3 - 1))
    with pytest.raises(ConfigError, match=r"renyi has no parameter 'oder'; its parameters are order"):
        DIVERGENCES.build(Choice(name="renyi", oder=0.3))


def test_parameters_of_an_objective_are_trained_saved_and_resumed(recipe_tree, packed, once, tmp_path):
    own = page("objective", once)
    load_plugins(own["plugins"])
    tree = merged({**recipe_tree, "training": {**recipe_tree["training"], "mode": "ce", "save_steps": 2}}, own)
    recipe = Recipe.model_validate(tree)
    train_recipe(recipe, tmp_path / "whole")
    with stopped_after(1):
        train_recipe(recipe, tmp_path / "cut")
    (points,) = load_file(tmp_path / "cut" / "step_2" / FILE).values()
    assert float(points.abs().max()) > 0
    train_recipe(recipe, tmp_path / "cut")
    for file in (f"step_4/{FILE}", "final/model.safetensors", "step_4/optimizer.pt"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not (tmp_path / "whole" / "final" / FILE).exists()
    assert not any("point" in name for name in load_file(tmp_path / "whole" / "final" / "model.safetensors"))
    later = (tmp_path / "cut" / "step_4" / FILE).read_bytes()
    assert later != (tmp_path / "cut" / "step_2" / FILE).read_bytes()


def test_an_objectives_part_of_the_batch_is_its_share(packed, once):
    """Two halves of a batch add up to the whole, in loss and gradient."""
    load_plugins(page("objective", once)["plugins"])
    model = tiny_model()
    attach_objectives(model)
    rows = packed.rows(range(6))
    count = int((rows.labels >= 0).sum())
    losses = []
    for parts in ([rows], [rows.slice(0, 2), rows.slice(2, 6)]):
        total = 0.0
        for part in parts:
            request = loss_request(part.labels, num_items=float(count), objectives=["calm"], student=model)
            found = model(**part.model_inputs("per_document"), loss_request=request)
            total += float(found.loss)
        losses.append(total)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    hidden = model.model(**rows.model_inputs("per_document")).last_hidden_state[rows.labels >= 0]
    whole = loss_request(rows.labels, objectives=["calm"], student=model)
    found = model(**rows.model_inputs("per_document"), loss_request=whole).metrics["calm_loss"] / count
    assert float(found) == pytest.approx(float(hidden.detach().square().mean()), rel=1e-5)


def test_an_architecture_from_outside_goes_to_gguf(tmp_path):
    import gguf

    sizes = {
        **TINY,
        "model_type": "ministral",
        "head_dim": 16,
        "sliding_window": None,
        "layer_types": ["full_attention"],
    }
    folder = save_model(tiny_model(**sizes), tmp_path / "m" / "final")
    refused = limbeck("export", folder, "--output", tmp_path / "m.gguf", check=False)
    assert refused.returncode == 1
    assert (
        "model_type ministral can not be exported to GGUF: the architectures are gemma3_text, llama" in refused.stderr
    )
    (plugin,) = page("gguf-architecture", tmp_path)["plugins"]
    limbeck("export", folder, "--output", tmp_path / "m.gguf", "--plugins", plugin)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    q = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    pairs = q.reshape(2, 2, 8, 32).transpose(1, 2).reshape(32, 32)
    assert torch.equal(torch.from_numpy(held["blk.0.attn_q.weight"].copy()).float(), pairs.half().float())
    windowed = save_model(tiny_model(**{**sizes, "sliding_window": 64}), tmp_path / "w" / "final")
    refused = limbeck("export", windowed, "--output", tmp_path / "w.gguf", "--plugins", plugin, check=False)
    assert "sliding_window is set" in refused.stderr


def test_a_protocol_from_outside_teaches(recipe_tree, teacher_folder, packed, once):
    model = load_causal_lm(str(teacher_folder), dtype="float32").eval()
    app = FastAPI()

    @app.post("/score")
    async def score(request: Request):
        body = await request.json()
        scores = []
        for tokens in body["tokens"]:
            with torch.no_grad():
                top = model(torch.tensor([tokens])).logits[0].log_softmax(-1).topk(body["k"])
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            scores.append([list(zip(ids, values, strict=True)) for ids, values in pairs])
        return {"scores": scores}

    own = page("teacher", once)
    load_plugins(own["plugins"])
    with running(app) as url:
        section = {**recipe_tree["teacher"], **own["teacher"], "endpoint": [url]}
        tree = {**recipe_tree, "loss": own["loss"], "teacher": section}
        from limbeck.data.tokenizer import recipe_tokenizer
        from limbeck.teachers.sources import RemoteSource

        recipe = Recipe.model_validate(tree)
        teacher = RemoteSource.of(recipe).open(recipe_tokenizer(recipe))
        rows = packed.rows([0, 1, 2])
        found = teacher.targets(rows)
        teacher.close()
    wanted = LocalTeacher(model, top_k=16, temperatures=(1.0,)).targets(rows)
    known = rows.labels >= 0
    assert torch.equal(found.token_ids[known].sort(-1).values, wanted.token_ids[known].sort(-1).values)
    torch.testing.assert_close(found.logprobs[known], wanted.logprobs[known], atol=1e-4, rtol=1e-4)


def test_plugins_that_cannot_be_used_are_told(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "twice.py").write_text(
        "from limbeck.registry import DIVERGENCES\nDIVERGENCES.register('jsd')(type('Other', (), {}))\n"
    )
    for name, message in (
        (str(tmp_path / "absent.py"), "does not exist"),
        (str(tmp_path / "broken.py"), "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("no.such.module", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_plugins([name])
        with pytest.raises(ConfigError, match=message):
            load_recipe(None, {"plugins": [name]})
    list(DIVERGENCES)
    with pytest.raises(ConfigError, match="two parts register as divergence 'jsd'"):
        load_plugins([str(tmp_path / "twice.py")])


def test_a_registry_imports_its_rooms_when_it_is_asked(tmp_path, monkeypatch):
    (tmp_path / "a_room_of_tests.py").write_text("import builtins\nbuiltins.table.register('one')(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    table = Registry("thing", "some.key", "a_room_of_tests")
    monkeypatch.setattr("builtins.table", table, raising=False)
    assert table._parts == {}
    assert list(table) == ["one"]
    assert (table.get("one"), "one" in table, table.items()) == (1, True, [("one", 1)])
    with pytest.raises(ConfigError, match=r"some.key: unknown thing 'onne'; choose one of one. Did you mean one\?"):
        table.get("onne")


def test_keys_by_their_earlier_names(tmp_path):
    """A recipe that an earlier limbeck saved holds every key with its default."""
    saved = {"loss": {"divergence": "forward_kl", "jsd_beta": 0.5, "skew": 0.1}, "teacher": {"kind": None}}
    assert Recipe.model_validate(saved).loss.divergence == Choice(name="forward_kl")
    one = Recipe.model_validate({"loss": {"divergence": "jsd", "jsd_beta": 0.3, "skew": 0.1}})
    assert one.loss.divergence == Choice(name="jsd", beta=0.3)
    assert Recipe.model_validate(json.loads(one.model_dump_json())).loss == one.loss
    with pytest.raises(ValueError, match=r"forward_kl has no parameter 'skew'"):
        Recipe.model_validate({"loss": {"skew": 0.4}})
    with pytest.raises(ConfigError, match=r"loss.jsd_beta is 0.3 and loss.divergence.beta, its present name, is 0.4"):
        Recipe.model_validate({"loss": {"divergence": {"name": "jsd", "beta": 0.4}, "jsd_beta": 0.3}})
    file = tmp_path / "r.yaml"
    file.write_text("loss: {divergence: jsd, jsd_beta: 0.4}\n")
    for flags, wanted in (
        (["--loss.divergence.beta", "0.3"], {"name": "jsd", "beta": 0.3}),
        (["--loss.jsd_beta", "0.3"], {"name": "jsd", "beta": 0.3}),
        (["--loss.divergence", "skewed_kl"], {"name": "skewed_kl"}),
        (["--loss.divergence.name", "skewed_kl", "--loss.skew", "0.3"], {"name": "skewed_kl", "skew": 0.3}),
        (["--loss.divergence.skew", "0.3", "--loss.divergence", "skewed_kl"], {"name": "skewed_kl", "skew": 0.3}),
        (["--loss.divergence", "skewed_kl", "--loss.divergence.skew", "0.3"], {"name": "skewed_kl", "skew": 0.3}),
    ):
        assert load_recipe(file, parse_flags(flags)).loss.divergence == Choice(**wanted), flags


@pytest.mark.parametrize(("own", "wanted"), [
    ({"jsd_beta": 0.3}, {"name": "jsd", "beta": 0.3}),
    ({"divergence": {"beta": 0.3}}, {"name": "jsd", "beta": 0.3}),
    ({"divergence": {"name": "skewed_kl", "skew": 0.2}}, {"name": "skewed_kl", "skew": 0.2}),
    ({"divergence": "tvd"}, {"name": "tvd"}),
])  # fmt: skip
def test_a_phase_changes_the_divergence_or_its_parameter(own, wanted):
    stages = {"enabled": True, "configs": [{"stage_name": "a", "max_steps": 1, "loss": own}]}
    recipe = Recipe.model_validate({"loss": {"divergence": "jsd", "jsd_beta": 0.5}, "stages": stages})
    ((_, found),) = recipe.stage_recipes()
    assert found.loss.divergence == Choice(**wanted)


def test_a_plugin_that_changes_under_a_process_is_told(tmp_path):
    file = tmp_path / "part.py"
    file.write_text("x = 1\n")
    load_plugins([str(file)])
    before = plugin_identity([str(file), "json"])
    file.write_text("x = 2\n")
    assert plugin_identity([str(file), "json"]) == before
    assert before[1] == "json"
    with pytest.raises(ConfigError, match="has changed since it was imported"):
        load_plugins([str(file)])


class Named(Objective):
    """Measures what it is told to."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def forward(self, outputs, batch):
        return torch.zeros(()), dict.fromkeys(self.names, batch.positions)


def test_names_of_metrics_are_each_objectives_own(packed):
    rows = packed.rows([0, 1])
    model = tiny_model()
    attach_objectives(model)

    def measure(*objectives):
        request = LossRequest(Batch(rows.labels), Objectives([(1.0, objective) for objective in objectives]))
        return model(**rows.model_inputs("per_document"), loss_request=request).metrics

    assert set(measure(Named("a"), Named("b"))) == {"a", "b"}
    with pytest.raises(ConfigError, match="two objectives measure 'a'"):
        measure(Named("a"), Named("b", "a"))
    with pytest.raises(ConfigError, match="measures 'loss', which the trainer logs"):
        measure(Named("loss"))
    metrics = StepMetrics()
    metrics.add(torch.tensor(3), measure(Named("a", "b")))
    with pytest.raises(ConfigError, match="measured b in one micro-batch and not in another"):
        metrics.add(torch.tensor(3), measure(Named("a")))


def test_stages_that_cannot_be_ordered_are_told(recipe, monkeypatch):
    class Late(TrainStage):
        @classmethod
        def of(cls, recipe, before):
            return [cls(recipe, cls.called, recipe.root / "late", label="x", after=cls.reads)]

    monkeypatch.setitem(STAGES._parts, "late", Late)
    for called, reads, message in (
        ("late", ["export"], "stage late reads export, and this recipe has pack, cache, train, evaluate before it"),
        ("train", [], "two stages are named 'train'"),
    ):
        Late.called, Late.reads = called, reads
        with pytest.raises(ConfigError, match=message):
            build_stages(recipe)


def test_experts_without_a_head_dim_of_their_own_go_to_gguf(tmp_path):
    from limbeck.export.gguf import GGUFExport

    sizes = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
             "decoder_sparse_step": 1, "norm_topk_prob": True, "hidden_size": 64, "num_attention_heads": 4}  # fmt: skip
    folder = save_model(tiny_model(**sizes), tmp_path / "m")
    GGUFExport(folder).write(tmp_path / "m.gguf")
    import gguf

    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["qwen3moe.attention.key_length"].contents() == 16


RANKS = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from conftest import tiny_model
from limbeck import DistillationTrainer, ranks
from limbeck.config import Recipe
from limbeck.data.dataset import PackedDataset
from limbeck.plugins import load_plugins
from test_trainer import arguments
load_plugins([{plugin!r}])
out, batch = sys.argv[1:]
trainer = DistillationTrainer(
    tiny_model(), arguments(out, per_device_train_batch_size=int(batch), objectives=["calm"], adam_epsilon=1e-3,
                            save_strategy="steps", save_steps=2, ddp_backend="gloo" if batch == "4" else None),
    train_dataset=PackedDataset({data!r}),
)
trainer.train()
ranks.shut_down()
ranks.end(0)
"""


def test_two_ranks_train_an_objectives_parameters_as_one_process_does(packed, once, tmp_path):
    (plugin,) = page("objective", once)["plugins"]
    script = tmp_path / "ranks.py"
    paths = [str(Path(__file__).parent)]
    script.write_text(RANKS.format(paths=paths, plugin=plugin, data=str(packed.folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, command, batch in (("one", [sys.executable], "8"), ("two", torchrun, "4")):
        subprocess.run([*command, str(script), str(tmp_path / name), batch], check=True, env=environment, timeout=240)
    (one,), (two,) = (load_file(tmp_path / name / "step_2" / FILE).values() for name in ("one", "two"))
    assert float(one.abs().max()) > 1e-5
    torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-2)


def choices(model, field):
    """The names that a key's Literal allows."""
    annotation = model.model_fields[field].annotation
    found = get_args(annotation)
    return {name for part in found for name in (get_args(part) or (part,)) if isinstance(name, str)}


def test_what_a_key_allows_is_what_there_is():
    """Tables that no plugin adds to are written out in the recipe's types too; here they are held together."""
    from limbeck.config.recipe import ExportConfig
    from limbeck.config.training import AlgorithmRule, LossConfig, OptimizerConfig, TrainingConfig
    from limbeck.export.blocks import BLOCK_TYPES
    from limbeck.export.packed import _DTYPES
    from limbeck.optim.schedules import SCHEDULES

    assert choices(TrainingConfig, "lr_scheduler_type") == set(SCHEDULES)
    assert choices(ExportConfig, "type") == {"auto", "f16", *BLOCK_TYPES}
    assert choices(ExportConfig, "rest") == set(_DTYPES)
    assert choices(AlgorithmRule, "algorithm") == set(ALGORITHMS)
    for name in choices(OptimizerConfig, "name"):
        chosen = OptimizerConfig(name=name)
        assert {chosen.for_matrices, chosen.for_others} <= set(ALGORITHMS)
    for tail in choices(LossConfig, "tail"):
        hidden, head = torch.randn(3, 4), torch.randn(9, 4)
        targets = SparseTargets.from_logits(torch.randn(3, 9), 2, (1.0,))
        loss = fused_distillation_loss(hidden, head, torch.tensor([1, 2, 3]), targets, temperature=1.0, tail=tail)
        assert float(loss.divergence_sum) > 0
