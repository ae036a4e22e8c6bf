"""docs/architectures.md says what its script finds: every cell is tried again, some in every run of the tests."""

import importlib.util
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
QUICK = ("gpt2", "mamba")
NAMED = ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "mistral", "gemma3_text", "phi3", "smollm3", "olmo2",
         "granite", "gpt2", "gpt_neox", "mamba", "gpt_oss")  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_architectures", DOCS / "make_architectures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_architectures"] = module
    spec.loader.exec_module(module)
    return module


def written(name: str) -> str:
    lines = (DOCS / "architectures.md").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"| {name} |"))


def test_the_page_has_every_architecture_and_no_traceback():
    for name in NAMED:
        assert written(name).count("|") == 6
        assert "Error" not in written(name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMED]
)
def test_a_row_is_what_comes_of_trying(script, name):
    assert script.row(name) == written(name)
