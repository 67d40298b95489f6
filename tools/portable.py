"""Writes the code of an exported folder: modeling_coconut.py, and thought.py with copies of the definitions of this
repository that it needs. Code of a thought is copied from the file that defines its class.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
MODELLING = "modeling_coconut.py"  # named as transformers names a model's file
THOUGHT = "thought.py"
HEAD = '''\
"""The thought `{name}` and what it needs, from the repository that trained the model."""

from __future__ import annotations

'''


def write_code(folder: Path, thought: type) -> None:
    """Writes both files for a thought's class. Raises UserError if its code cannot be copied."""
    file = ROOT / "tools" / MODELLING
    text, wanted = file.read_text(encoding="utf-8"), Definitions()
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.ImportFrom) and (source := _file_of(statement.module)):
            text = text.replace(f"from {statement.module} import", f"from .{Path(THOUGHT).stem} import")
            for alias in statement.names:
                wanted.add(source, alias.name)
    try:
        wanted.add(Path(inspect.getsourcefile(thought)), thought.__name__)
    except (TypeError, OSError, KeyError) as error:
        raise UserError(f"the thought {thought.__name__} cannot be exported, it has no source file: {error}") from None
    (folder / MODELLING).write_text(text, encoding="utf-8")
    (folder / THOUGHT).write_text(HEAD.format(name=thought.__name__) + wanted.text(), encoding="utf-8")


class Definitions:
    """Top-level definitions from several files, in the order of their dependencies, and their imports."""

    def __init__(self):
        self._imports: set[str] = set()
        self._sources: dict[tuple[Path, str], str] = {}
        self._files: dict[str, Path] = {}  # name -> the file that defines it

    def add(self, file: Path, name: str) -> None:
        """Adds a definition and, recursively, the definitions that it uses."""
        if (file, name) in self._sources:
            return
        node = _names(file)[name]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._add_imported(file, name, node)
            return
        if self._files.setdefault(name, file) != file:
            raise UserError(f"{file} and {self._files[name]} both define {name}, and an export needs both")
        self._sources[file, name] = ""  # ends the recursion of a definition that uses itself
        for part in ast.walk(node):
            if isinstance(part, (ast.Import, ast.ImportFrom)):
                raise UserError(f"{file}: {name} cannot be exported: it imports within a function")
            if isinstance(part, ast.Name) and part.id != name and part.id in _names(file):
                self.add(file, part.id)
        first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
        del self._sources[file, name]  # moves it behind the definitions that it uses
        lines = file.read_text(encoding="utf-8").splitlines()[first - 1 : node.end_lineno]
        self._sources[file, name] = "\n".join(lines)

    def _add_imported(self, file: Path, name: str, node: ast.Import | ast.ImportFrom) -> None:
        alias = next(alias for alias in node.names if _bound(alias) == name)
        module = node.module if isinstance(node, ast.ImportFrom) else alias.name
        if isinstance(node, ast.ImportFrom) and (source := _file_of(module)) and alias.asname is None:
            self.add(source, alias.name)
        elif _file_of(module) or (ROOT / module.partition(".")[0]).is_dir():
            raise UserError(f"{file}: {name} cannot be exported: import names with `from {module} import NAME`")
        else:
            only = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(module, [alias], 0)
            self._imports.add(ast.unparse(only))

    def text(self) -> str:
        return "\n".join(sorted(self._imports)) + "\n\n\n" + "\n\n\n".join(self._sources.values()) + "\n"


@cache
def _names(file: Path) -> dict[str, ast.stmt]:
    """Returns the statement that binds each name at the top level of a file."""
    found: dict[str, ast.stmt] = {}
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)) and getattr(statement, "module", "") != "__future__":
            found |= dict.fromkeys(map(_bound, statement.names), statement)
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found[statement.name] = statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            parts = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            found |= {part.id: statement for part in parts}
    return found


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _file_of(module: str | None) -> Path | None:
    """Returns the file of a module of this repository; None for any other module."""
    file = ROOT / f"{(module or '').replace('.', '/')}.py"
    return file if file.is_file() else None
