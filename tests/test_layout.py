"""The layers of the program: which may import which, and what must not wait for torch."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# from the ground up: what stands in a line imports what stands in earlier lines, or beside it, and nothing else
LAYERS = [
    ["utils"],
    ["trainer.logger", "trainer.run_folder", "methods"],
    ["config"],
    ["curriculum", "trainer.distributed"],
    ["preprocessing"],
    ["dataset", "model"],
    ["coconut"],
    ["methods.", "trainer"],  # the files of methods/; its __init__.py is below
    ["run", "tools", "analysis", "experiments", "benchmarks"],
]
LAZY = {"methods.parallel_latents", "trainer", "trainer.inference"}  # imported inside functions of coconut.py
FILES = [path for pattern in ("*.py", "*/*.py") for path in sorted(ROOT.glob(pattern)) if path.parent.name != "tests"]


def module_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def layer_of(module: str) -> int | None:
    """None for what is no module of the program."""
    folder = module.partition(".")[0]
    spellings = [[module], [f"{folder}."], [folder] if folder != "methods" else []]
    found = [number for spelled in spellings for number, names in enumerate(LAYERS) if {*spelled} & {*names}]
    return next(iter(found), None)


def imported_by(path) -> set[str]:
    """The modules of the program that a file imports, wherever in its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names & MODULES


def test_the_root_shows_what_matters():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == {
        "run", "coconut", "curriculum", "dataset", "config", "utils"
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path):
    own = layer_of(module_of(path))
    assert own is not None
    above = {name for name in imported_by(path) if layer_of(name) > own}
    assert above <= (LAZY if module_of(path) == "coconut" else set())


def test_no_modules_import_each_other():
    """Nor in a longer circle."""
    arrows = {module_of(path): imported_by(path) - {module_of(path)} for path in FILES}
    arrows["coconut"] -= LAZY
    while leaves := [name for name, imported in arrows.items() if not imported & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert arrows == {}


QUICK = ["utils", "config", "curriculum", "preprocessing.examples", "dataset", "trainer.distributed", "tools.evaluate"]


@pytest.mark.parametrize("module", [*QUICK, "tools.report"])
def test_what_reads_configurations_and_data_does_not_wait_for_torch(module):
    code = f"import sys, {module}; print({{'torch', 'transformers', 'wandb', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
