"""Boots Debian's kernels under QEMU and shows what works on each: `make kernels`.

    python tools/kernels [VERSION...] [--smoke] [--write] [PYTEST ARGUMENT...]

Without a version all of `packages.KERNELS`; any other that Debian has goes too. ``--smoke`` leaves
the tests out, ``--write`` puts the last result of each kernel into docs/kernels.md. What is
downloaded and built stays in build/kernels. One kernel takes some minutes, for the processor is
emulated.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import image
import packages
import table
import vm

CACHE = image.ROOT / "build/kernels"
#: Tests that depend on the kernel most.
CORE = ("abi", "old_kernels", "rwp", "probe", "doctor", "uffd", "cgroup", "rescue")
#: And those that ``-k`` chooses from as well: all of them would take an hour.
WIDER = ("pager", "page_state", "buffer", "failure", "traps", "fork_serve", "attach")
LIMIT = 3000.0


def job(arguments: list[str] | None) -> str:
    """What the guest is to do."""
    lines = [
        "sysctl -w vm.nr_hugepages=8 >/dev/null",
        "uname -rv",
        "python tools/kernels/smoke.py /out/smoke.json",
        "python -m aiouffd doctor >/out/doctor 2>&1",
        "su -s /bin/sh nobody -c '/python/bin/python -m aiouffd doctor' >/out/doctor.nobody 2>&1",
    ]
    if arguments is not None:
        words = ["-p", "no:cacheprovider", "--one-loop", "-m", "not slow", "-v", "--tb=short"]
        words += arguments
        lines.append(f"python -m pytest --junitxml=/out/tests.xml {shlex.join(words)}")
    return "\n".join(lines) + "\n"


def read_tests(folder: Path) -> dict[str, object]:
    """The counts of a run, and which tests failed."""
    path = folder / "tests.xml"
    if not path.exists():
        return {}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for test in ET.parse(path).iter("testcase"):
        kinds = {child.tag for child in test}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{test.get('classname')}::{test.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return {**counts, "names": failed}


def run_one(version: str, archive: packages.Archive, arguments: list[str] | None) -> dict:
    busybox = packages.cached(CACHE / "busybox", archive.fetch_busybox) / "busybox"
    kernel = packages.kernel_image(
        packages.cached(
            CACHE / f"linux-{version}", lambda folder: archive.fetch_kernel(version, folder)
        )
    )
    system = CACHE / f"system-{sys.version_info[0]}.{sys.version_info[1]}.cpio"
    if not system.exists():
        tree = packages.cached(CACHE / "system", lambda folder: image.make_system(folder, busybox))
        image.pack(tree, busybox, system)
        shutil.rmtree(tree)
    folder = CACHE / f"run-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    image.make_job(folder / "job", job(arguments))
    image.pack(folder / "job", busybox, folder / "job.cpio")
    shutil.rmtree(folder / "job")
    took = vm.run(kernel, [system, folder / "job.cpio"], folder, LIMIT)
    result = {"version": version, "release": kernel.parent.name, "seconds": round(took)}
    result["date"] = time.strftime("%Y-%m-%d")
    if kernel.name != "vmlinuz":
        result["release"] = kernel.name.removeprefix("vmlinuz-")
    smoke = folder / "smoke.json"
    result["smoke"] = json.loads(smoke.read_text()) if smoke.exists() else {}
    result["tests"] = read_tests(folder)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


def main() -> int:
    words = sys.argv[1:]
    versions = [word for word in words if re.fullmatch(r"\d+\.\d+", word)]
    flags = {word for word in words if word in ("--smoke", "--write")}
    arguments = [word for word in words if word not in versions and word not in flags]
    if not any(word.startswith("tests") for word in arguments):
        names = (*CORE, *WIDER) if "-k" in arguments else CORE
        arguments += [f"tests/test_{name}.py" for name in names]
    archive = packages.Archive(CACHE)
    results = []
    try:
        for version in versions or packages.KERNELS:
            print(f"== Linux {version}; see {CACHE}/run-{version}/console", flush=True)
            result = run_one(version, archive, None if "--smoke" in flags else arguments)
            print(table.summary(result), flush=True)
            results.append(result)
    except packages.Missing as error:
        print(error, file=sys.stderr)
        return 1
    print(table.matrix(results))
    if "--write" in flags:
        kept = [json.loads(path.read_text()) for path in CACHE.glob("run-*/result.json")]
        kept.sort(key=lambda result: packages.numbers(result["version"]))
        table.write(image.ROOT / "docs/kernels.md", kept)
    return int(any(table.is_wrong(result) for result in results))


if __name__ == "__main__":
    sys.exit(main())
