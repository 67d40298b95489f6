"""What stands around the code: the two lists of packages, the editor's launch configurations, the docs' examples."""

import json
import re
import tomllib

import arithmetic
import pytest
import tiny_model
import torch
from conftest import ROOT, python
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
    assert "torchrun" not in json.dumps(found)  # one process, in which breakpoints work
    if "module" in found:
        assert found["module"] == {"tests": "pytest", "generate": "tools.generate"}[kind]
        return
    assert (ROOT / found["program"].removeprefix("${workspaceFolder}/")).is_file()
    assert (ROOT / found["args"][0]).is_file()


def added_as_written(section: str, tmp_path) -> list[str]:
    """Writes the files that a section of docs/contributing.md shows into a copy of the program; returns their names."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    text = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    (file,), (code,) = re.findall(r"`(methods/\w+\.py)`:\n", text), re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for path in [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).glob("*.py"))]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / file).write_text(code, encoding="utf-8")
    examples = arithmetic.make_splits({"train": 16}, base=5)["train"]
    (tmp_path / "data.json").write_text(json.dumps(examples))
    tiny_model.write_model([tmp_path / "data.json"], tmp_path / "tiny", "char", "llama", 32, 2, 2, 64)
    keys = {"epochs_per_stage": 1, "num_epochs": 2, "wandb": "disabled", "max_new_tokens": 2}
    keys |= {"model_id": "tiny", "train_path": "data.json", "val_path": "data.json"}
    (tmp_path / "own.yaml").write_text(json.dumps(keys))
    (command,) = re.findall(r"`python run.py args/quickstart.yaml (.+?)`", text)
    return command.split()


def run_copy(tmp_path, *words: str) -> None:
    python(*words, cwd=tmp_path)


@pytest.mark.slow
def test_a_new_thought_trains_and_is_exported_as_the_docs_have_it(tmp_path):
    """One new file, and nothing else edited. The Python examples of the docs run with the model."""
    overrides = added_as_written("Adding a thought", tmp_path)
    run_copy(tmp_path, "run.py", "own.yaml", *overrides)
    gate = load_file(tmp_path / "checkpoints" / "own" / "checkpoint_2" / "thought.safetensors")["gate"]
    assert gate.shape == (32,)
    assert not torch.equal(gate, torch.ones(32))
    run_copy(tmp_path, "-m", "tools.export", "checkpoints/own", "exported")
    assert any("class Gated" in path.read_text(encoding="utf-8") for path in (tmp_path / "exported").glob("*.py"))
    blocks = []
    for page in ("README.md", "docs/export.md", "docs/evaluation.md"):
        blocks += re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4  # each prints answers
    for block in {re.sub(r"checkpoints/[\w/-]+", "checkpoints/own", block) for block in blocks}:
        code = re.sub(r'"(Msnqw|Ass|What [^"]*)"', '"1+2"', block.replace("exported/machine", "exported"))
        run_copy(tmp_path, "-c", code)


@pytest.mark.slow
def test_a_new_method_trains_and_continues_as_the_docs_have_it(tmp_path):
    """One new file, and nothing else edited; its key is checked and changes the weights."""
    overrides = added_as_written("Adding a method", tmp_path)
    weights = []
    for name, more in (("plain", ["method=coconut"]), ("own", overrides)):
        run_copy(tmp_path, "run.py", "own.yaml", f"name={name}", *more)
        weights.append(load_file(tmp_path / "checkpoints" / name / "checkpoint_2" / "model.safetensors"))
    assert any(not torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    run_copy(tmp_path, "run.py", "own.yaml", "name=own", *overrides, "num_epochs=3")
    assert (tmp_path / "checkpoints" / "own" / "checkpoint_3").is_dir()


@pytest.mark.slow
def test_breakpoints_in_the_data_are_met(tmp_path):
    """A thread would never stop at them."""
    assert not under_debugger()
    examples = arithmetic.make_splits({"train": 16}, base=5)["train"]
    (tmp_path / "data.json").write_text(json.dumps(examples))
    tiny_model.write_model([tmp_path / "data.json"], tmp_path / "tiny", "char", "llama", 16, 1, 2, 64)
    keys = {"num_workers": 2, "num_epochs": 1, "max_new_tokens": 2, "save_path": str(tmp_path), "wandb": "disabled"}
    keys |= {"model_id": str(tmp_path / "tiny"), "train_path": str(tmp_path / "data.json")}
    (tmp_path / "run.yaml").write_text(json.dumps(keys | {"val_path": keys["train_path"]}))
    commands = (
        "import dataset\nbreak dataset.StageDataset.__getitem__\ncontinue\np 'stopped', type(self).__name__\nquit\n"
    )
    # `python -m pdb run.py`, but that the slow imports are not traced
    debug = "import sys, torch, transformers, pdb; from torch.distributed import checkpoint; pdb.main()"
    done = python("-c", debug, ROOT / "run.py", tmp_path / "run.yaml", input=commands)
    assert "('stopped', 'StageDataset')" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
