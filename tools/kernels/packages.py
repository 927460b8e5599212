"""Debian's kernels, from the archive that this machine's own apt is set up for.

apt looks into other releases with a sources list and state of its own, which lie in the cache
beside the kernels; what the system has installed, or would install, does not change. apt also
checks the signatures.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

#: The kernels that `make kernels` runs without being told, and the release where each is found.
KERNELS = {
    "5.10": "bullseye",
    "6.1": "bookworm",
    "6.12": "trixie",
    "7.2": "sid",
    "7.3": "trixie-backports",
}
#: A kernel is one package or several. The cloud flavour is small and has the drivers of QEMU.
NAME = re.compile(r"linux-(?:image|binary|modules)-((\d+\.\d+)[-.][^-]*(?:-\d+)?)-cloud-amd64")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Missing(Exception):
    """Something cannot be had here; the text says what, and what to do."""


class Archive:
    """apt for several releases at a time, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "apt"
        self._names: list[str] = []

    def _apt(self, *arguments: str, cwd: Path | None = None) -> str:
        here = self.folder
        options = {
            "Dir::Etc::sourcelist": here / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State": here,
            "Dir::State::lists": here / "lists",
            "Dir::State::status": here / "status",
            "Dir::Cache": here / "cache",
            "APT::Sandbox::User": "",
        }
        command, *rest = arguments
        words = [f"-o{name}={value}" for name, value in options.items()]
        try:
            return subprocess.run(
                [command, *words, *rest],
                cwd=cwd,
                check=True,
                text=True,
                capture_output=True,
            ).stdout
        except FileNotFoundError:
            raise Missing("kernels come from Debian's archive, and there is no apt here") from None
        except subprocess.CalledProcessError as error:
            raise Missing(f"{' '.join(arguments)}: {error.stderr.strip()}") from None

    def _update(self) -> None:
        """Reads the lists of packages once, from the mirror that the system uses."""
        if self._names:
            return
        known = subprocess.run(
            [
                "apt-get",
                "indextargets",
                "--format",
                "$(ORIGIN) $(REPO_URI)",
                "Created-By: Packages",
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        ).stdout
        mirrors = [line.split()[1] for line in known.splitlines() if line.startswith("Debian ")]
        mirror = next((uri for uri in mirrors if "security" not in uri), None)
        if mirror is None:
            raise Missing("this machine's apt knows no Debian archive")
        for name in ("lists/partial", "cache/archives/partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        (self.folder / "sources.list").write_text(
            "".join(
                f"deb [signed-by={KEYRING}] {mirror} {release} main\n"
                for release in KERNELS.values()
            )
        )
        self._apt("apt-get", "update")
        self._names = self._apt("apt-cache", "pkgnames").split()

    def _unpack(self, packages: list[str], folder: Path) -> None:
        self._update()
        folder.mkdir(parents=True)
        for package in packages:
            self._apt("apt-get", "download", package, cwd=folder)
        for file in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", file, folder], check=True)
            file.unlink()

    def fetch_kernel(self, version: str, folder: Path) -> None:
        """The newest kernel of a series, "6.1", unpacked into ``folder``."""
        self._update()
        found: dict[str, list[str]] = {}
        for name in self._names:
            if (match := NAME.fullmatch(name)) and match[2] == version:
                found.setdefault(match[1], []).append(name)
        if not found:
            series = {match[2] for name in self._names if (match := NAME.fullmatch(name))}
            known = ", ".join(sorted(series, key=numbers))
            raise Missing(f"Debian has no Linux {version} at present; it has {known}")
        self._unpack(found[max(found, key=numbers)], folder)

    def fetch_busybox(self, folder: Path) -> None:
        """A busybox that needs no libraries, as ``folder``/busybox."""
        self._unpack(["busybox-static"], folder)
        next(folder.glob("**/bin/busybox")).rename(folder / "busybox")


def numbers(version: str) -> list[int]:
    """A version as something to compare."""
    return [int(word) for word in re.findall(r"\d+", version)]


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, which ``make`` fills unless it is there. Half of one is never seen."""
    if not folder.exists():
        temporary = folder.with_name(f"{folder.name}.partial")
        subprocess.run(["rm", "-rf", temporary], check=True)
        make(temporary)
        temporary.rename(folder)
    return folder


def kernel_image(folder: Path) -> Path:
    """The file to boot, of an unpacked kernel."""
    found = [
        *folder.glob("boot/vmlinuz-*"),
        *folder.glob("usr/lib/modules/*/vmlinuz"),
        *folder.glob("lib/modules/*/vmlinuz"),
    ]
    if not found:
        raise Missing(f"{folder} has no kernel image")
    return found[0]
