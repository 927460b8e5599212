"""Arrows go one way: between the folders of the package, between its modules, and in the C core."""

from __future__ import annotations

import re
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tools import layers

NATIVE = layers.ROOT / "native"
INCLUDE = re.compile(r'^#include ["<]([\w./]+)[">]', re.MULTILINE)


def in_order(graph: dict[str, set[str]]) -> None:
    """Fail if there is a circle, and say which."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_module_has_its_layer() -> None:
    for module in layers.modules():
        assert layers.layer_of(module) in (*layers.LAYERS, *layers.DOORS), module


def test_no_arrow_goes_up() -> None:
    """Not even one that is there for types only."""
    height = {layer: number for number, layer in enumerate(layers.LAYERS)}
    up = [
        arrow
        for arrow in layers.arrows()
        if layers.layer_of(arrow.importer) in height
        and height.get(layers.layer_of(arrow.imported), len(height))
        > height[layers.layer_of(arrow.importer)]
    ]
    assert up == []


def test_modules_make_no_circle() -> None:
    """What is imported for types alone, within a folder, does not count: nothing runs by it."""
    graph: dict[str, set[str]] = {}
    for arrow in layers.arrows():
        if not arrow.typing:
            graph.setdefault(arrow.importer, set()).add(arrow.imported)
    in_order(graph)


def test_an_arrow_up_and_a_circle_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The tests above can fail."""
    package = tmp_path / "aiouffd"
    for folder, module, text in (
        ("util", "low", "def later() -> None:\n    from ..buffers import high\n"),
        ("buffers", "high", "from ..util import low\nfrom . import other\n"),
        ("buffers", "other", "from .high import low\n"),
    ):
        (package / folder).mkdir(parents=True, exist_ok=True)
        (package / folder / "__init__.py").touch()
        (package / folder / f"{module}.py").write_text(text)
    (package / "__init__.py").touch()
    monkeypatch.setattr(layers, "ROOT", tmp_path)
    monkeypatch.setattr(layers, "PACKAGE", package)
    with pytest.raises(AssertionError, match=r"aiouffd\.util\.low"):
        test_no_arrow_goes_up()
    with pytest.raises(pytest.fail.Exception, match=r"aiouffd\.buffers\.other"):
        test_modules_make_no_circle()


def test_the_map_is_the_one_that_is_shown() -> None:
    text = (layers.ROOT / "CONTRIBUTING.md").read_text()
    shown = text.partition(layers.BEGIN)[2].partition(layers.END)[0].strip()
    assert shown == layers.diagram(), "make map"


def includes(paths: Iterable[Path]) -> dict[str, set[str]]:
    return {path.name: set(INCLUDE.findall(path.read_text())) for path in paths}


def to_the_right(folder: Path) -> list[str]:
    """Includes of a file that comes later in `layers.CORE` than the one that includes it."""
    found = includes(folder.glob("*.[ch]"))
    place = {stem: number for number, stem in enumerate(layers.CORE)}
    return sorted(
        f"{name} -> {other}"
        for name, others in found.items()
        for other in others & {path.name for path in folder.glob("*.h")}
        if place[Path(other).stem] > place[Path(name).stem]
    )


def test_files_of_the_core_stand_in_a_line() -> None:
    assert sorted({path.stem for path in NATIVE.glob("*.[ch]")}) == sorted(layers.CORE)
    assert to_the_right(NATIVE) == []


def test_an_include_to_the_right_is_found(tmp_path: Path) -> None:
    (tmp_path / "region.h").write_text('#include "engine.h"\n')
    (tmp_path / "engine.h").touch()
    assert to_the_right(tmp_path) == []
    (tmp_path / "engine.c").write_text('#include "engine.h"\n\n#include "region.h"\n')
    assert to_the_right(tmp_path) == ["engine.c -> region.h"]


def test_one_file_knows_python() -> None:
    found = includes(NATIVE.glob("*.[ch]"))
    knowing = [name for name, others in found.items() if "Python.h" in others]
    assert knowing == ["gil.c"]


#: Numbers that happen to be the size of a page.
OTHER_4096 = ("AREAS_MAX", "PIECE", "_PART")


def test_nobody_knows_the_size_of_a_page_by_heart() -> None:
    """It is 64 KiB on some arm64: `util/pages.py` and `au_page_size` ask the system."""
    files = [
        *NATIVE.glob("*.[ch]"),
        *(layers.PACKAGE / "foreign").rglob("*.py"),
        *(layers.PACKAGE / "serve").rglob("*.py"),
    ]
    known = [
        f"{path.name}: {line.strip()}"
        for path in files
        for line in path.read_text().splitlines()
        if re.search(r"\b(4096|4095|0xfff)U?L*\b", line) and not line.startswith(OTHER_4096)
    ]
    assert known == []
