"""The package reads top to bottom: imports run downwards only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "astropt_ds"
# Each room may import from those before it, and from its own.
FLOORS = (
    ("__version__", "errors", "files", "section"),
    ("extras", "ids"),
    ("table",),
    ("config_run",),
    ("config",),
    ("config_source",),
    ("flops", "tokens", "attention", "schedule", "zero"),
    ("layers", "memory", "gpus"),
    ("plan",),
    ("planner",),
    ("blocks", "optim"),
    ("model",),
    ("model_folder",),
    ("data",),
    ("ingest",),
    ("training",),
    ("convert",),
    ("embedding",),
    ("evaluation",),
    ("train", "benchmark", "accounting"),
)


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards_only(path):
    height = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    here = room(path)
    for module in imported(path):
        assert module.partition(".")[0] != "tools", f"{path} imports a command line"
        if module.startswith("astropt_ds."):
            there = module.split(".")[1]
            below = height[there] < height[here] or there == here
            assert below, f"{here} imports {there}, which is not below it"


def test_data_knows_nothing_of_the_model():
    for path in (PACKAGE / "data").glob("*.py"):
        for module in imported(path):
            assert module.split(".")[:2] not in (["astropt_ds", "model"], ["astropt_ds", "layers"])


def test_only_the_engine_imports_deepspeed():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(module.split(".")[0] == "deepspeed" for module in imported(path))
    }
    assert importers == {"training/engine.py"}
