"""The results as a table, and its place in docs/kernels.md."""

from __future__ import annotations

from pathlib import Path

BEGIN = "<!-- begin: made by `make kernels ARGS=--write` -->"
END = "<!-- end -->"


def _short(result: str) -> str:
    """A cell of the table."""
    word = result.split(":")[0]
    return {"yes": "yes", "no": "no", "WRONG": "**wrong**"}.get(word, word)


def is_wrong(result: dict) -> bool:
    """Whether the product broke a promise on that kernel, or the run did not end."""
    said = [text for cases in result["smoke"].values() for text in cases.values()]
    done = bool(said) and all(not text.startswith("WRONG") for text in said)
    return not done or bool(result["tests"].get("failed"))


def summary(result: dict) -> str:
    """One kernel's results: only what is not as promised."""
    lines = [f"Linux {result['release']}: {result['seconds']} s"]
    if not result["smoke"]:
        lines.append("  the guest handed nothing back: see its console")
    for user, cases in result["smoke"].items():
        lines += [f"  {user}: {case}: {text}" for case, text in cases.items() if text != "yes"]
    lines.append(f"  tests: {_tests(result)}")
    lines += [f"    failed: {name}" for name in result["tests"].get("names", [])]
    return "\n".join(lines)


def _tests(result: dict) -> str:
    tests = result["tests"]
    if not tests:
        return "-"
    return f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"


def matrix(results: list[dict]) -> str:
    """All results, in Markdown: "yes / no" is as root and as an ordinary user."""
    rows = [["", *(result["version"] for result in results)]]
    rows.append(["---"] * len(rows[0]))
    cases: dict[str, None] = {}
    for result in results:
        for said in result["smoke"].values():
            cases.update(dict.fromkeys(said))
    for case in cases:
        row = [case]
        for result in results:
            said = [_short(result["smoke"].get(user, {}).get(case, "-")) for user in USERS]
            row.append(said[0] if said[0] == said[1] else " / ".join(said))
        rows.append(row)
    rows.append(["tests of the core", *(_tests(result) for result in results)])
    rows.append(["seconds, emulated", *(str(result["seconds"]) for result in results)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


USERS = ("root", "nobody")


def write(path: Path, results: list[dict]) -> None:
    """Replaces the made part of the document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    kernels = ", ".join(f"{result['release']} ({result['date']})" for result in results)
    made = f"Run on {kernels}.\n\n{matrix(results)}"
    path.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
