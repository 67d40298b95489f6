"""The layers of the program, their import direction, and the modules that must not import torch."""

import ast

import pytest
from conftest import ROOT, python

# a module imports only modules of its own line or of earlier lines
LAYERS = [
    ["utils"],
    [
        "methods",
        "trainer.commands",
        "trainer.files",
        "trainer.logger",
        "trainer.run_folder",
    ],  # methods: the protocol alone
    ["config"],
    ["curriculum", "trainer.distributed"],
    ["preprocessing.*"],
    ["dataset"],
    ["model.*"],
    ["coconut", "definition"],
    ["methods.*", "trainer.*"],
    ["run", "tools.*", "analysis.*", "experiments.*", "benchmarks.*"],
]
LAZY = {("coconut", "trainer.inference")}  # Coconut.from_pretrained and ask, imported where they are called
FILES = [path for pattern in ("*.py", "*/*.py") for path in sorted(ROOT.glob(pattern)) if path.parent.name != "tests"]


def module_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def layer_of(module: str) -> int | None:
    """Returns the number of a module's layer, None for other packages."""
    for name in (module, f"{module.partition('.')[0]}.*"):
        if found := [number for number, names in enumerate(LAYERS) if name in names]:
            return found[0]
    return None


def imported_by(path) -> set[str]:
    """Returns the modules of the program that a file imports, at module level or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            names |= parts or {node.module}
    return names & MODULES


def test_the_root_shows_what_matters():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == {"run", "coconut", "curriculum", "dataset", "config", "utils", "definition"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path):
    module = module_of(path)
    assert layer_of(module) is not None
    above = {name for name in imported_by(path) if layer_of(name) > layer_of(module)}
    assert {(module, name) for name in above} <= LAZY


def test_imports_have_no_cycles():
    arrows = {module_of(path): imported_by(path) - {module_of(path)} for path in FILES}
    for module, name in LAZY:
        arrows[module].remove(name)
    while leaves := [name for name, imported in arrows.items() if not imported & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert arrows == {}


QUICK = ["utils", "config", "curriculum", "preprocessing.examples", "dataset", "trainer.distributed", "trainer.plan"]
QUICK += ["tools.evaluate", "tools.report", "tools.generate", "tools.export", "tools.show_data"]


@pytest.mark.parametrize("module", QUICK)
def test_modules_that_read_configurations_and_data_do_not_import_torch(module):
    code = f"import sys, {module}; print({{'torch', 'transformers', 'wandb', 'matplotlib'}} & set(sys.modules))"
    assert python("-c", code).stdout == "set()\n"
