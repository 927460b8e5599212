"""The map of the layers: which folder of the package, and which file of native/, may use which.

    python3 tools/layers.py            print it as a Mermaid diagram, as CONTRIBUTING.md shows it
    python3 tools/layers.py --write    put it there

``tests/test_layers.py`` holds the package to it. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aiouffd"

#: Lowest first: each imports only from those before it. Files of the package's own folder are
#: layers by their names; those that are left out here are its front doors, which import anything.
LAYERS = (
    "version",
    "errors",
    "util",
    "kernel",
    "sources",
    "nbd",
    "regions",
    "fetch",
    "foreign",
    "buffers",
    "attach",
    "serve",
    "formats",
    "cli",
)
#: What people import by these names, whatever is below.
DOORS = ("__init__", "__main__", "abi", "headers", "safetensors", "sync", "uffd", "workingset")

#: Files of native/ by their stems, a header and its code together: each includes only those
#: before it.
CORE = (
    "sys",
    "uapi",
    "abi",
    "counters",
    "pagemap",
    "task",
    "registry",
    "slots",
    "kick",
    "engine",
    "region",
    "regions",
    "mapping",
    "error_page",
    "refuse",
    "fold",
    "install",
    "pump",
    "guard",
    "reading",
    "children",
    "creation",
    "closing",
    "demand",
    "rescue",
    "interrupt",
    "gil",
    "handler",
    "inherit",
    "notes",
    "where",
    "watched",
    "stalls",
    "verdicts",
    "sentry",
    "lifecycle",
    "attach",
    "foreign",
    "uapi_check",
    "native",
)

BEGIN, END = "<!-- layers: begin -->", "<!-- layers: end -->"


@dataclass(frozen=True, order=True)
class Arrow:
    """One module imports another one."""

    importer: str
    imported: str
    #: Only for the sake of types: it does not happen when the program runs.
    typing: bool


def modules() -> dict[str, Path]:
    """All modules of the package by their dotted names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer_of(module: str) -> str:
    """The folder, or the file of the package's own folder, that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def arrows() -> Iterator[Arrow]:
    """All imports of modules of the package by others of it."""
    known = modules()
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        typing = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            for target in _targets(node, package):
                # `from .folder import module`, or a name out of `.module`.
                parent = target.rpartition(".")[0]
                found = target if target in known else parent if parent in known else ""
                if found and found != name:
                    yield Arrow(name, found, id(node) in typing)


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
    return [f"{base}.{alias.name}" for alias in node.names]


def diagram() -> str:
    """The arrows between layers, as Mermaid has it; those that others imply are left out."""
    pairs = {(layer_of(arrow.importer), layer_of(arrow.imported)) for arrow in arrows()}
    below: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for upper, lower in pairs:
        if upper != lower and upper in below and lower in below:
            below[upper].add(lower)
    reach: dict[str, set[str]] = {}
    for layer in LAYERS:
        reach[layer] = below[layer].union(*(reach.get(other, set()) for other in below[layer]))
    lines = ["```mermaid", "graph TD"]
    for layer in reversed(LAYERS):
        direct = {
            lower
            for lower in below[layer]
            if not any(lower in reach[other] for other in below[layer] if other != lower)
        }
        lines += [f"    {layer} --> {lower}" for lower in sorted(direct, key=LAYERS.index)]
    return "\n".join([*lines, "```"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into CONTRIBUTING.md")
    if not parser.parse_args().write:
        print(diagram())
        return
    path = ROOT / "CONTRIBUTING.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{diagram()}\n{END}{after}")


if __name__ == "__main__":
    main()
