"""Runs one job on one kernel under QEMU, in software: no host needs virtualisation for it."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

from packages import Missing

#: "kvm" where stock kernels boot with it, which a virtual machine's own /dev/kvm seldom allows.
ACCELERATOR = os.environ.get("AIOUFFD_KERNELS_ACCEL", "tcg,thread=multi")
MEMORY = 3072  # MiB
PROCESSORS = 2


def run(kernel: Path, archives: list[Path], folder: Path, limit: float) -> float:
    """Boots, waits for the end and unpacks what the guest hands back into ``folder``: seconds.

    ``console`` in ``folder`` grows while it runs. A guest that is not done after ``limit`` seconds
    is ended.
    """
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise Missing("there is no qemu-system-x86_64: install qemu-system-x86")
    initrd, handed = folder / "initrd", folder / "handed"
    with initrd.open("wb") as out:
        for archive in archives:
            with archive.open("rb") as part:
                shutil.copyfileobj(part, out, 1 << 20)
    model = "host" if ACCELERATOR.startswith("kvm") else "max"
    command = [qemu, "-accel", ACCELERATOR, "-cpu", model, "-smp", str(PROCESSORS)]
    command += ["-m", str(MEMORY), "-nodefaults", "-display", "none", "-no-reboot", "-nic", "none"]
    command += ["-kernel", str(kernel), "-initrd", str(initrd)]
    command += ["-append", "console=ttyS0 panic=-1 quiet loglevel=4"]
    command += ["-serial", f"file:{folder / 'console'}", "-serial", f"file:{handed}"]
    start = time.monotonic()
    process = subprocess.Popen(
        ["nice", *command], stdin=subprocess.DEVNULL, stderr=(folder / "qemu").open("w")
    )
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
        initrd.unlink()
    took = time.monotonic() - start
    data = base64.b64decode(handed.read_bytes()) if handed.exists() else b""
    if data:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(folder, filter="data")
        handed.unlink()
    return took
