"""The package lists, the editor's launch configurations, and the files that docs/contributing.md shows."""

import json
import re
import tomllib

import pytest
import torch
from conftest import ROOT, equal, python, weights
from safetensors.torch import load_file

from utils import under_debugger

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def test_pip_and_uv_install_the_same():
    assert PROJECT["project"]["dependencies"] == pins("requirements.txt")
    assert PROJECT["dependency-groups"]["dev"] == pins("requirements-dev.txt")
    assert all("==" in pin for pin in pins("requirements.txt") + pins("requirements-dev.txt"))


PACKAGES = ("methods", "model", "preprocessing", "tools", "trainer")


@pytest.mark.parametrize("kind", ["run", "eval", "generate", "tests"])
def test_the_editor_can_launch(kind):
    launch = json.loads((ROOT / ".vscode" / "launch.json").read_text(encoding="utf-8"))
    (found,) = [entry for entry in launch["configurations"] if entry["name"].startswith(f"{kind}: ")]
    assert "torchrun" not in json.dumps(found)  # breakpoints work in one process only
    if "module" in found:
        assert found["module"] == {"tests": "pytest", "generate": "tools.generate"}[kind]
        return
    assert (ROOT / found["program"].removeprefix("${workspaceFolder}/")).is_file()
    assert (ROOT / found["args"][0]).is_file()


def add_documented_file(section: str, place, tmp_path) -> list[str]:
    """Writes the file in a section of docs/contributing.md into a copy of the program; returns the overrides for it."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    text = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    (file,), (code,) = re.findall(r"`(methods/\w+\.py)`:\n", text), re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for path in [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).glob("*.py"))]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / file).write_text(code, encoding="utf-8")
    keys = "save_path: checkpoints\nnum_epochs: 2\nmax_new_tokens: 2\nmax_train_examples: 16\n"
    (tmp_path / "own.yaml").write_text(f"extends: {place / 'run.yaml'}\n{keys}")
    (command,) = re.findall(r"`python run.py args/quickstart.yaml (.+?)`", text)
    return command.split()


@pytest.mark.slow
def test_the_documented_thought_trains_and_is_exported(place, tmp_path):
    """With one new file and no other edit. The Python examples of the docs run with the model."""
    overrides = add_documented_file("Adding a thought", place, tmp_path)
    python("run.py", "own.yaml", *overrides, cwd=tmp_path)
    gate = load_file(tmp_path / "checkpoints" / "own" / "checkpoint_2" / "thought.safetensors")["gate"]
    assert gate.shape == (32,)
    assert not torch.equal(gate, torch.ones(32))
    python("-m", "tools.export", "checkpoints/own", "exported", cwd=tmp_path)
    assert any("class Gated" in path.read_text(encoding="utf-8") for path in (tmp_path / "exported").glob("*.py"))
    blocks = []
    for page in ("README.md", "docs/export.md", "docs/evaluation.md"):
        blocks += re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4  # each prints answers
    for block in {re.sub(r"checkpoints/[\w/-]+", "checkpoints/own", block) for block in blocks}:
        code = re.sub(r'"(HgdaJO|McgIF|What [^"]*)"', '"1+2"', block.replace("exported/breadth", "exported"))
        python("-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_the_documented_method_trains_and_continues(place, tmp_path):
    """With one new file and no other edit; its key changes the weights."""
    overrides = add_documented_file("Adding a method", place, tmp_path)
    found = []
    for name, more in (("plain", ["method=coconut"]), ("own", overrides)):
        python("run.py", "own.yaml", f"name={name}", *more, cwd=tmp_path)
        found.append(weights(tmp_path / "checkpoints" / name / "checkpoint_2"))
    assert not equal(*found)
    python("run.py", "own.yaml", "name=own", *overrides, "num_epochs=3", cwd=tmp_path)
    assert (tmp_path / "checkpoints" / "own" / "checkpoint_3").is_dir()


@pytest.mark.parametrize(("options", "wanted"), [("-m cProfile", "function calls"), ("-i", "prompt")])
def test_a_profiler_and_a_prompt_come_after_the_program(tmp_path, options, wanted):
    """The program ended itself before them."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n")
    script.write_text(script.read_text() + "from trainer.distributed import run_main\nrun_main(lambda: 0)\n")
    done = python(*options.split(), script, input="print('prompt')\n")
    assert wanted in done.stdout


@pytest.mark.slow
def test_breakpoints_in_the_dataset_stop(place, tmp_path):
    """In a thread they would not."""
    assert not under_debugger()
    commands = "import dataset\nbreak dataset.StageDataset.__getitem__\ncontinue\n"
    commands += "p 'stopped', type(self).__name__\nquit\n"
    # `python -m pdb run.py`, without tracing the slow imports
    debug = "import sys, torch, transformers, pdb; from torch.distributed import checkpoint; pdb.main()"
    arguments = (ROOT / "run.py", place / "run.yaml", f"save_path={tmp_path}", "num_workers=2")
    done = python("-c", debug, *arguments, input=commands)
    assert "('stopped', 'StageDataset')" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
