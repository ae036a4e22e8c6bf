"""Mistakes as people make them: each is told in one line that says what to do, and nothing is left half done."""

import contextlib
import io
import json
import os

import pytest

from conftest import TINY, limbeck, save_model, tiny_model
from limbeck.cli import main
from limbeck.data.sources import Document
from limbeck.data.tokenizer import train_tokenizer
from limbeck.errors import ConfigError
from limbeck.models import load_causal_lm
from limbeck.models.structure import require_causal
from limbeck.recipe import load_recipe


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a recipe that works, and what mistakes are made with."""
    root = tmp_path_factory.mktemp("mistakes")
    (root / "t").mkdir()
    for number in range(30):
        (root / "t" / f"a{number}.txt").write_text(f"def f(x):\n    return x + {number}\n" * 20)
    tree = {
        "dataset": {"name": str(root / "t"), "max_length": 64, "validation_fraction": 0.2},
        "teacher": {"model": "tiny-python", "top_k": 8},
        "student": {"config": TINY},
        "training": {"max_steps": 1, "report_to": []},
    }
    (root / "r.yaml").write_text(json.dumps(tree))
    (root / "latin.jsonl").write_bytes(json.dumps({"text": "x"}).encode() + b'\n{"text": "\xe4\xf6\xfc\xdf\xe9\xe8"}\n')
    for name, text in {
        "key.yaml": "datset: {name: stdlib}", "inner.yaml": "training: {max_step: 3}",
        "type.yaml": "training: {max_steps: many}",
        "cut.yaml": "a: [1\nb", "twice.yaml": "seed: 1\nseed: 2", "list.yaml": "- a", "blank.txt": "", "file": "x",
        "section.yaml": "loss: 0.5",
    }.items():  # fmt: skip
        (root / name).write_text(text)
    (root / "latin.txt").write_bytes("Ä é ö ü ß ".encode("latin-1") * 500)
    (root / "bytes.txt").write_bytes(bytes(range(128, 256)) * 50)
    (root / "empty").mkdir()
    save_model(tiny_model(max_position_embeddings=32), root / "short")
    unheard = save_model(tiny_model(), root / "unheard") / "config.json"
    unheard.write_text(json.dumps({**json.loads(unheard.read_text()), "model_type": "unheard_of"}))
    train_tokenizer(load_recipe(root / "r.yaml").dataset, 300, root / "other")
    return root


TABLE = [
    ("run key.yaml", "unknown key datset; did you mean dataset?"),
    ("run inner.yaml", "unknown key training.max_step; did you mean training.max_steps?"),
    ("run r.yaml --max-stps 3", "unknown flag --max-stps; did you mean --max-steps?"),
    ("run r.yaml --loss.alhpa 1", "unknown flag --loss.alhpa; did you mean --loss.alpha?"),
    ("trian r.yaml", "did you mean `limbeck train`?"),
    ("teacher cahe r.yaml", "did you mean `limbeck teacher cache`?"),
    ("run type.yaml", "training.max_steps must be -1 or a whole number (found 'many')"),
    ("run section.yaml", "loss must be a section, with keys and values (found 0.5)"),
    ("run r.yaml --max-steps many", "--max-steps (training.max_steps) must be -1 or a whole number (found 'many')"),
    ("run r.yaml --bf16 perhaps", "--bf16 (training.bf16) must be true or false or auto (found 'perhaps')"),
    ("run r.yaml --dataset /nowhere/texts.txt", "/nowhere/texts.txt, which does not exist"),
    ("run r.yaml --dataset mytexts", "is neither a file or folder here nor reachable on the hub"),
    ("run r.yaml --dataset empty", "no .txt, .md, .jsonl, .parquet files found in empty"),
    ("run r.yaml --dataset blank.txt", "gave no training rows"),
    ("run r.yaml --dataset bytes.txt", "bytes.txt is no UTF-8 text: 100% of its beginning cannot be read. Convert it"),
    ("data pack r.yaml --dataset latin.txt --output packed", "latin.txt is no UTF-8 text"),
    ("run r.yaml --dataset latin.jsonl", "latin.jsonl line 2 is no UTF-8 text: "),
    (
        "run r.yaml --tokenizer other",
        "teacher tiny-python has the tokenizer tiny-python and the data has other, which is",
    ),
    ("run r.yaml --student-model unheard", "the config of student 'unheard' cannot be read: "),
    (
        "run r.yaml --student-model short --student.config.model_type gpt2 --seq-len 16",
        "and short holds a llama. Leave",
    ),
    ("run r.yaml --warmup-steps 5", "training.warmup_steps is 5 and the run has 1 steps"),
    ("run r.yaml --student.ternary.group_size 48", "group_size is 48 and a ternary weight has rows of 32"),
    ("run r.yaml --pipeline.export packed", "pipeline.export has packed, which cannot be: the student has no ternary"),
    ("runs nowhere", "nowhere is no folder. Name one that holds runs: `limbeck runs outputs`."),
    ("runs t", "t holds no runs. Name a folder that does: `limbeck runs outputs`."),
    ("run r.yaml --tokenizer empty", "empty has no tokenizer.json. Name a model's folder, or a hub id."),
    ("run r.yaml --teacher-model t", "t has no tokenizer.json. Name a model's folder, or a hub id."),
    ("run r.yaml --seq-len 4096", "has a context of 2048 tokens. Set --seq-len 2048"),
    ("run r.yaml --student-model short", "the student short has a context of 32 tokens. Set --seq-len 32"),
    ("run r.yaml --device cuda", "torch sees no GPU here. Use cpu, or leave it unset."),
    ("run r.yaml --device gpu", "--device (training.device) must be one of cpu, cuda (found 'gpu')"),
    ("run r.yaml --fp16", "training.fp16 is true and the device is a CPU"),
    ("run r.yaml --alpha 1.5", "--alpha (loss.alpha) must be at most 1 (found 1.5)"),
    ("run r.yaml --temperature 0", "--temperature (loss.temperature) must be larger than 0 (found 0)"),
    ("run r.yaml --lr -1", "--lr (training.learning_rate) must be larger than 0 (found -1)"),
    ("run r.yaml --seed -1", "seed must be at least 0 (found -1)"),
    ("run cut.yaml", "cut.yaml is not valid YAML: expected ',' or ']'"),
    ("run twice.yaml", "the key 'seed' stands twice (line 2); remove one"),
    ("run list.yaml", "holds a list; it must be a mapping of sections"),
    ("run r.yaml --teacher-model nobody/nothing --tokenizer tiny-python", "is no folder here, and the hub cannot be"),
    ("run r.yaml --student-model nobody/nothing", "is no folder here, and the hub cannot be reached"),
    ("train empty", "is a folder and no run's (no recipe.yaml in it). Name a recipe, or a run."),
    ("data pack r.yaml --output t", "is not empty and was not written by `limbeck data pack`"),
    ("run r.yaml --output-dir file", "file cannot be made: file is a file. Choose another output_dir."),
    ("run r.yaml --output-dir file/below", "file/below cannot be made: file is a file. Choose another output_dir."),
    (
        "data pack r.yaml --output file/below",
        "file/below cannot be made: file is a file. Choose another output folder.",
    ),
    ("config show --name a/b", "a run's name has letters, digits, `_`, `-` and dots"),
    ("run r.yaml --teacher-endpoint localhost:8000", "is no URL; write http://HOST:PORT or https://HOST"),
    ("run r.yaml --teacher-endpoint http://127.0.0.1:1", "Failed to connect to teacher endpoint: http://127.0.0.1:1"),
    ("train r.yaml --resume-from empty", "which is no whole checkpoint and holds none. Name a step_N folder"),
    ("export empty", "empty holds no finished model"),
    ("eval r.yaml", "Run `limbeck train` to make or continue it."),
    ("run nope.yaml", "recipe nope.yaml does not exist. Give the path of a YAML file."),
    ("run", "needs a recipe: `limbeck run recipes/quickstart.yaml`"),
    ("config show --student.ternary.group_size x", "must be a whole number or one of row, tensor (found 'x')"),
]


@pytest.mark.parametrize(("words", "told"), TABLE, ids=[words for words, _ in TABLE])
def test_a_mistake_is_one_line_that_says_what_to_do(ground, words, told, monkeypatch):
    monkeypatch.chdir(ground)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = main(words.split())
    errors = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    assert code in (1, 2)
    assert len(errors) == 1
    assert told in errors[0]
    assert stderr.getvalue().splitlines()[-1] == errors[0], "the error is the last line, and one line"
    assert "Traceback" not in stderr.getvalue()


@pytest.mark.parametrize(("flag", "told"), [
    ("--dataset", "is neither a file or folder here nor reachable on the hub: the hub cannot be reached"),
    ("--teacher-model", "is no folder here, and the hub cannot be reached"),
    pytest.param("--student-model", "is no folder here, and the hub cannot be reached", marks=pytest.mark.slow),
    pytest.param("--tokenizer", "is no folder here, and the hub cannot be reached", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_name_that_is_not_here_without_a_network_is_one_line(ground, flag, told):
    """Nothing is told to be offline: the hub's address is one where nobody listens."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = limbeck("run", "r.yaml", flag, "someone/texts", cwd=ground, env=env, check=False)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if told in line] == [done.stderr.splitlines()[-1]]
    assert "Traceback" not in done.stderr


