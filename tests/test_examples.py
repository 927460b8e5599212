"""Every example runs to its end, says what it should, and does without what is optional."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from aiouffd.kernel.probe import probe
from tests.support import ROOT, Outcome, environment

#: What they show is tested elsewhere on every Python: they run on the default one.
pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
#: Seconds for one example; all take a few at most.
LIMIT = 60

# Runs a program as if some packages were not installed.
WITHOUT = """
import os, runpy, sys
missing, path, *rest = sys.argv[1:]
sys.path.insert(0, os.path.dirname(path))
sys.modules.update(dict.fromkeys(missing.split(",")))
sys.argv = [path, *rest]
runpy.run_path(path, run_name="__main__")
"""


def run(name: str, *arguments: str, without: str = "", **variables: str) -> Outcome:
    path = str(EXAMPLES / name)
    start = ["-c", WITHOUT, without, path] if without else [path]
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        env=environment(PYTHONPATH=PYTHONPATH, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=LIMIT,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr, 0.0)


def output_of(name: str, *arguments: str, without: str = "", **variables: str) -> str:
    """What it prints, after checking that it ended well and complained of nothing."""
    outcome = run(name, *arguments, without=without, **variables)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stderr == ""
    return outcome.stdout


def test_all_examples_are_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*/run.py")):
        assert f"({path.relative_to(EXAMPLES)})" in listed


# ------------------------------------------------------------------- the demo


def test_demo_fetches_little_and_verifies() -> None:
    text = output_of("lazy_weights.py", "--size=64", "--plain", "--no-eager")
    assert "64 MiB, 57 tensors" in text
    assert text.count("as expected") == 3
    share = re.search(r"bytes fetched.*\(([\d.]+)%\)", text)
    assert share is not None
    # Two tensors of 1 MiB and some rows are wanted; readahead brings more.
    assert 2 < float(share[1]) < 50
    rows = re.findall(r"^ *\d+ (?:B|MiB) ([0-9.]{32})", text, re.MULTILINE)
    assert len(rows) == 16
    assert any("." in row for row in rows)
    assert rows[0][0].isdigit()


def test_demo_compares_with_a_download() -> None:
    text = output_of("lazy_weights.py", "--size=16", "--plain")
    assert re.search(r"lazily +by download", text)
    assert re.search(r"time to first byte +[\d.]+ m?s +[\d.]+ m?s", text)
    assert re.search(r"bytes fetched .*16 MiB$", text, re.MULTILINE)


def test_demo_in_colour() -> None:
    text = output_of(
        "lazy_weights.py", "--size=16", FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="120"
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert plain.count("✓ as expected") == 3
    assert "requests under way" in plain
    assert "colour: 0 ████" in plain


def test_demo_in_sixteen_colours_has_digits() -> None:
    text = output_of("lazy_weights.py", "--size=16", "--no-eager", FORCE_COLOR="1", TERM="xterm")
    assert "0 at the start ... 9 at the end" in text


@pytest.mark.parametrize("missing", ["rich", "uvloop", "rich,uvloop"])
def test_demo_without_niceties(missing: str) -> None:
    text = output_of("lazy_weights.py", "--size=16", "--no-eager", without=missing)
    assert text.count("as expected") == 3


@pytest.mark.parametrize("missing", ["numpy", "aiohttp"])
def test_demo_says_what_it_needs(missing: str) -> None:
    text = output_of("lazy_weights.py", without=missing)
    assert text == f"skipped: this needs {missing}; pip install numpy aiohttp\n"


def test_demo_without_matplotlib_draws_no_picture(tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    arguments = ("--size=16", "--plain", "--no-eager", f"--png={picture}")
    text = output_of("lazy_weights.py", *arguments, without="matplotlib")
    assert text.endswith(f"no {picture}: matplotlib is not installed\n")
    assert not picture.exists()


def test_demo_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.png"
    output_of("lazy_weights.py", "--size=16", "--plain", "--no-eager", f"--png={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_refuses_nonsense() -> None:
    assert run("lazy_weights.py", "--size=1").status == 2


# ------------------------------------------------------------------ the others


def test_sync_script() -> None:
    text = output_of("sync_script.py")
    assert "first: [ 0  1  4  9 16]" in text
    assert f"last: {((8 << 20) - 1) ** 2}" in text
    share = re.search(r"read for that: ([\d.]+)% of it", text)
    assert share is not None
    assert 0 < float(share[1]) < 5


def test_sync_script_with_a_path(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(b"".join(n.to_bytes(8, "little") for n in range(1000)))
    assert "middle: 500, last: 999" in output_of("sync_script.py", str(path))


def test_sync_script_without_numpy() -> None:
    assert output_of("sync_script.py", without="numpy").startswith("skipped: this needs numpy")


def test_tcp_pager() -> None:
    text = output_of("tcp_pager.py")
    assert "40 bytes read, 0 of them wrong" in text
    assert "all of it hashed: the same, 256 blocks" in text


def test_raw_uffd() -> None:
    text = output_of("raw_uffd.py")
    if not probe().kernel_mode_faults:
        assert text.startswith("skipped:")
        return
    assert re.findall(r"fault on page (\d)", text) == ["5", "2", "7"]
    assert "read: page 5, page 2, page 2, page 7" in text


def test_kvm_guest() -> None:
    text = output_of("kvm_guest.py")
    found = probe()
    if not (found.kvm and found.kernel_mode_faults and found.machine == "x86_64"):
        assert text.startswith("skipped:")
        return
    assert "the guest said: Hello from lazy memory, everyone" in text
    assert "fetched 2,097,152 of 67,108,864 bytes" in text


# ---------------------------------------------------------------- the microVM


def test_microvm() -> None:
    text = output_of("microvm/run.py")
    found = probe()
    if not (found.kvm and found.kernel_mode_faults and found.machine == "x86_64"):
        assert text.startswith("skipped:")
        return
    assert text.count("guest: what the balloon took reads as zeros") == 3
    assert text.count("as they should be") == 3
    lazily, ahead, copied = fetched(text)
    # 32 places and a few pages of the guest itself, in blocks of 64 KiB.
    assert 0.5 < lazily < 1.5
    assert ahead == lazily
    assert copied == 100


def test_microvm_says_what_it_needs() -> None:
    text = output_of("microvm/run.py", without="aiohttp")
    assert text == "skipped: this needs aiohttp; pip install aiohttp\n"


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("place", "said"),
    [(None, "all as they should be"), (0x77777, "SOME OF THEM WRONG"), ("list", "SOME OF")],
    ids=["whole", "elsewhere", "in the list"],
)
def test_microvm_sees_what_is_wrong(tmp_path: Path, place: Any, said: str) -> None:
    found = probe()
    if not (found.kvm and found.machine == "x86_64"):
        pytest.skip("needs x86-64 and /dev/kvm")
    assert output_of("microvm/vmm.py", "snapshot", str(tmp_path), "--size=8") == ""
    memory = tmp_path / "memory"
    data = bytearray(memory.read_bytes())
    assert len(data) == 8 << 20
    if place == "list":  # the guest's parameters end with the address of the first element
        place = int.from_bytes(data[0x2018:0x201C], "little") + 4
    if place is not None:
        data[place] ^= 1
    memory.write_bytes(data)
    outcome = run("microvm/vmm.py", "restore", str(tmp_path), f"--copy={memory}")
    assert outcome.status == (place is not None)
    assert outcome.stderr == ""
    assert outcome.stdout.startswith("guest: the list adds up to ")
    assert said in outcome.stdout


def test_criu_lazy_pages() -> None:
    text = output_of("criu_lazy_pages.py")
    assert "it runs: 3 pages touched, 2 faults, 131,072 of 2,097,152 bytes fetched" in text
    assert "restored: 2,097,152 bytes fetched" in text
    assert "its memory is as it was" in text


def test_criu_lazy_pages_without_protobuf() -> None:
    text = output_of("criu_lazy_pages.py", without="google.protobuf")
    assert text == "skipped: reading CRIU's images needs protobuf (pip install 'protobuf>=4.22')\n"


# ---------------------------------------------------------- formats that users open


def fetched(text: str) -> list[float]:
    """The shares of the file, in per cent, that the example says were fetched by then."""
    found = re.findall(r"([\d,]+) of ([\d,]+) bytes", text)
    return [100 * int(a.replace(",", "")) / int(b.replace(",", "")) for a, b in found]


def test_safetensors_tensors() -> None:
    text = output_of("safetensors_tensors.py")
    assert "<Tensors: 48 tensors, 25214976 bytes>, {'format': 'np'}" in text
    assert text.count("as it should be") == 5
    assert "are in 2 of 3 files" in text
    one, several = fetched(text)
    # A tensor of 1 MiB, a bias and a row; a tensor and a bias: of 24 MiB.
    assert 4 < one < 6
    assert 4 < several < 6


def test_arrow_ipc() -> None:
    text = output_of("arrow_ipc.py")
    assert "262,144 rows, 24 columns" in text
    assert ", 0 bytes allocated" in text
    assert text.count("as it should be") == 2
    table, touched, ahead = fetched(text)
    # One column is 4.2% of the file.
    assert table < 1
    assert table + 4 < touched < 14
    assert touched + 4 < ahead < touched + 10


def test_parquet_columns() -> None:
    text = output_of("parquet_columns.py")
    assert "200,000 rows, 31 columns" in text
    assert "column 4, names: as they should be" in text
    (share,) = fetched(text)
    assert 5 < share < 20


def test_npy_npz() -> None:
    text = output_of("npy_npz.py")
    assert text.count("as it should be") == 3
    assert "part0, part1, part2, part3, part4, part5, part6, part7, labels" in text
    rows, members, row = fetched(text)
    assert rows < 2
    assert members < row < 3


def test_torch_tensors() -> None:
    text = output_of("torch_tensors.py")
    if importlib.util.find_spec("torch") is None:
        assert text.startswith("skipped: this needs torch;")
        pytest.skip(
            "torch is not installed: tools/bootstrap.sh does that where there is a small one"
        )
    assert text.count("as it should be") == 3
    at_first, at_last = fetched(text)
    assert at_first < 1
    # One of twelve layers and four rows.
    assert 4 < at_last < 8


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("safetensors_tensors.py", "safetensors"),
        ("arrow_ipc.py", "pyarrow"),
        ("parquet_columns.py", "pyarrow"),
        ("npy_npz.py", "numpy"),
        ("torch_tensors.py", "torch"),
        ("torch_tensors.py", "aiohttp"),
    ],
)
def test_formats_say_what_they_need(name: str, missing: str) -> None:
    text = output_of(name, without=missing)
    assert re.fullmatch(rf"skipped: this needs {missing}(\.\w+)?; pip install [\w ]+\n", text)
    assert missing in text.split("pip install")[1]


# ------------------------------------------------------------ the range server


def test_range_server(tmp_path: Path) -> None:
    path = tmp_path / "data"
    data = bytes(range(256)) * 40
    path.write_bytes(data)
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "range_server.py"), str(path), "--until-eof"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        url = server.stdout.readline().strip()

        def ask(**headers: str) -> tuple[int, bytes, str | None]:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            try:
                with urllib.request.urlopen(urllib.request.Request(url, headers=named)) as reply:
                    return reply.status, reply.read(), reply.headers["Content-Range"]
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read(), error.headers["Content-Range"]

        size = len(data)
        assert ask() == (200, data, None)
        assert ask(Range="bytes=5-9") == (206, data[5:10], f"bytes 5-9/{size}")
        assert ask(Range="bytes=-3")[:2] == (206, data[-3:])
        assert ask(Range=f"bytes={size - 2}-")[:2] == (206, data[-2:])
        assert ask(Range=f"bytes={size}-") == (416, b"", f"bytes */{size}")
        assert ask(If_Match='"other"', Range="bytes=0-0")[0] == 412
        server.stdin.close()
        assert server.wait(LIMIT) == 0


@pytest.mark.parametrize("stdin", ["nothing", "a file", "closed", "a pipe that has ended"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_range_server_without_a_terminal(tmp_path: Path, stdin: str, number: int) -> None:
    """As a service, or in the background of a script."""
    path = tmp_path / "data"
    path.write_bytes(b"abc")
    command = [sys.executable, str(EXAMPLES / "range_server.py"), str(path)]
    if stdin == "closed":
        command = ["sh", "-c", 'exec "$0" "$@" <&-', *command]
    given: Any = {"nothing": subprocess.DEVNULL, "a pipe that has ended": subprocess.PIPE}
    with (
        path.open() as file,
        subprocess.Popen(
            command, stdin=given.get(stdin, file), stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        if server.stdin is not None:
            server.stdin.close()
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with urllib.request.urlopen(url) as reply:
            assert reply.read() == b"abc"
        server.send_signal(number)
        assert server.wait(LIMIT) == 0


@pytest.mark.parametrize(
    "path",
    [*EXAMPLES.glob("*.py"), *(EXAMPLES / "microvm" / name for name in ("run.py", "vmm.py"))],
    ids=lambda path: path.name,
)
def test_help_and_wrong_arguments(path: Path) -> None:
    outcome = run(str(path), "--help")
    assert outcome.status == 0, outcome.stderr
    assert outcome.stderr == ""
    assert outcome.stdout.startswith(("usage:", "skipped:"))
    if outcome.stdout.startswith("usage:"):
        outcome = run(str(path), "--no-such-option")
        assert outcome.status == 2
        assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("range_server.py", ("/nowhere/file",)),
        ("range_server.py", (__file__, "--port=99999")),
        ("sync_script.py", ("/nowhere/file",)),
        ("sync_script.py", ("http://127.0.0.1:1/x",)),
        ("sync_script.py", ("no-such-scheme://x",)),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(name: str, arguments: tuple[str, ...]) -> None:
    outcome = run(name, *arguments)
    assert outcome.status in (1, 2)
    assert outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_page_server_for_a_program_in_c() -> None:
    text = output_of("page_server.py")
    assert text.startswith("skipped:") or ("as expected" in text and "4 MiB in 1024" in text)
