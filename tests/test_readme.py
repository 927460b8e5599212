"""The README can be followed: its programs run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import array
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd.util.extras import EXTRAS, install_hint
from tests.servers.http import start_in_process

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Stands in the README for a server that the test starts.
BASE = "http://127.0.0.1:8000"
#: Seconds for one program, enforced from outside the process.
LIMIT = 60


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _commands() -> list[list[str]]:
    lines = "".join(_blocks("console")).splitlines()
    return [shlex.split(line[2:]) for line in lines if line.startswith("$ ")]


COMMANDS = _commands()


def _of(program: str) -> list[list[str]]:
    return [command for command in COMMANDS if command[0] == program]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        ["timeout", "-k", "5", str(LIMIT), *command],
        cwd=folder,
        input="",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"},
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the README makes, in a folder of its own."""
    path = tmp_path_factory.mktemp("readme") / "weights.bin"
    with path.open("wb") as file:
        array.array("f", range(1 << 22)).tofile(file)
    return path


@pytest.fixture(scope="module")
def server(weights: Path) -> Iterator[str]:
    with start_in_process({"weights.bin": weights}) as running:
        yield running.url("")


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_python_block(number: int, weights: Path, server: str) -> None:
    program = _blocks("python")[number].replace(BASE, server)
    done = _run([sys.executable, "-W", "error", "-c", program], weights.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_there_are_python_blocks() -> None:
    assert len(_blocks("python")) >= 5
    assert BASE in "".join(_blocks("python"))


@pytest.mark.parametrize("command", _of("python"), ids=" ".join)
def test_python_command(command: list[str], weights: Path, tmp_path: Path) -> None:
    """Servers end at once, for their standard input has ended; their port is any free one."""
    if "-c" not in command:
        (tmp_path / "weights.bin").symlink_to(weights)
    arguments = ["0" if argument == "8000" else argument for argument in command[1:]]
    arguments = [
        str(ROOT / argument) if (ROOT / argument).is_file() else argument for argument in arguments
    ]
    if "range_server.py" in command[1]:
        arguments.append("--until-eof")
    done = _run([sys.executable, *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights.bin").read_bytes() == weights.read_bytes()


#: Commands that run until they are told to end.
SERVERS = ("nbd", "pager")


@pytest.mark.parametrize(
    "command", [command for command in _of("aiouffd") if command[1] not in SERVERS], ids=" ".join
)
def test_aiouffd_command(command: list[str], weights: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").symlink_to(weights)
    done = _run([sys.executable, "-m", *command], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", [command for command in _of("aiouffd") if command[1] in SERVERS], ids=" ".join
)
def test_aiouffd_server(command: list[str], weights: Path, tmp_path: Path) -> None:
    """It says where it listens, and ends well when it is asked to. Its port is any free one."""
    (tmp_path / "weights.bin").symlink_to(weights)
    arguments = ["0" if argument == "10809" else argument for argument in command]
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
        assert process.returncode == 0, said


@pytest.mark.parametrize("command", _of("make"), ids=" ".join)
def test_make_target_exists(command: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in command[1:]:
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE)


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for command in _of("pip"):
        assert command[1] == "install"
        for name in re.findall(r"\[(.*?)\]", command[2]):
            assert name in extras


def test_what_is_installed_is_enough() -> None:
    """The programs need what the line above them installs, and no more."""
    (command,) = _of("pip")
    assert command[2:] == [".[http]", "numpy"]
    blocks = "".join(_blocks("python"))
    imported = set(re.findall(r"^(?:import|from) (\w+)", blocks, re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"aiouffd", "numpy"}


def test_hints_name_what_the_extras_have() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {name: tuple(extras[name]) for name in EXTRAS} == EXTRAS
    for name in EXTRAS:
        assert install_hint(name).startswith("pip install '")


@pytest.mark.parametrize("folder", ["aiouffd", "examples", "docs", "benchmarks"])
def test_nobody_is_sent_to_an_index_that_has_no_such_package(folder: str) -> None:
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", ".md", ".sh"):
            assert not re.search(r"pip install '?\"?aiouffd", path.read_text()), path


def test_every_command_is_tested() -> None:
    assert {command[0] for command in COMMANDS} == {"make", "pip", "python", "aiouffd"}


def _anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as they are made on GitHub."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), target
