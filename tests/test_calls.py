"""The types of the native module's calls are what the C headers say, and what there is."""

from __future__ import annotations

import pytest

from aiouffd.kernel.lib import lib
from tools import calls


def test_the_types_are_those_of_the_headers() -> None:
    """Every function, constant and struct, with the names and kinds of parameters; and no other."""
    found = calls.differences()
    assert not found, f"`make calls` puts this right:\n{found}"


def test_all_headers_make_the_type() -> None:
    """`Lib` is a header's Protocol each, and no more."""
    text = (calls.CALLS / "__init__.py").read_text()
    protocols = ", ".join(header.protocol for header in calls.headers())
    assert f"class Lib({protocols}, Protocol):" in text


def test_the_module_has_what_the_types_promise() -> None:
    promised = {
        name
        for header in calls.headers()
        for name in (*header.constants, *header.variables, *header.functions)
    }
    assert len(promised) > 200
    assert promised == set(dir(lib))


def test_what_differs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number instead of a pointer, another name, and what is in one of the two only."""
    changed = calls.read_header(
        "children",
        """
#define AU_INHERITED_ALL_FAULTS ...
struct au_child { int uffd; int socket; int32_t pid; uint64_t *regions; };
struct au_child_region { uint64_t serial, start, length, page_size; };
int au_children_fd(void);
int au_children_receive(struct au_child *one);
void au_children_more(const char *name, int64_t number);
""",
    )
    others = [header for header in calls.headers() if header.name != "children"]
    monkeypatch.setattr(calls, "headers", lambda: [*others, changed])
    lines = calls.differences().splitlines()
    assert lines[:2] == ["--- aiouffd/kernel/calls/children.py", "+++ native/cdef/children.h"]
    assert [line for line in lines if line.startswith("-C")] == [
        "-ChildPtr: regions: int",
        "-ChildrenCalls: AU_INHERITED_USER_MODE: int",
        "-ChildrenCalls: def au_children_receive(self, child: ChildPtr, /) -> int:",
        "-ChildrenCalls: def au_children_release(self, uffd: int, socket: int, /) -> None:",
    ]
    assert [line for line in lines if line.startswith("+C")] == [
        "+ChildPtr: regions: Uint64s",
        "+ChildrenCalls: def au_children_receive(self, one: ChildPtr, /) -> int:",
        "+ChildrenCalls: def au_children_more(self, name: Text, number: int, /) -> None:",
    ]


def test_a_type_without_a_name_is_refused() -> None:
    for text in ("double au_x(void);", "int au_x(char **names);", "float au_y;"):
        with pytest.raises((TypeError, KeyError)):
            calls.read_header("new", text)
