"""The shape of the source: names that stand once, files and functions that stay small, and one list of each kind."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "limbeck"
#: Functions that are one formula, written out.
FORMULAS = {"fused_distillation_loss"}


def modules():
    return [(path, ast.parse(path.read_text())) for path in SOURCE.rglob("*.py")]


def test_two_functions_or_classes_never_share_a_name():
    places = defaultdict(list)
    for path, tree in modules():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                places[node.name].append(str(path.relative_to(SOURCE)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_files_and_functions_stay_small():
    for path, tree in modules():
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in FORMULAS:
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize(
    "room", ["losses", "targets", "optim", "models", "students", "evaluation/fidelity.py", "export"]
)
def test_rooms_that_know_a_section_do_not_take_the_recipe(room):
    paths = [SOURCE / room] if room.endswith(".py") else list((SOURCE / room).rglob("*.py"))
    assert paths
    for path in paths:
        assert "Recipe" not in path.read_text(), path
