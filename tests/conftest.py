"""Small things to test on: a folder of text, a recipe over it, models of a few thousand weights."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models here are so small that a second thread only gets in the way; pytest-xdist uses the cores instead.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

TOKENIZER = str(Path(__file__).parents[1] / "src" / "limbeck" / "assets" / "tiny-python")
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def write_corpus(folder: Path, documents: int = 40, seed: int = 0) -> Path:
    """Deterministic text files of various lengths."""
    words = "def class return import self for in if else None True False x y value path list dict".split()
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        length = generator.randint(5, 120)
        text = " ".join(generator.choice(words) for _ in range(length))
        (folder / f"doc{number:03d}.txt").write_text(text + "\n")
    return folder


def long_corpus_and_teacher(root: Path, documents: int, repeats: int) -> tuple[Path, Path]:
    """Text and a teacher big enough that a stage takes a while and can be killed in the middle."""
    corpus = write_corpus(root / "text", documents=documents, seed=1)
    for path in corpus.iterdir():
        path.write_text(path.read_text() * repeats)
    return corpus, save_model(tiny_model(seed=7, hidden_size=64), root / "teacher")


def tiny_model(vocab_size: int = 4096, seed: int = 0, **changes):
    """A Llama of a few thousand weights beside its embedding, in float32 and eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**TINY, "vocab_size": vocab_size, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def peaked_model(seed: int):
    """A random model whose predictions differ clearly from uniform, and from those of another seed."""
    model = tiny_model(seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20.0)
    return model


def save_model(model, folder: Path) -> Path:
    """Save a model with the shipped tokenizer, as a user's folder would hold it."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A random teacher with peaked predictions, so that its targets differ from uniform."""
    return save_model(peaked_model(7), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def recipe_tree(corpus, teacher_folder, tmp_path) -> dict:
    """A small distillation recipe as a tree of keys."""
    return {
        "name": "small",
        "output_dir": str(tmp_path / "run"),
        "dataset": {"name": str(corpus), "max_length": 32, "validation_fraction": 0.2, "rows_per_shard": 16},
        "teacher": {"model": str(teacher_folder), "top_k": 16, "rows_per_shard": 16},
        "student": {"config": TINY},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 2,
            "report_to": [],
            "learning_rate": 1e-3,
        },
    }


@pytest.fixture
def recipe(recipe_tree):
    from limbeck.config import Recipe

    return Recipe.model_validate(recipe_tree)


@pytest.fixture
def recipe_file(recipe_tree, tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe_tree))  # JSON is YAML
    return path


@pytest.fixture
def packed(recipe):
    """The recipe's packed training rows."""
    from limbeck.data.dataset import PackedDataset
    from limbeck.data.pack import pack
    from limbeck.data.tokenizer import recipe_tokenizer

    pack(recipe.dataset, recipe_tokenizer(recipe), recipe.packed_dir)
    return PackedDataset(recipe.packed_dir)


def with_keys(recipe, **sections):
    """The recipe with other keys, as a user would write them."""
    from limbeck.config import Recipe
    from limbeck.config.base import merged
    from limbeck.config.moved import rewritten

    tree = merged(recipe.model_dump(exclude_unset=True), rewritten(sections))
    return Recipe.model_validate(tree)


def remote_identity(recipe):
    """Who answers at the recipe's endpoint."""
    from limbeck.data.tokenizer import recipe_tokenizer
    from limbeck.teachers.sources import RemoteSource

    return RemoteSource.of(recipe).memory.identity(recipe_tokenizer(recipe))


def limbeck(*arguments, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "limbeck", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **{"timeout": 300, **kwargs})
    if check:
        assert done.returncode == 0, done.stderr
    return done


def loss_request(labels, targets=None, *, num_items=None, student=None, **loss):
    """A request for the package's own objectives; the routers' losses are off unless asked for."""
    from limbeck.config import LossConfig
    from limbeck.losses.objective import Batch, Context, Objectives
    from limbeck.training.head import LossRequest

    config = LossConfig(**{"load_balance": 0.0, "router_aux": 0.0, **loss})
    return LossRequest(Batch(labels, targets, num_items), Objectives.of(Context(config, student)))


def rules(*pairs):
    """`parameter_lr_multipliers` from (pattern, factor) pairs."""
    from limbeck.config import LRMultiplier

    return [LRMultiplier(pattern=pattern, lr_multiplier=factor) for pattern, factor in pairs]


@contextlib.contextmanager
def stopped_after(saves: int):
    """The training inside ends, as by a kill, when it has saved so many checkpoints; afterwards all is as before."""
    from limbeck import DistillationTrainer

    original, count = DistillationTrainer._save_checkpoint, []

    def dies(self, model, trial):
        original(self, model, trial)
        count.append(1)
        if len(count) == saves:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "_save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            yield


def digest(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the files that match, by relative name."""
    from limbeck.storage import sha256_file

    found = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): sha256_file(path) for path in found}
