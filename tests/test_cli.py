"""The command line: exit codes, one JSON document, nearest names, and a pipeline that skips what is done."""

import json
import subprocess
import sys

import pytest

from conftest import digest, limbeck
from limbeck.cli.options import parse_flags
from limbeck.config import Recipe
from limbeck.config.moved import present_key
from limbeck.errors import ConfigError
from limbeck.pipeline import plan, run_pipeline
from limbeck.recipe import ALIASES, keys, load_recipe


def test_help_is_light():
    """No heavy import happens for --help; the time itself is the benchmark's business."""
    code = "import sys; from limbeck.cli import main; main(['--help']); print([m for m in sys.modules if m in HEAVY])"
    heavy = "HEAVY = {'torch', 'transformers', 'datasets', 'pyarrow', 'h5py', 'numpy', 'pydantic'}; "
    done = subprocess.run([sys.executable, "-c", heavy + code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_processes_that_tokenise_do_without_torch():
    """Each would need a second and 200 MB to import it, and never use it."""
    code = "import sys, limbeck.data.tokenize; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runn", "x.yaml"], "did you mean `limbeck run`"),
        (["run"], "needs a recipe"),
        (["run", "nowhere.yaml"], "does not exist"),
        (["config", "show", "--loss.alhpa", "0.7"], "did you mean --loss.alpha"),
        (["config", "show", "--alhpa", "0.7"], "did you mean --alpha"),
        (["config", "show", "--loss.alpha", "2"], "loss.alpha"),
        (["config", "show", "--loss.alpha", "high"], "loss.alpha"),
        (["config", "show", "--training.bf16", "--training.fp16"], "choose one"),
        (["train", "stray"], "does not exist"),
        (["config", "show", "--training.seed", "1"], "did you mean"),
        (["config", "show", "--seed", "-1"], "seed"),
        (["config", "show", "--max-steps", "0"], "max_steps"),
        (["config", "show", "--device", "gpu"], "training.device"),
        (["config", "show", "--report-to", "[tensorbord]"], "report_to"),
        (["config", "show", "--eval-interval", "100", "--checkpoint-interval", "300"], "multiple"),
        (["run", "--dataset.validation_fraction", "0", "--config", "RECIPE"], "validation_fraction is 0"),
    ],
)
def test_bad_usage_is_exit_code_2(words, message, tmp_path, recipe_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [recipe_file if word == "RECIPE" else word for word in words]
    before = list(tmp_path.iterdir())
    code, error = run_in_process(*words)
    assert code == 2
    assert message in error
    assert error.count("\n") <= 3
    assert list(tmp_path.iterdir()) == before


def test_errors_are_json_too(tmp_path):
    done = limbeck("config", "show", "--loss.alhpa", "1", "--json", check=False)
    assert json.loads(done.stdout)["exit_code"] == 2


def test_misspelt_keys_in_files_name_the_nearest(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("teacher:\n  topk: 5\n")
    with pytest.raises(ConfigError, match=r"unknown key teacher.topk; did you mean teacher.top_k"):
        load_recipe(path)


def test_flags_are_the_same_as_keys():
    assert parse_flags(["--loss.alpha", "0.7", "--bf16", "--lr=1e-3", "--keep_last_checkpoints", "2"]) == {
        "loss": {"alpha": 0.7},
        "training": {"bf16": True, "learning_rate": 1e-3, "save_total_limit": 2},
    }
    recipe = load_recipe(
        None, parse_flags(["--seq-len", "128", "--report-to", "[wandb]", "--student.config.model_type", "llama"])
    )
    assert recipe.dataset.max_length == 128
    assert recipe.training.report_to == ["wandb"]
    for text in ("class Foo:", "# comment", "x = 1 # y", "[", "true", "1e-3"):  # text stays text
        assert parse_flags(["--generation.prompt", text]) == {"generation": {"prompt": text}}
    assert parse_flags(["--teacher-model", "null"]) == {"teacher": {"model": None}}
    known = dict(keys())
    assert not [target for target in ALIASES.values() if target not in known]


def test_the_users_keys_are_there():
    known = dict(keys())
    for key in """
        teacher.use_cached_logits teacher.cache_dir teacher.top_k loss.alpha loss.temperature training.num_train_epochs
        training.per_device_train_batch_size training.gradient_accumulation_steps training.learning_rate
        training.warmup_steps training.bf16 parameter_lr_multipliers stages.enabled stages.configs dataset.name
        dataset.config_name dataset.split dataset.text_column dataset.max_length dataset.max_samples
    """.split():
        assert present_key(key) in known


def test_schema_and_show():
    schema = json.loads(limbeck("config", "schema").stdout)
    assert "loss" in schema["properties"]
    shown = json.loads(limbeck("config", "show", "--kl-weight", "0.25", "--json").stdout)
    assert shown["loss"]["alpha"] == 0.25
    assert Recipe.model_validate(shown)


def test_run_is_whole_then_done_then_partly_redone(recipe_tree, recipe_file, tmp_path):
    recipe_tree["pipeline"] = {"ce_baseline": True, "generate": True}
    recipe_file.write_text(json.dumps(recipe_tree))
    dry = json.loads(limbeck("run", recipe_file, "--dry-run", "--json").stdout)
    assert {stage["state"] for stage in dry["stages"]} == {"to run"}
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("data/*"))
    done = json.loads(limbeck("run", recipe_file, "--json").stdout)
    names = ["pack", "cache", "train", "train_ce", "evaluate", "generate"]
    assert [(s["name"], s["state"]) for s in done["stages"]] == [(name, "done") for name in names]
    for model in ("teacher", "student_kd", "student_ce"):
        scores = done["evaluation"][model]
        assert {"loss", "perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement"} <= scores.keys()
    assert done["evaluation"]["teacher"]["kl_to_teacher"] < 1e-9
    before = digest(tmp_path / "run", "*.safetensors", "*.h5", "*.parquet")

    again = load_recipe(recipe_file)
    assert {stage.state for stage in run_pipeline(again).stages} == {"skipped"}
    assert digest(tmp_path / "run", "*.safetensors", "*.h5", "*.parquet") == before

    changed = load_recipe(recipe_file, {"loss": {"alpha": 0.25}})
    assert [s.state for s in plan(changed)] == ["done", "done", "to run", "done", "to run", "to run"]
    states = {stage.name: stage.state for stage in run_pipeline(changed).stages}
    assert states == {
        "pack": "skipped", "cache": "skipped", "train": "done", "train_ce": "skipped",
        "evaluate": "done", "generate": "done",
    }  # fmt: skip
    # The earlier result was set aside, not lost, and comes back with its settings.
    assert {stage.state for stage in run_pipeline(again).stages} == {"skipped"}
    after = digest(tmp_path / "run" / "student", "final/*.safetensors")
    assert next(iter(after.values())) == before["student/final/model.safetensors"]


def test_single_commands_make_what_they_need(recipe_file, tmp_path, corpus):
    out = tmp_path / "elsewhere"
    packed = json.loads(limbeck("data", "pack", "--input", corpus, "--output", out, "--max-seq-length", "64",
                                "--tokenizer", "tiny-python", "--json", cwd=tmp_path).stdout)  # fmt: skip
    assert packed["output"] == str(out)
    assert (out / "manifest.json").exists()
    again = limbeck("data", "pack", "--input", corpus, "--output", out, "--max-seq-length", "32",
                    "--tokenizer", "tiny-python", check=False, cwd=tmp_path)  # fmt: skip
    assert again.returncode == 1
    assert "64 -> 32" in again.stderr
    kept = limbeck("data", "pack", "--input", corpus, "--output", out, "--max-seq-length", "32", "--skip-existing",
                   "--tokenizer", "tiny-python", cwd=tmp_path)  # fmt: skip
    assert "kept as it is" in kept.stderr
    trained = json.loads(limbeck("train", recipe_file, "--pretrain-ce-only", "--json").stdout)
    assert [s["name"] for s in trained["stages"]] == ["pack", "train"]
    scores = json.loads(limbeck("eval", recipe_file, "--json").stdout)
    assert scores["student"]["tokens"] > 0
    text = json.loads(limbeck("generate", recipe_file, "--prompt", "def f", "--max-new-tokens", "4", "--json").stdout)
    assert text["text"].startswith("def f")


def test_bad_input_changes_nothing_on_disk(recipe_tree, recipe_file, tmp_path):
    """One clear error and exit code 1 or 2, whether the run's folder is new or holds a finished run."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns").mkdir()
    (tmp_path / "columns" / "a.jsonl").write_text('{"body": "x"}\n')
    cases = [
        (["--dataset", tmp_path / "empty"], "no .txt"),
        (["--dataset", tmp_path / "columns"], "no text under 'text'"),
        (["--dataset", tmp_path / "nowhere"], "does not exist"),
        (["--teacher.top_k", "5000"], "vocabulary has 4096"),
        (["--teacher.temperatures", "[3]"], "loss.temperature is 2.0"),
        (["--loss.alhpa", "1"], "did you mean"),
        (["--teacher.model", tmp_path / "empty"], "empty"),
        (["--student.config.model_type", "no_such"], "no_such"),
        (["--student.config.hiden_size", "64"], "did you mean hidden_size"),
        (["--student.config.num_attention_heads", "many"], "num_attention_heads"),
        (["--dataset", "a/b/c"], "a/b/c"),
        (["--teacher.cache_dir", tmp_path / "run" / "data"], "does not answer this run: "),
        (["--student.config.vocab_size", "100"], "vocab_size is 100 and the tokenizer has 4096"),
        (["--parameter_lr_multipliers", "[{pattern: expert, lr_multiplier: 2}]"], "matches no parameter"),
        (["--parameter_lr_multipliers", "[{pattern: '(', lr_multiplier: 2}]"], "not a regular expression"),
        (["--tokenizer", tmp_path / "empty"], "tokenizer"),
    ]

    def files():
        found = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path): path.read_bytes() for path in found}

    def refuse_all():
        for flags, message in cases:
            code, error = run_in_process("run", recipe_file, *flags)
            assert code in (1, 2), (flags, error)
            assert message in error, (flags, error)
            assert files() == before, flags

    before = files()
    for flags, message in cases[:3]:
        code, error = run_in_process("run", recipe_file, *flags)
        assert code in (1, 2)
        assert message in error
        assert files() == before
        assert not (tmp_path / "run").exists()
    assert run_in_process("train", recipe_file)[0] == 0
    before = files()
    refuse_all()


def test_text_of_a_single_row_is_told_before_training(recipe_tree, recipe_file, tmp_path):
    (tmp_path / "one.txt").write_text("def f(): return 1\n")
    code, error = run_in_process("run", recipe_file, "--dataset", tmp_path / "one.txt")
    assert code == 1
    assert "no row of the 1 documents is held out" in error
    assert not (tmp_path / "run" / "student").exists()


def run_in_process(*words) -> tuple[int, str]:
    """The command line without a new interpreter: exit code and stderr."""
    import contextlib
    import io

    from limbeck.cli import main

    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in words])
    return code, stderr.getvalue()


def test_two_runs_cannot_write_one_folder(recipe_file, recipe, tmp_path):
    from limbeck.storage import folder_lock

    with folder_lock(recipe.root):
        done = limbeck("run", recipe_file, check=False)
    assert done.returncode == 1
    assert "another limbeck process" in done.stderr


def test_a_cache_from_elsewhere_needs_no_teacher(recipe_tree, recipe_file, recipe, tmp_path):
    """Cache on one machine, copy the folder, train on another that has no teacher weights."""
    import shutil

    limbeck("teacher", "cache", recipe_file)
    shutil.copytree(recipe.cache_dir, tmp_path / "brought")
    shutil.rmtree(recipe.root)
    tree = {**recipe_tree, "teacher": {"cache_dir": str(tmp_path / "brought"), "top_k": 16},
            "tokenizer": {"name": "tiny-python"}}  # fmt: skip
    recipe_file.write_text(json.dumps(tree))
    states = json.loads(limbeck("train", recipe_file, "--json").stdout)["stages"]
    assert [(s["name"], s["state"]) for s in states] == [("pack", "done"), ("cache", "skipped"), ("train", "done")]
