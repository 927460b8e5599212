"""All benchmarks, or some of them.

    python -m benchmarks                            everything, on asyncio and on uvloop
    python -m benchmarks --only http,size --loop asyncio --quick
    python -m benchmarks --write                    put the table into docs/performance.md

Each group runs in a process of its own, so that no group inherits another's threads, memory
or CPUs. All figures of all runs go to build/benchmarks/results.json.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .baseline.build import OUTPUT
from .common import BEGIN, END, REPEATS, Comparison, Report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = OUTPUT / "results.json"
TABLE = ROOT / "docs" / "performance.md"
LOOPS = ("asyncio", "uvloop")
QUICK_REPEATS = 3
#: Seconds after which a group is given up. It takes well under a minute if nothing is wrong.
PATIENCE = 300


@dataclass(frozen=True)
class Group:
    """A module with `run(report, loop, runner)`; ``one_cpu``: started with just one CPU."""

    name: str
    module: str
    what: str
    one_cpu: bool = False


GROUPS = (
    Group("fault", "fault_roundtrip", "the round trip of a fault"),
    Group("fault-one-cpu", "fault_roundtrip", "the same, with everything on one CPU", True),
    Group("scan", "scan", "cold scans over TCP"),
    Group("columns", "columns", "columns of tables through pyarrow, and a scan from afar"),
    Group("http", "http", "cold scan and first byte over HTTP"),
    Group("fuse", "fuse", "cold scan against a FUSE file system in Python"),
    Group("objects", "objects", "an object store: scan and amplification, against obstore, fsspec"),
    Group("files", "files", "files over what is resident, against open()"),
    Group("cache", "cache", "a second open through the disk cache, against the local file"),
    Group("workingset", "workingset", "a recorded working set at 5 ms, against the same touches"),
    Group("nbd", "nbd", "NBD both ways, against nbdkit, nbdcopy and nbdfuse"),
    Group("serve", "serve", "serving other processes, against a handler in C, and fairness"),
    Group("balloon", "balloon", "faults of a guest whose balloon inflates"),
    Group("microvm", "microvm", "restoring a microVM lazily, against a copy of its snapshot"),
    Group("loop", "loop_latency", "gaps of the event loop, and wake-ups when idle"),
    Group("size", "size", "cost against size and number of regions, on one CPU", True),
)


class ShortReport(Report):
    """Takes fewer pairs: enough to see that everything works, not for figures to keep."""

    def compare(self, *arguments: Any, repeats: int = REPEATS, **options: Any) -> Comparison:
        return super().compare(*arguments, repeats=min(repeats, QUICK_REPEATS), **options)

    async def compare_async(
        self, *arguments: Any, repeats: int = REPEATS, **options: Any
    ) -> Comparison:
        return await super().compare_async(
            *arguments, repeats=min(repeats, QUICK_REPEATS), **options
        )


# --- one group, in its own process -----------------------------------------------------------


def _work(group: Group, loop: str, quick: bool, results: Path) -> int:
    """Run the group here and leave what was found in ``results``, also if it ends early."""
    if group.one_cpu:  # before any other thread exists
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    report = (ShortReport if quick else Report)(loop)
    try:
        module = importlib.import_module(f".{group.module}", __package__)
        module.run(report, loop, _runner(loop))
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        report.write_json(results)
    return 0


def _runner(loop: str) -> Any:
    if loop == "asyncio":
        return asyncio.run
    import uvloop

    return uvloop.run


# --- all of them -----------------------------------------------------------------------------


def _run(group: Group, loop: str, quick: bool, report: Report) -> bool:
    """Run a group in a child process and add what it found; False if it failed."""
    print(f"\n== {group.name}: {group.what}, {loop}", flush=True)
    results = OUTPUT / f"{group.name}-{loop}.json"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks", "--loop", loop, "--worker", str(results)]
    command += ["--only", group.name, *(["--quick"] if quick else [])]
    started = time.monotonic()
    trouble = None
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=PATIENCE).returncode
        if status:
            trouble = f"failed with status {status}, see its output"
    except subprocess.TimeoutExpired:
        trouble = f"not done after {PATIENCE} s"
    _collect(results, report)
    if trouble:
        report.skip(f"{group.name}, {loop}", trouble)
    print(f"   ({time.monotonic() - started:.0f} s)", flush=True)
    return trouble is None


def _collect(results: Path, report: Report) -> None:
    """Add what a child process has left."""
    try:
        found = json.loads(results.read_text())
    except FileNotFoundError:
        return
    results.unlink()
    names = [field.name for field in dataclasses.fields(Comparison)]
    for entry in found["comparisons"]:
        known = {name: entry[name] for name in names}
        known["a"], known["b"] = tuple(known["a"]), tuple(known["b"])
        report.comparisons.append(Comparison(**known))
    report.skipped += [(name, reason) for name, reason in found["skipped"]]


def _loops(wanted: str, report: Report) -> list[str]:
    loops = list(LOOPS) if wanted == "both" else [wanted]
    if "uvloop" in loops and importlib.util.find_spec("uvloop") is None:
        report.skip("uvloop", "not installed: pip install uvloop")
        loops.remove("uvloop")
    return loops


def _write_table(report: Report) -> None:
    if not TABLE.exists():
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(f"{BEGIN}\n{END}\n")
    report.write_markdown(TABLE)
    print(f"written: {TABLE.relative_to(ROOT)}")


def _chosen(text: str) -> list[Group]:
    names = text.split(",")
    known = {group.name: group for group in GROUPS}
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(
            f"no group {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    return [known[name] for name in known if name in names]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare aiouffd with plain C, eager downloads and FUSE.",
        epilog="Groups: " + "; ".join(f"{group.name} ({group.what})" for group in GROUPS),
    )
    parser.add_argument("--only", type=_chosen, metavar="GROUP,...", help="run only these groups")
    parser.add_argument("--loop", choices=(*LOOPS, "both"), default="both")
    parser.add_argument("--quick", action="store_true", help="few repeats, to see that it works")
    parser.add_argument(
        "--write", action="store_true", help="write the table of a whole run to docs/performance.md"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return _work(arguments.only[0], arguments.loop, arguments.quick, arguments.worker)
    if arguments.write and arguments.only:
        parser.error("--write is for whole runs: the table would lack the other groups")

    report = Report()
    started = time.monotonic()
    loops = _loops(arguments.loop, report)
    report.loop = " and ".join(loops) + (", quick run" if arguments.quick else "")
    done = [
        _run(group, loop, arguments.quick, report)
        for group in arguments.only or GROUPS
        for loop in loops
    ]
    report.write_json(RESULTS)
    print(f"\n{report.markdown()}\n\n{time.monotonic() - started:.0f} s in all", flush=True)
    missed = [comparison.name for comparison in report.comparisons if comparison.verdict == "miss"]
    for name in missed:
        print(f"bar missed: {name}")
    print(f"all figures: {RESULTS.relative_to(ROOT)}")
    if arguments.write:
        _write_table(report)
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
