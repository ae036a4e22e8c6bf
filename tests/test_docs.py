"""The documents tell the truth: examples run, recipes load, links and commands exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck.cli.table import SUBCOMMANDS, SWITCHES
from limbeck.config.moved import EARLIER
from limbeck.recipe import ALIASES, keys, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path):
    whole = load_recipe(path)
    assert whole.name == path.stem
    if whole.tiny:
        assert load_recipe(path, tiny=True).name == f"{path.stem}-tiny"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_its_configurations(path):
    """Parsed by accelerate's own loader, which refuses keys it does not know; ranks add up."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    assert f"recipes/accelerate/{path.name}" in (ROOT / "docs" / "scaling.md").read_text()
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def test_the_python_api_page_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python-api.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"CE \d+\.\d+, KL \d+\.\d+", done.stdout)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_flags_exist(page):
    known = {
        *dict(keys()),
        *(alias.replace("-", "_") for alias in ALIASES),
        "config",
        "help",
        *(name.replace("-", "_") for name in SWITCHES),
        *EARLIER,
    }
    for sub in SUBCOMMANDS.values():
        known |= {name.replace("-", "_") for name in (*sub.switches, *sub.aliases)}
    lines = [line for line in page.read_text().splitlines() if re.match(r"\s*(limbeck |torchrun .*-m limbeck )", line)]
    for line in lines:
        words = line.partition("#")[0].split()
        words = words[words.index("limbeck") + 1 :]
        if words[0] == "COMMAND":
            continue
        assert words[0] in SUBCOMMANDS or " ".join(words[:2]) in SUBCOMMANDS, line
        for flag in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
            assert flag.replace("-", "_") in known, f"{page.name}: --{flag}"


def test_the_readme_tells_the_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert f"\n{target}:" in makefile


def test_the_shipped_teacher_is_small_and_whole():
    folder = ROOT / "src" / "limbeck" / "assets" / "tiny-python"
    config = json.loads((folder / "config.json").read_text())
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 16 << 20
    quickstart = load_recipe(ROOT / "recipes" / "quickstart.yaml").student.config
    for width in ("hidden_size", "intermediate_size"):
        assert config[width] % 256 == 0
        assert quickstart[width] % 256 == 0
