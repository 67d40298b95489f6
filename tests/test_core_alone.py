"""The core without the methods' files: Coconut trains, restarts, is evaluated, and equals its plain definition."""

import shutil

import conftest
import pytest
from conftest import ROOT

FOLDERS = ["model", "preprocessing", "tests", "tools", "trainer"]
# tests of other thoughts than `last`
OTHERS = "every_thought or scaled_embeddings or layers_are or learned_thought or pause or normalised or suppressed"


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A copy of the program whose methods/ holds only the protocol."""
    folder = tmp_path_factory.mktemp("core")
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "methods").mkdir()
    shutil.copy(ROOT / "methods" / "__init__.py", folder / "methods")
    return folder


def python(core, *arguments: str) -> str:
    """Runs a program in the copy, which must exit with 0, and returns its output."""
    done = conftest.python(*arguments, cwd=core, environment={"PYTHONPATH": str(core)})
    return done.stdout + done.stderr


@pytest.mark.slow
def test_plain_coconut_trains_restarts_and_is_evaluated(core, place, tmp_path):
    python(core, "-c", "import methods; assert methods.names() == tuple(methods.CORE)")
    keys = (place / "run.yaml", f"save_path={tmp_path}", "max_train_examples=16", "max_new_tokens=2")
    python(core, "run.py", *keys, "num_epochs=2")
    assert "checkpoint_2, after 2 of 3 epochs" in python(core, "run.py", *keys)
    assert [record["stage"] for record in conftest.epochs(tmp_path / "run")] == [0, 1, 2]
    python(core, "run.py", *keys, "only_eval=true", f"load_model_path={tmp_path / 'run'}", "name=evaluated")
    assert conftest.read_json(tmp_path / "evaluated" / "eval" / "metrics.json")["stage"] == 2
    assert "accuracy" in python(core, "-m", "tools.evaluate", tmp_path / "run")
    python(core, "-m", "tools.generate", tmp_path / "run", "1+1=")


@pytest.mark.slow
def test_the_tests_of_coconut_pass(core):
    selected = ["-k", f"not ({OTHERS})", "-m", "not slow", "-p", "no:cacheprovider"]
    assert " passed" in python(core, "-m", "pytest", "tests/test_coconut.py", *selected, "-o", "addopts=")
