"""How a lazy buffer looks in a notebook."""

from __future__ import annotations

from html import escape

__all__ = ["html_of"]

#: Parts that the strip has at most.
PARTS = 200


def html_of(kind: str, name: str, size: int, state: str, resident: list[tuple[int, int]]) -> str:
    """A line of text, and a strip that shows which parts of ``size`` bytes are resident."""
    there = sum(stop - start for start, stop in resident)
    text = (
        f"<b>{escape(kind)}</b> <code>{escape(name)}</code>, {state}: {_human(there)} of"
        f" {_human(size)} resident"
    )
    parts = _parts(size, resident)
    bars = "".join(
        f'<rect x="{first}" width="{last - first}" height="10" fill="#4c72b0"/>'
        for first, last in parts
    )
    return (
        f"<div>{text}<br>"
        f'<svg width="400" height="10" viewBox="0 0 {PARTS} 10" preserveAspectRatio="none">'
        f'<rect width="{PARTS}" height="10" fill="#ddd"/>{bars}</svg></div>'
    )


def _parts(size: int, resident: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Which of the strip's parts have something resident, merged; however little it is."""
    found: list[tuple[int, int]] = []
    for start, stop in resident:
        first, last = start * PARTS // size, -(-stop * PARTS // size)
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def _human(count: int) -> str:
    number = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"
