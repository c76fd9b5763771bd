"""rayjobs -> cad_models/<room> -> cad_models/common, never back, never room to room."""

import ast
import subprocess
import sys

import pytest

from tests.shared import REPOSITORY

PACKAGE = REPOSITORY / "cad_models"
NOT_ROOMS = {"common"}
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists() and p.name not in NOT_ROOMS)
# What a room's contracts are made of; the rest of cad_models/*.py knows the rooms.
SHARED_MODULES = {"config", "task", "learner", "sources", "dataset", "common"}


def imported(path, *, run_time_only: bool = True) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it; those under ``if TYPE_CHECKING`` do not count."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if run_time_only and id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def first_two(names: set[str]) -> set[str]:
    """Names below cad_models: room or module."""
    return {name.split(".")[1] for name in names if name.startswith("cad_models.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_cad_models_imports_only_what_its_layer_may(path):
    names = imported(path, run_time_only=False)
    tops = {name.split(".")[0] for name in names}
    assert not tops & {"ray", "mlflow", "rayjobs", "tests", "benchmarks"}
    inner = first_two(imported(path))
    place = path.relative_to(PACKAGE).parts[0]
    if place == "common":
        assert inner <= {"common"}
    elif place in ROOMS:
        assert inner <= SHARED_MODULES | {place}
    elif place != "tasks.py":
        assert not inner & set(ROOMS)


def test_rooms_are_found():
    assert "alignment" in ROOMS


def test_common_stands_on_no_private_name_of_a_room():
    """The words of a room's contracts are not in common either."""
    for path in sorted((PACKAGE / "common").rglob("*.py")):
        assert "TASKS" not in path.read_text(), path


@pytest.mark.parametrize(
    "module", ["cad_models.tasks", "cad_models.dataset", "cad_models.splits", "cad_models.order", "rayjobs.cli", "rayjobs.resources"]
)
def test_light_modules_load_no_heavy_library(module):
    code = f"import {module}, sys; heavy = {{'torch', 'ray', 'mlflow', 'trimesh', 'numba', 'timm', 'scipy'}} & set(sys.modules); assert not heavy, heavy"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
