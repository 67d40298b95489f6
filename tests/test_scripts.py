"""Every script answers --help, and a mistake on its command line, before the imports that take seconds."""

import subprocess

import pytest
from conftest import ROOT, python

OF_A_TEST = "peak.py"  # not a command
FOLDERS = [
    ROOT,
    *(ROOT / name for name in ("analysis", "benchmarks", "experiments", "preprocessing", "tests", "tools")),
]
SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in sorted(folder.glob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8") and path.name != OF_A_TEST
]


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> dict[str, str]:
    """An environment in which importing torch, transformers or matplotlib fails."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("torch", "transformers", "matplotlib"):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    return {"PYTHONPATH": str(folder)}


def start(script: str, environment: dict[str, str], *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    words = [script]
    if script.startswith(("tools/", "analysis/")):
        words = ["-m", script.removesuffix(".py").removesuffix("/__main__").replace("/", ".")]
    return python(*words, *arguments, environment=environment, code=code)


def test_the_scripts_are_found():
    names = {"run", *(f"tools/{name}" for name in ("evaluate", "generate", "export", "show_data", "report"))}
    assert {f"{name}.py" for name in names | {"benchmarks/step", "preprocessing/prosqa", "tests/torture"}} <= {*SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_wait_for_torch(script, without_torch):
    """tiny_model.py and most benchmarks took six to nine seconds."""
    done = start(script, without_torch, "--help")
    name = script.rpartition("/")[2].replace("__main__.py", "python -m analysis")
    assert (f"python -m tools.{name.removesuffix('.py')}" if script.startswith("tools/") else name) in done.stdout
    assert "usage: " in done.stdout


MISTAKES = [
    *((script, "--no-such-option") for script in SCRIPTS),
    ("preprocessing/tiny_model.py", "a.json", "--out", "b", "--width", "10", "--heads", "4"),
    ("preprocessing/tiny_model.py", "no_such_file.json", "--out", "b"),
    ("preprocessing/prosqa.py", "--nodes", "3"),
    ("preprocessing/arithmetic.py", "--train", "0"),
    ("preprocessing/prontoqa_generate.py", "--seed", "-1"),
    ("tools/report.py", "no_such_run"),
    ("analysis/__main__.py", "no_such_run", "--data", "no_such_file.json", "--out", "no_such_folder"),
    ("analysis/__main__.py", "a/b", "--data", "no_such_file.json", "--out", "no_such_folder"),
    ("analysis/__main__.py", "a/b", "--data", "no_such_file.json", "--out", "no_such_folder", "--page"),
    ("experiments/breadth_thoughts.py", "no_such_run", "--data", "data"),
    ("experiments/flops.py", "no_such_grid.yaml"),
    ("benchmarks/step.py", "--repeats", "0"),
    ("benchmarks/thoughts.py", "--only", "no_such_thought"),
]


@pytest.mark.parametrize("command", MISTAKES, ids=" ".join)
def test_errors_do_not_wait_for_torch(command, without_torch):
    script, *arguments = command
    done = start(script, without_torch, *arguments, code=2)
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
