"""The rooms of the house: which may import which, and what must not wait for torch."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# from the ground up: a room may import what stands before it, and nothing else of the house
ROOMS = [
    *("modeling_coconut", "tracker", "utils", "load_path", "config_files"),
    *("config_checks", "config", "ranks", "curriculum", "examples", "tokens", "dataset"),
    *("padding", "thoughts", "lora", "kv_cache", "latent_block", "coconut"),
    *("sim_cot", "lotus", "codi", "multi_mode", "methods"),
    *("families", "pretrained", "parallel", "trainer_state", "checkpoint"),
    *("table", "card", "evaluate", "throughput", "trained", "show_data", "generate", "export", "report"),
    *("prepare", "run"),
]


def imported_by(room: str) -> set[str]:
    """The rooms that a room imports, wherever in its code."""
    tree = ast.parse((ROOT / f"{room}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names & set(ROOMS)


def test_every_room_has_its_place():
    assert sorted(ROOMS) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    later = ROOMS[ROOMS.index(room) :]
    assert not imported_by(room) & set(later)


@pytest.mark.parametrize("room", ["utils", "config", "curriculum", "examples", "dataset", "ranks", "table", "report"])
def test_what_reads_configurations_and_data_does_not_wait_for_torch(room):
    code = f"import sys, {room}; print({{'torch', 'transformers', 'wandb', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_readme_draws_every_room():
    house = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The house\n")[2].partition("\n## ")[0]
    for room in ROOMS:
        assert f" {room}.py " in house, room
