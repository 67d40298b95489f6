"""What exported models write in a fresh interpreter, in another folder, with none of this code on its path."""

import json
import subprocess
from pathlib import Path

from conftest import python

PROGRAM = """
import json, sys
from importlib.util import find_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

assert find_spec("coconut") is None
folders, questions, new = map(json.loads, sys.argv[1:])
found = {}
for name, folder in folders.items():
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(questions, padding=True, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    rows = model.generate(**batch, max_new_tokens=new)
    assert rows[:, :width].equal(batch["input_ids"])
    singles = []
    for question in questions[:2]:
        single = tokenizer(question, return_tensors="pt")
        row = model.generate(**single, max_new_tokens=new)[0]
        singles.append(row[single["input_ids"].shape[1] :].tolist())
    found[name] = {"batch": rows[:, width:].tolist(), "singles": singles, "dtype": str(model.dtype)}
print(json.dumps(found))
"""


def written_elsewhere(folders: dict[str, Path], questions: list[str], new: int, place: Path) -> dict[str, dict]:
    """By folder, run in `place`: at most `new` tokens after each question, in a batch and alone (the first two)."""
    arguments = map(json.dumps, [{name: str(path) for name, path in folders.items()}, questions, new])
    environment = {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    done = python("-I", "-c", PROGRAM, *arguments, cwd=place, environment=environment, stdin=subprocess.DEVNULL)
    return json.loads(done.stdout)