def test_spaces_accents_and_a_run_named_with_letters_work(ground, tmp_path):
    folder = tmp_path / "meine Texte é"
    folder.mkdir()
    (folder / "t ü.txt").write_text("hello world " * 500)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert main(["data", "pack", "--input", str(folder), "--output", str(tmp_path / "ö ß"),
                     "--tokenizer", "tiny-python"]) == 0  # fmt: skip
    assert (tmp_path / "ö ß" / "manifest.json").is_file()
    assert load_recipe(None, {"name": "Prüfung_1"}).root.name == "Prüfung_1"


def test_a_stray_byte_is_no_other_encoding(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"plain words " * 100 + b"\xff" + b" and more" * 100)
    assert "\ufffd" in Document("t", tmp_path / "t.txt").text


def test_a_model_named_by_a_flag_replaces_the_architecture_of_the_recipe(ground):
    found = load_recipe(ground / "r.yaml", {"student": {"model": "tiny-python"}})
    assert (found.student.model, found.student.config) == ("tiny-python", {})
    kept = load_recipe(ground / "r.yaml", {"student": {"model": "x", "config": {"rope_theta": 5.0}}})
    assert kept.student.config["rope_theta"] == 5.0


def test_a_model_that_sees_the_future_is_refused(ground):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 99,
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    def bert(**more):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes, **more))

    with pytest.raises(ConfigError, match=r"the student \(BertLMHeadModel\) sees the tokens that it is to predict"):
        require_causal(bert(), "student")
    require_causal(bert(is_decoder=True), "student")
    require_causal(load_causal_lm("tiny-python", dtype="float32"), "teacher")
    for kind in ("mamba", "qwen3_next", "gpt2"):
        more = {"state_size": 8, "intermediate_size": 64} if kind == "mamba" else {}
        require_causal(tiny_model(model_type=kind, **more), "student")
