"""Runs all tests on every Python that has a virtual environment here, and the C tests.

    python3 tools/run_tests.py [--only python|unprivileged|before-6.6|c] [--newest] [--slow]
        [-- PYTEST_ARGUMENT...]

The default Python runs all of them, on both loops. The others, and the user without rights, run
each test on one of the two loops, half of them on either, and leave out what is marked slow; with
``--slow`` they run everything too. Pythons between the oldest and the newest leave out formats and
protocols. One lane more runs what is about errors and ends as if the kernel were older than Linux
6.6 (run_before_6_6.py). ``--newest`` adds the newest Pythons and peers, where they can be had
(newest.sh).

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
import threading
import time
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Seconds for one run of pytest. A test that is stuck in a page fault with the GIL held cannot be
#: ended from inside, so timeout(1) stands outside.
LIMIT = 1800
#: Tests to which it makes no difference who the user is: of formats, protocols and sources.
INDEPENDENT = (
    "compose",
    "criu_images",
    "criu_page_server",
    "fsspec_source",
    "gil_yield_model",
    "http_cancel",
    "http_proxy",
    "http_source",
    "nbd_bad_servers",
    "nbd_client",
    "nbd_fuzz",
    "nbd_hostile",
    "nbd_serve",
    "nbd_server",
    "object_source",
    "redis_source",
    "safetensors",
    "serve_areas",
    "web_servers",
)
#: Tests of what is otherwise on a kernel that cannot poison: errors, ends, closing, forks.
BEFORE_6_6 = ("attach", "ending", "failure", "fork_serve")
#: Packages that short processes of the tests import; to compile all would take minutes.
IMPORTED = (
    "_pytest",
    "aio*",
    "attr*",
    "frozenlist",
    "fsspec",
    "google",
    "hypothesis",
    "multidict",
    "numpy",
    "obstore",
    "pluggy",
    "propcache",
    "pytest*",
    "redis",
    "rich",
    "safetensors",
    "typing_extensions.py",
    "uvloop",
    "yarl",
)
#: The files of tests in two parts, by their first letters: so that all lanes end at about the same
#: time.
PARTS = ("[a-g]", "[!a-g]")
#: Jobs at a time: tests wait for a quarter of their time.
LANES = 3
PRINTING = threading.Lock()
PYTEST = ["-m", "pytest"]
MAKE = ["make", "--no-print-directory", "-C", "native/tests"]
C_TARGETS = (("test", "before-6.6"), ("asan",), ("tsan",))
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
    seconds: float = 0.0

    def __str__(self) -> str:
        text = f"{self.name}: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        text += f", {self.seconds:.0f} s"
        return f"{text} ({self.note})" if self.note else text


def environments() -> list[Path]:
    """The interpreters of the virtual environments, the default one first."""
    found = [ROOT / ".venv", *sorted(ROOT.glob(".venv-3.*"))]
    return [venv / "bin" / "python" for venv in found if (venv / "bin" / "python").exists()]


@dataclass
class Job:
    """One run: a command, and how to read what it found. ``again`` gives the command that repeats
    what failed, or None if that cannot be."""

    name: str
    command: list[str]
    read: Callable[[int, str], Result]
    again: Callable[[], list[str] | None]

    def run(self, command: list[str] | None = None, name: str = "") -> Result:
        """Its output goes to a file first: those of two lanes would mix."""
        start = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            status = subprocess.run(
                ["timeout", "-k", "10", str(LIMIT), *(command or self.command)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            ).returncode
            output.seek(0)
            text = output.read()
        with PRINTING:
            print(f"\n== {name or self.name}\n{text}", end="", flush=True)
        result = self.read(status, text)
        result.seconds = time.monotonic() - start
        if status and not result.failed:
            result.failed = 1
            result.note = "no answer in time" if status in (124, 137) else f"exit status {status}"
        return result

    def run_again(self, first: Result) -> Result:
        """What failed once more, alone: on a busy machine a limit may be missed for no fault of
        ours. Whatever passes only then is told in the summary, because it wants looking into.
        """
        command = self.again()
        if command is None:
            return first
        second = self.run(command, f"{self.name}, what failed once more")
        if first.passed and second.passed + second.failed < first.failed:
            return first  # it did not find them all
        if not first.passed:
            second.note = f"the first run: {first.note}" + (second.note and f"; {second.note}")
            second.seconds += first.seconds
            return second
        rescued = max(first.failed - second.failed, 0)
        note = f"{rescued} passed only when run again" if rescued else second.note
        seconds = first.seconds + second.seconds
        return Result(
            self.name, first.passed + rescued, second.failed, first.skipped, note, seconds
        )


def counts_of(report: Path, name: str) -> Result:
    """What a report of pytest says."""
    result = Result(name)
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return result
    for suite in suites:
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        result.failed += failed
        result.skipped += skipped
        result.passed += int(suite.get("tests", 0)) - failed - skipped
    return result


def failed_in(report: Path) -> list[str]:
    """The names of what failed, as pytest takes them."""
    names = []
    try:
        cases = list(ET.parse(report).getroot().iter("testcase"))
    except (OSError, ET.ParseError):
        return names
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            module, *within = (case.get("classname") or "").split(".Test", 1)
            parts = [module.replace(".", "/") + ".py"]
            parts += [f"Test{name}" for name in within]
            names.append("::".join([*parts, case.get("name") or ""]))
    return names


def pytest_job(name: str, start: list[str], report: Path, arguments: list[str]) -> Job:
    """Pytest by the command ``start``, which writes ``report``."""

    def again() -> list[str] | None:
        if not report.exists():
            # It came to no end. All of it once more tells whether that is always so; what it has
            # printed tells where.
            return [*start, *arguments]
        names = failed_in(report)
        return [*start, *names] if names else None

    return Job(name, [*start, *arguments], lambda _status, _text: counts_of(report, name), again)


def python_job(
    python: Path,
    arguments: list[str],
    folder: Path,
    slow: bool,
    part: str = "",
    least: bool = False,
) -> Job:
    """``least``: without what is `INDEPENDENT`, which does not care for the interpreter either."""
    name = python.parent.parent.name
    report = folder / f"{name}-{PARTS.index(part) if part else 'all'}.xml"
    # A cache of its own: two Pythons would write the same one.
    start = [str(python), *PYTEST, "-o", f"cache_dir={report.with_suffix('')}"]
    start += [f"--junitxml={report}"]
    start += [] if slow else ["-m", "not slow", "--one-loop"]
    if part:
        title = f"pytest in {name}, {part}"
        files = set(ROOT.glob(f"tests/test_{part}*.py"))
        if least:
            files -= {ROOT / "tests" / f"test_{kind}.py" for kind in INDEPENDENT}
        arguments = [*arguments, *sorted(map(str, files))]
    else:
        title = f"pytest in {name}"
    return pytest_job(title, start, report, arguments)


def unprivileged_job(python: Path, arguments: list[str], folder: Path, slow: bool) -> Job:
    """Most of the same tests as a user without rights, but for those that need root."""
    name = python.parent.parent.name
    report = folder / f"{name}-unprivileged.xml"
    wrapper = str(ROOT / "tools" / "run_unprivileged.py")
    start = [str(python), wrapper, str(report), "-m"]
    start += ["not needs_root"] if slow else ["not needs_root and not slow", "--one-loop"]
    start += [f"--ignore=tests/test_{name}.py" for name in INDEPENDENT]
    return pytest_job(f"pytest in {name}, without privileges", start, report, arguments)


def before_6_6_job(python: Path, arguments: list[str], folder: Path) -> Job:
    """Some of the tests as on a kernel that is older than Linux 6.6."""
    name = python.parent.parent.name
    report = folder / f"{name}-before-6.6.xml"
    start = [str(python), "tools/run_before_6_6.py", str(python), *PYTEST]
    start += ["-o", f"cache_dir={report.with_suffix('')}", f"--junitxml={report}"]
    start += ["-m", "not slow", "--one-loop"]
    if not any((ROOT / argument.partition("::")[0]).exists() for argument in arguments):
        arguments = [*arguments, *(f"tests/test_{name}.py" for name in BEFORE_6_6)]
    return pytest_job(f"pytest in {name}, as before Linux 6.6", start, report, arguments)


def counting_job(name: str, command: list[str], again: list[str]) -> Job:
    """A command that may say ``N passed, N failed`` itself; its end is one test otherwise."""

    def read(status: int, text: str) -> Result:
        counts = [(int(passed), int(failed)) for passed, failed in COUNTS.findall(text)]
        return Result(
            name,
            sum(passed for passed, _ in counts) if counts else int(status == 0),
            sum(failed for _, failed in counts),
            sum(int(skipped) for skipped in SKIPPED.findall(text)),
        )

    return Job(name, command, read, lambda: again)


def c_job(targets: tuple[str, ...]) -> Job:
    """Targets of native/tests."""
    command = [*MAKE, *targets]
    return counting_job(f"native/tests {' '.join(targets)}", command, command)


def newest_job() -> Job:
    command = ["tools/newest.sh"]
    return counting_job("the newest Pythons and peers", command, [*command, "--again"])


def compile_all(python: Path) -> None:
    """The tests start hundreds of interpreters. Where the environment forbids these to keep what
    they compile, or the user may not, each would do it all anew."""
    packages = next(python.parent.parent.glob("lib/python3.*/site-packages"))
    folders = ["aiouffd", "tests", "examples", "benchmarks"]
    folders += [str(path) for name in IMPORTED for path in packages.glob(name)]
    subprocess.run(
        [str(python), "-m", "compileall", "-q", "-x", r"site-packages/.*/tests/", *folders],
        cwd=ROOT,
        check=True,
    )


def run_lanes(jobs: list[Job]) -> dict[str, Result]:
    """Run the jobs, `LANES` at a time."""
    waiting, results = deque(jobs), {}

    def lane() -> None:
        while True:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            results[job.name] = job.run()

    lanes = [threading.Thread(target=lane) for _ in range(LANES)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="run all tests")
    parser.add_argument("--only", choices=("python", "unprivileged", "before-6.6", "c"))
    parser.add_argument("--newest", action="store_true", help="also what tools/newest.sh tests")
    parser.add_argument("--slow", action="store_true", help="slow tests on every Python")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(prefix="aiouffd-tests-") as temporary:
        folder = Path(temporary)
        # The first minutes of that are downloads.
        jobs = [newest_job()] if options.newest else []
        pythons = environments()
        for python in pythons:
            compile_all(python)
        # The longest first.
        for number, python in enumerate(pythons):
            if options.only in (None, "python"):
                slow = options.slow or number == 0
                # Formats and protocols are tested on the oldest and the newest one.
                least = not slow and 0 < number < len(pythons) - 1
                for part in ("",) if options.arguments else PARTS:
                    jobs.append(python_job(python, options.arguments, folder, slow, part, least))
        for number, python in enumerate(pythons):
            # One Python is enough for what depends on the user alone.
            if options.only == "unprivileged" or (options.only is None and number == 0):
                if root:
                    jobs.append(unprivileged_job(python, options.arguments, folder, options.slow))
                elif options.only:
                    print("this user is unprivileged already: the other tests do it")
        if options.only in (None, "before-6.6"):
            jobs.append(before_6_6_job(pythons[0], options.arguments, folder))
        if options.only in (None, "c"):
            jobs += [c_job(targets) for targets in C_TARGETS]
        found = run_lanes(jobs)
        results = [
            job.run_again(found[job.name]) if found[job.name].failed else found[job.name]
            for job in jobs
        ]
    if not results:
        print("nothing was run: make setup first", file=sys.stderr)
        return 1
    print("\n== summary")
    for result in results:
        print(result)
    passed = sum(result.passed for result in results)
    failed = sum(result.failed for result in results)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
