"""What is public exists, is typed, and is what the documents call it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import aiouffd
from tests.support import ROOT, environment

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    each.name
    for each in pkgutil.walk_packages(aiouffd.__path__, "aiouffd.")
    if not each.name.rpartition(".")[2].startswith("_")
    and each.name != "aiouffd.nbd.wire"  # numbers only, used by the name of the module
)


def load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs {error.name}")


@pytest.mark.parametrize("name", MODULES)
def test_all_names_exist(name: str) -> None:
    module = load(name)
    assert [each for each in module.__all__ if not hasattr(module, each)] == []
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_names_that_exist(document: Path) -> None:
    text = document.read_text()
    for name in sorted(set(re.findall(r"(?<![\w./-])aiouffd(?:\.[A-Za-z_]\w*)+", text))):
        found: Any = aiouffd
        parts = name.split(".")[1:]
        if parts[-1] in ("sources", "h", "o", "sock", "git", "service", "so", "py"):
            continue  # the group of entry points, files
        for number, part in enumerate(parts):
            if not hasattr(found, part):
                path = ".".join(["aiouffd", *parts[: number + 1]])
                try:
                    importlib.import_module(path)
                except ModuleNotFoundError as error:
                    if path.startswith(str(error.name)):
                        pytest.fail(f"{document.name}: there is no {name}")
                    break  # an extra is not installed
            found = getattr(found, part)


def _logged() -> dict[str, str]:
    """The longest piece of each text of a warning or an error in the log that is not filled in."""
    pieces = {}
    for path in sorted((ROOT / "aiouffd").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Name(id="log"), attr="warning" | "error" | "exception"
                    ),
                    args=[ast.Constant(value=str(text)), *_],
                ):
                    parts = re.split(r"%[-#.\d]*[a-z]", text)
                    if len(longest := max(parts, key=len).strip(" :(;,")) > 8:
                        pieces[longest] = path.name
    return pieces


def test_each_line_of_the_log_is_explained() -> None:
    known = re.findall(r"`([^`]+)`", (ROOT / "docs" / "messages.md").read_text())
    for text, where in _logged().items():
        assert any(each.strip(" :") in text or text in each for each in known), f"{where}: {text}"


def test_a_typed_program() -> None:
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "tests/typed_program.py"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
