"""README.md and docs/: length, generated blocks, and whether the files, commands and links they name exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from config import Config
from tools import docs
from utils import UserError

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md", ROOT / "results" / "README.md"]
CORE = ["run.py", "curriculum.py", "dataset.py", "coconut.py", "utils.py"]
MADE = ("checkpoints/", "data/", "exported/", "pages/", "tasks/", "save_path/", "results/mine")  # commands make them
EXAMPLES = {"methods/gated.py", "methods/noisy.py"}  # files that docs/contributing.md shows
EXAMPLE_KEYS = ("thought=gated", "method=noisy", "noise=")
EXTERNAL = {"pdb", "pip", "pytest", "venv"}  # modules of `python -m` from other packages


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[list[str]]:
    """Returns the words of each command in code blocks and inline code; a backslash continues a line."""
    blocks = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^ {4}(?:\$ )?(\S.*)$", blocks, re.MULTILINE) + re.findall(r"`([^`\n]+)`", blocks)
    split = [part for line in lines for part in line.split(" && ")]
    starts = ("python ", "torchrun ", "bash ", "sbatch ", "make ", "uv run ")
    return [shlex.split(line, comments=True) for line in split if line.startswith(starts)]


def problems_of(words: list[str]) -> list[str]:
    """Returns the files, modules, make targets, variables of make and keys of a command that do not exist."""
    if words[0] == "make":
        known = re.findall(r"^([\w-]+)(?::| =)", read(ROOT / "Makefile"), re.MULTILINE)
        return [f"make {word}" for word in words[1:] if word.partition("=")[0] not in known]
    files = r"[\w/]+\.(py|bash|sh)|slurm/\w+\.sbatch|(args|experiments)/[a-z]\w*\.yaml"  # NAME.yaml is any of them
    missing = [word for word in words if re.fullmatch(files, word) and not (ROOT / word).exists()]
    if "-m" in words[:3]:
        module = words[words.index("-m") + 1]
        path = ROOT / module.replace(".", "/")
        if module not in EXTERNAL and not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            missing.append(module)
    for file in [word for word in words if re.fullmatch(r"args/[a-z]\w*\.yaml", word) and not missing]:
        overrides = [word for word in words if re.match(r"\w+=", word) and not word.startswith(EXAMPLE_KEYS)]
        try:
            Config.from_file(ROOT / file, overrides, needs_files=False)
        except UserError as error:
            missing += [] if "set row=NAME" in str(error) else [str(error)]  # a documented file without its row
    return missing


def test_readme_is_short_and_names_the_core_files_and_all_pages():
    assert set(re.findall(r"\]\(docs/(\w+\.md)\)", read(README))) == {
        path.name for path in (ROOT / "docs").glob("*.md")
    }
    lines = read(README).splitlines()
    assert len(lines) <= 200
    assert any("torchrun" in line and "run.py args/" in line for line in lines[:24])
    listed = re.findall(r"^\| \[`([\w.]+)`\]\(\1\) \| (\d+) \|", read(README), re.MULTILINE)
    assert [file for file, _ in listed] == CORE
    assert sum(int(count) for _, count in listed) <= 1300


@pytest.mark.parametrize("path", docs.PAGES, ids=name_of)
def test_counts_and_generated_blocks_are_up_to_date(path):
    """`python -m tools.docs` updates them: line counts, the quickstart's table, the keys of Config."""
    assert read(path) == docs.updated(path)


def anchors(path: Path) -> list[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read(path), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_links_and_paths_exist(path):
    text = read(path)
    assert [problem for words in commands(text) for problem in problems_of(words)] == []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not target.startswith(("http://", "https://")):
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target
    for target in re.findall(r"`([\w.-]+/[\w./-]+\.\w+)`", text):
        assert (ROOT / target).exists() or target.startswith(MADE) or target in EXAMPLES or "/NAME." in target, target


def test_functions_that_readme_and_docs_name_exist():
    """In README's table 'where is ...', and the tests that pages name."""
    rows = re.findall(r"^\| [\w' ]+\? \| (.+?) \| (.+?) \|$", read(README), re.MULTILINE)
    rows = [(re.findall(r"`([\w/]+\.py)`", files), re.findall(r"`([\w.]+)`", names)) for files, names in rows]
    rows = [(files, [name for name in names if not name.endswith(".py")]) for files, names in rows if files]
    assert len(rows) == 5
    for files, names in rows:
        named = set().union(*(defined(ROOT / file) for file in [*files, "run.py"]))
        assert set(names) <= named, (files, set(names) - named)
    tests = set().union(*(defined(path) for path in (ROOT / "tests").glob("test_*.py")))
    for path in PAGES:
        assert set(re.findall(r"`(test_\w+)`", read(path))) <= tests | {"test_path"}  # a key


def defined(path: Path) -> set[str]:
    """Returns the names of a module's functions and classes, and of methods as Class.method."""
    names = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return names


def test_the_harness_recipe_fits_the_quickstarts_model():
    """lm-evaluation-harness rejects more new tokens than the model has positions."""
    (recipe,) = re.findall(r"```yaml\n(.*?)```", read(ROOT / "docs" / "export.md"), re.DOTALL)
    longest = yaml.safe_load(read(ROOT / "args" / "machine_fixed.yaml"))["max_new_tokens"]
    assert yaml.safe_load(recipe)["generation_kwargs"]["max_gen_toks"] == longest < 64
