"""The types of what Python may call of the native module, from the C headers that say it.

    python3 tools/calls.py            say what differs between native/cdef and aiouffd/kernel/calls
    python3 tools/calls.py --write    make the latter from the former

Each header has its Protocol, and each of its structs one for a pointer to it. Names of parameters
and fields stay; a pointer to numbers or bytes is named after what it points to.
``tests/test_calls.py`` holds the package to this. It needs pycparser, which cffi brings along, and
for ``--write`` ruff.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import keyword
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pycparser import c_ast, c_parser

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "native" / "cdef"
CALLS = ROOT / "aiouffd" / "kernel" / "calls"

#: What C's numbers and pointers to them are called. Structs: `pointer_name`.
NUMBERS = (
    *("int", "long", "int8_t", "int16_t", "int32_t", "int64_t"),
    *("uint8_t", "uint16_t", "uint32_t", "uint64_t"),
)
POINTERS = {
    "char": "Text",
    "int": "Ints",
    "int64_t": "Int64s",
    "uint32_t": "Uint32s",
    "uint64_t": "Uint64s",
    "uint8_t": "Bytes",
    "void": "Bytes",
}
_TYPEDEFS = "".join(f"typedef int {name};" for name in NUMBERS if name.endswith("_t"))
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_CONSTANT = re.compile(r"^#define (\w+) \.\.\.$", re.MULTILINE)
_OPEN_END = re.compile(r"\.\.\.;")


@dataclass
class Header:
    """What one header declares, as Python says it: names mapped to types or signatures."""

    name: str
    constants: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    structs: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        return f"{self.name.capitalize()}Calls"

    def classes(self) -> dict[str, list[str]]:
        """The lines that each class has, in order."""
        lines = {
            struct: [f"{name}: {kind}" for name, kind in fields.items()]
            for struct, fields in self.structs.items()
        }
        lines[self.protocol] = [
            *(f"{name}: int" for name in self.constants),
            *(f"{name}: {kind}" for name, kind in self.variables.items()),
            *(f"def {name}{signature}" for name, signature in self.functions.items()),
        ]
        return lines


def pointer_name(struct: str) -> str:
    """``struct au_page_region *`` is ``PageRegionPtr``."""
    return "".join(part.capitalize() for part in struct.removeprefix("au_").split("_")) + "Ptr"


def read_header(name: str, text: str) -> Header:
    """Parse what ``native/cdef/NAME.h`` says."""
    header = Header(name)
    text = _COMMENT.sub("", text)
    header.constants = _CONSTANT.findall(text)
    text = _OPEN_END.sub("", _CONSTANT.sub("", text))
    for node in c_parser.CParser().parse(_TYPEDEFS + text, f"native/cdef/{name}.h").ext:
        if isinstance(node, c_ast.Typedef):
            continue
        kind = node.type
        if isinstance(kind, c_ast.Struct):
            _read_struct(header, pointer_name(kind.name), kind)
        elif isinstance(kind, c_ast.FuncDecl):
            parameters = ["self"]
            for parameter in kind.args.params if kind.args else ():
                if parameter.name:  # not void
                    parameters.append(f"{parameter.name}: {_python(parameter.type)}")
            if parameters[1:]:
                parameters.append("/")
            header.functions[node.name] = f"({', '.join(parameters)}) -> {_python(kind.type)}"
        else:
            header.variables[node.name] = _python(kind)
    return header


def _read_struct(header: Header, name: str, struct: c_ast.Struct | c_ast.Union) -> None:
    fields = header.structs[name] = {}
    for declared in struct.decls:
        if keyword.iskeyword(declared.name):
            continue  # no class can say it: `getattr`
        inner = getattr(declared.type, "type", None)
        if isinstance(inner, c_ast.Struct | c_ast.Union) and inner.decls:
            fields[declared.name] = nested = f"{name[:-3]}{declared.name.capitalize()}Ptr"
            _read_struct(header, nested, inner)
        else:
            fields[declared.name] = _python(declared.type)
    # After those that it names.
    header.structs[name] = header.structs.pop(name)


def _python(kind: c_ast.Node) -> str:
    """A type of C as Python names it."""
    pointer = isinstance(kind, c_ast.PtrDecl)
    if isinstance(kind, c_ast.PtrDecl):
        kind = kind.type
    if not isinstance(kind, c_ast.TypeDecl):
        raise TypeError(f"{type(kind).__name__} at {kind.coord} has no name in Python yet")
    inner = kind.type
    if isinstance(inner, c_ast.Struct):
        return pointer_name(inner.name)
    (name,) = inner.names
    if pointer:
        return POINTERS[name]
    if name == "void":
        return "None"
    if name not in NUMBERS:
        raise TypeError(f"{name} at {kind.coord} has no name in Python yet")
    return "int"


def headers() -> list[Header]:
    """All headers, by name."""
    return [read_header(path.stem, path.read_text()) for path in sorted(HEADERS.glob("*.h"))]


def module(header: Header, home: dict[str, str]) -> str:
    """The text of a module, not formatted. ``home``: the module of each struct."""
    classes = header.classes()
    used = set(re.findall(r"\w+", "\n".join(line for lines in classes.values() for line in lines)))
    names = sorted(used & set(POINTERS.values()))
    imports = [f"from .pointers import {', '.join(names)}"] if names else []
    for other in sorted(set(home.values()) - {header.name}):
        structs = sorted(name for name in used if home.get(name) == other)
        if structs:
            imports.append(f"from .{other} import {', '.join(structs)}")
    text = [
        f'"""What ``native/cdef/{header.name}.h`` declares. Made by ``make calls``."""',
        "from __future__ import annotations",
        "from typing import Protocol",
        *sorted(imports),
        f"__all__ = {sorted(classes)!r}",
    ]
    for name, lines in classes.items():
        text.append(f"class {name}(Protocol):")
        text += [f"    {line}: ..." if line.startswith("def ") else f"    {line}" for line in lines]
    return "\n".join(text) + "\n"


def package(found: list[Header]) -> dict[Path, str]:
    """The texts of all modules that are made, by path."""
    home = {struct: header.name for header in found for struct in header.structs}
    return {CALLS / f"{header.name}.py": module(header, home) for header in found}


def said(path: Path) -> list[str]:
    """What a module says, a line for each member of a class; nothing if there is no such file."""
    return list(_members(path.read_text())) if path.exists() else []


def _members(text: str) -> Iterator[str]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            yield f"class {node.name}"
            for member in node.body:
                yield f"{node.name}: {ast.unparse(member).splitlines()[0]}"


def differences() -> str:
    """How the modules differ from the headers, as a diff; empty if they do not."""
    made = package(headers())
    others = {CALLS / "__init__.py", CALLS / "pointers.py"}
    lines: list[str] = []
    for path in sorted({*made, *CALLS.glob("*.py")} - others):
        lines += difflib.unified_diff(
            said(path),
            list(_members(made.get(path, ""))),
            str(path.relative_to(ROOT)),
            f"native/cdef/{path.stem}.h",
            lineterm="",
            n=0,
        )
    return "\n".join(lines)


def write() -> None:
    for path, text in package(headers()).items():
        path.write_text(text)
    for command in (["check", "-q", "--select", "I", "--fix"], ["format", "-q"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, CALLS], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        write()
    elif found := differences():
        sys.exit(found)


if __name__ == "__main__":
    main()
