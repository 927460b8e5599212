"""Runs all tests on every Python that has a virtual environment here, and the C tests.

    python3 tools/run_tests.py [--only python|unprivileged|c] [-- PYTEST_ARGUMENT...]

The last line is ``N passed, N failed``; the exit status tells whether anything failed. Standard
library only, because it runs outside the environments that it tests.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Seconds for one run of pytest. A test that is stuck in a page fault with the GIL held cannot be
#: ended from inside, so timeout(1) stands outside.
LIMIT = 600
PYTEST = ["-m", "pytest"]
MAKE = ["make", "--no-print-directory", "-C", "native/tests"]
C_TARGETS = ("test", "asan", "tsan")
COUNTS = re.compile(r"^(\d+) passed, (\d+) failed\b", re.MULTILINE)
SKIPPED = re.compile(r"^(\d+) skipped$", re.MULTILINE)


@dataclass
class Result:
    """What one run gave."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.name}: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{text} ({self.note})" if self.note else text


def environments() -> list[Path]:
    """The interpreters of the virtual environments, the default one first."""
    found = [ROOT / ".venv", *sorted(ROOT.glob(".venv-3.*"))]
    return [venv / "bin" / "python" for venv in found if (venv / "bin" / "python").exists()]


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run_pytest(name: str, command: list[str], report: Path) -> Result:
    """Run ``command``, which writes ``report``, and count what that says."""
    heading(name)
    status = subprocess.run(
        ["timeout", "-k", "10", str(LIMIT), *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    ).returncode
    result = Result(name)
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        suites = []
    for suite in suites:
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        result.failed += failed
        result.skipped += skipped
        result.passed += int(suite.get("tests", 0)) - failed - skipped
    if status and not result.failed:
        result.failed = 1
        result.note = "no answer in time" if status in (124, 137) else f"exit status {status}"
    return result


def run_python(python: Path, arguments: list[str], folder: Path) -> Result:
    name = python.parent.parent.name
    report = folder / f"{name}.xml"
    cache = ["-o", f"cache_dir={folder / name}"]
    command = [str(python), *PYTEST, *cache, f"--junitxml={report}", *arguments]
    result = run_pytest(f"pytest in {name}", command, report)
    if result.failed and not result.note:
        result = run_again(result, [*command, "--lf"], report)
    return result


def run_again(first: Result, command: list[str], report: Path) -> Result:
    """What failed once more, alone: on a busy machine a limit may be missed for no fault of ours.

    Whatever passes only then is told in the summary, because it wants looking into.
    """
    second = run_pytest(f"{first.name}, what failed once more", command, report)
    rescued = first.failed - second.failed
    return Result(
        first.name,
        first.passed + rescued,
        second.failed,
        first.skipped,
        f"{rescued} passed only when run again" if rescued > 0 else second.note,
    )


def run_unprivileged(python: Path, arguments: list[str], folder: Path) -> Result:
    """The same tests as a user without rights, but for those that need root."""
    name = python.parent.parent.name
    report = folder / f"{name}-unprivileged.xml"
    wrapper = str(ROOT / "tools" / "run_unprivileged.py")
    command = [str(python), wrapper, str(report), "-m", "not needs_root", *arguments]
    result = run_pytest(f"pytest in {name}, without privileges", command, report)
    if result.failed and not result.note:
        again = [str(python), wrapper, str(report), *failed_tests(report), *arguments]
        result = run_again(result, again, report)
    return result


def failed_tests(report: Path) -> list[str]:
    """The names of what failed, as pytest takes them."""
    names = []
    for case in ET.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            path = (case.get("classname") or "").replace(".", "/") + ".py"
            names.append(f"{path}::{case.get('name')}")
    return names


def run_c(target: str) -> Result:
    """One target of native/tests, which may say ``N passed, N failed`` itself."""
    heading(f"native/tests: {target}")
    done = subprocess.run(
        ["timeout", "-k", "10", str(LIMIT), *MAKE, target],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(done.stdout, end="", flush=True)
    counts = [(int(passed), int(failed)) for passed, failed in COUNTS.findall(done.stdout)]
    result = Result(f"native/tests {target}")
    result.passed = sum(passed for passed, _ in counts) or int(done.returncode == 0)
    result.failed = sum(failed for _, failed in counts)
    result.skipped = sum(int(skipped) for skipped in SKIPPED.findall(done.stdout))
    if done.returncode and not result.failed:
        result.failed, result.note = 1, f"exit status {done.returncode}"
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="run all tests")
    parser.add_argument("--only", choices=("python", "unprivileged", "c"))
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    root = os.geteuid() == 0
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="aiouffd-tests-") as temporary:
        folder = Path(temporary)
        for number, python in enumerate(environments()):
            if options.only in (None, "python"):
                results.append(run_python(python, options.arguments, folder))
            # One Python is enough for what depends on the user alone.
            if options.only == "unprivileged" or (options.only is None and number == 0):
                if root:
                    results.append(run_unprivileged(python, options.arguments, folder))
                elif options.only:
                    print("this user is unprivileged already: the other tests do it")
    if options.only in (None, "c"):
        for target in C_TARGETS:
            result = run_c(target)
            if result.failed:
                again = run_c(target)
                again.note = again.note or "on the second run; the first had failures"
                result = again
            results.append(result)
    if not results:
        print("nothing was run: make setup first", file=sys.stderr)
        return 1
    heading("summary")
    for result in results:
        print(result)
    passed = sum(result.passed for result in results)
    failed = sum(result.failed for result in results)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
