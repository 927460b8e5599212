"""Web servers of others, as they come: each serves a folder on a free port of loopback.

``python -m tests.servers.web`` prints the table of docs/sources.md, for those that are installed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Where tools/bootstrap.sh puts packages of npm.
NODE_MODULES = ROOT / ".venv-npm" / "node_modules"
LIMIT = 20.0


@dataclass
class Web:
    """A server that runs, and the folder that it serves."""

    name: str
    port: int
    folder: Path

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def put(self, name: str, data: bytes, age: float = 7200.0) -> None:
        """Write a file that was last changed ``age`` seconds ago; one of that name is replaced as
        a careful deployment does it, at once."""
        new = self.folder / "..new"
        new.write_bytes(data)
        new.chmod(0o644)
        then = time.time() - age
        os.utime(new, (then, then))
        new.rename(self.folder / name)

    def ask(self, name: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str]]:
        """Status and headers (names in lower case) of a plain request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            names = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request(method, f"/{name}", headers=names)
            reply = connection.getresponse()
            return reply.status, {key.lower(): value for key, value in reply.getheaders()}
        finally:
            connection.close()


class Bucket(Web):
    """One that keeps objects by itself, with dates of its own."""

    def url(self, name: str) -> str:
        return super().url(f"bucket/{name}")

    def put(self, name: str, data: bytes, age: float = 7200.0) -> None:
        boto3 = pytest.importorskip("boto3")
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key=name, Body=data, ACL="public-read")
        client.close()

    def ask(self, name: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str]]:
        return super().ask(f"bucket/{name}", method, **headers)


#: From the port, the folder to serve and one for other files to the command.
Make = Callable[[int, Path, Path], list[str]]


@dataclass(frozen=True)
class Kind:
    """How a server is started, and what it is known to do."""

    name: str
    make: Make
    #: What has to be there: a program, a module, or a package of npm.
    program: str | None = None
    module: str | None = None
    package: str | None = None
    #: The distribution of the module, for its version.
    distribution: str | None = None
    #: Whether it sends parts of files.
    ranges: bool = True
    #: What it answers to a request for the first bytes of an empty file.
    empty: int = 416
    #: Its validators: what kind of ETag, and whether a date.
    etag: str | None = "strong"
    date: bool = True
    #: Whether it refuses to send another version than was asked for (412).
    conditions: bool = True
    #: Whether a change is seen when neither the size nor the second of the date tells.
    same_second: bool = False
    #: Whether a connection serves many requests.
    keep_alive: bool = True
    #: Whether files have the dates that they were given.
    stamped: bool = True
    #: For people.
    remark: str = ""

    def missing(self) -> str | None:
        """Why it cannot be started, or None."""
        if self.program is not None and shutil.which(self.program, path=_PATH) is None:
            return f"{self.program} is not installed"
        if self.module is not None and util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if self.package is not None:
            if shutil.which("node") is None:
                return "node is not installed"
            if not (NODE_MODULES / self.package).is_dir():
                return f"{self.package} of npm is not installed"
        return None

    @property
    def version(self) -> str:
        if self.package is not None:
            found = json.loads((NODE_MODULES / self.package / "package.json").read_text())
            return str(found["version"])
        if self.program is not None:
            argument = "version" if self.program == "caddy" else "-v"
            program = shutil.which(self.program, path=_PATH)
            assert program is not None
            done = subprocess.run(
                [program, argument], capture_output=True, text=True, check=True, timeout=LIMIT
            )
            words = (done.stdout + done.stderr).replace("/", " ").split()
            return next(word.lstrip("v") for word in words if word.lstrip("v")[:1].isdigit())
        if self.distribution is None:
            return sys.version.split()[0]
        return metadata.version(self.distribution)


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _program(name: str) -> str:
    return shutil.which(name, path=_PATH) or name


def _nginx(port: int, folder: Path, work: Path) -> list[str]:
    (work / "nginx.conf").write_text(
        f"""
daemon off;
{"user root;" if os.geteuid() == 0 else ""}
worker_processes 1;
pid {work}/pid;
error_log {work}/errors;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {work}/1; proxy_temp_path {work}/2; fastcgi_temp_path {work}/3;
    uwsgi_temp_path {work}/4; scgi_temp_path {work}/5;
    server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""
    )
    return [_program("nginx"), "-p", str(work), "-e", f"{work}/errors", "-c", f"{work}/nginx.conf"]


def _apache(port: int, folder: Path, work: Path) -> list[str]:
    modules = "/usr/lib/apache2/modules"
    files = {name: f"{modules}/mod_{name}.so" for name in ("mpm_event", "authz_core", "unixd")}
    # What there is no file for is built in.
    lines = [
        f"LoadModule {name}_module {file}" for name, file in files.items() if os.path.exists(file)
    ]
    user = "User nobody\nGroup nogroup" if os.geteuid() == 0 else ""
    (work / "apache.conf").write_text(
        "\n".join(lines)
        + f"""
ServerRoot {work}
ServerName localhost
Listen 127.0.0.1:{port}
PidFile {work}/pid
DefaultRuntimeDir {work}
ErrorLog {work}/errors
{user}
DocumentRoot {folder}
<Directory {folder}>
    Require all granted
</Directory>
"""
    )
    return [_program("apache2"), "-DFOREGROUND", "-f", f"{work}/apache.conf"]


def _lighttpd(types: str) -> Make:
    def make(port: int, folder: Path, work: Path) -> list[str]:
        (work / "lighttpd.conf").write_text(
            f"""
server.modules = ()
server.bind = "127.0.0.1"
server.port = {port}
server.document-root = "{folder}"
server.errorlog = "{work}/errors"
{types}
"""
        )
        return [_program("lighttpd"), "-D", "-f", f"{work}/lighttpd.conf"]

    return make


def _caddy(port: int, folder: Path, work: Path) -> list[str]:
    (work / "Caddyfile").write_text(
        f"""{{
    admin off
    auto_https off
}}
http://127.0.0.1:{port} {{
    bind 127.0.0.1
    root * {folder}
    file_server
}}
"""
    )
    return ["env", f"HOME={work}", f"XDG_DATA_HOME={work}", f"XDG_CONFIG_HOME={work}",
            _program("caddy"), "run", "--config", f"{work}/Caddyfile"]  # fmt: skip


def _python(code: str) -> Make:
    """Code that has ``port`` and ``folder``."""

    def make(port: int, folder: Path, work: Path) -> list[str]:
        return [sys.executable, "-c", f"port, folder = {port}, {str(folder)!r}\n{code}"]

    return make


def _node(code: str) -> Make:
    def make(port: int, folder: Path, work: Path) -> list[str]:
        head = f"const port = {port}, folder = {json.dumps(str(folder))};"
        return ["node", "-e", head + code]

    return make


_TORNADO = """
import asyncio, tornado.web
async def main():
    files = (r"/(.*)", tornado.web.StaticFileHandler, {"path": folder})
    tornado.web.Application([files]).listen(port, "127.0.0.1")
    await asyncio.Event().wait()
asyncio.run(main())
"""
_AIOHTTP = """
from aiohttp import web
app = web.Application()
app.router.add_static("/", folder)
web.run_app(app, host="127.0.0.1", port=port, print=None)
"""
_STARLETTE = """
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
app = Starlette(routes=[Mount("/", StaticFiles(directory=folder))])
uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical")
"""
_FASTIFY = """
const send = require('@fastify/send');
require('http').createServer(async (request, reply) => {
    const found = await send(request, request.url, {root: folder, maxContentRangeChunkSize: 32768});
    reply.writeHead(found.statusCode, found.headers);
    found.stream.pipe(reply);
}).listen(port, '127.0.0.1');
"""


def _http_server(port: int, folder: Path, work: Path) -> list[str]:
    program = NODE_MODULES / "http-server" / "bin" / "http-server"
    return ["node", str(program), str(folder), "-a", "127.0.0.1", "-p", str(port), "-s"]


def _moto(port: int, folder: Path, work: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _module(name: str) -> Make:
    def make(port: int, folder: Path, work: Path) -> list[str]:
        return ["env", "-C", str(folder), sys.executable, "-m", name, str(port),
                "--bind", "127.0.0.1"]  # fmt: skip

    return make


KINDS = [
    Kind("nginx", _nginx, program="nginx", empty=200,
         remark="its ETag is the date in seconds and the size; a 412 says `keep-alive`, and ends"
         " the connection"),
    Kind("Apache", _apache, program="apache2", empty=200, same_second=True),
    Kind("lighttpd", _lighttpd('mimetype.assign = ( "" => "application/octet-stream" )'),
         program="lighttpd", empty=200, conditions=False, same_second=True,
         remark="looks at a file once a second; until then it sends what was there, with its ETag"),
    Kind("lighttpd, unknown type", _lighttpd('server.stat-cache-engine = "disable"'),
         program="lighttpd", empty=200, etag=None, date=False, conditions=False,
         remark="sends no validator for files whose MIME type is not configured: a warning"),
    Kind("Caddy", _caddy, program="caddy", remark="its ETag is the date in seconds and the size"),
    Kind("Tornado", _python(_TORNADO), module="tornado", distribution="tornado",
         conditions=False,
         remark="the ETag, a hash, is worked out once and stays when a file is replaced: the date"
         " tells; a range of the whole file is answered with 200"),
    Kind("aiohttp", _python(_AIOHTTP), module="aiohttp", distribution="aiohttp",
         same_second=True),
    Kind("Starlette, uvicorn", _python(_STARLETTE), module="starlette", distribution="starlette",
         conditions=False, same_second=True),
    Kind("http-server", _http_server, package="http-server", etag="weak", conditions=False,
         same_second=True),
    Kind("@fastify/send", _node(_FASTIFY), package="@fastify/send", etag="weak",
         same_second=True, remark="with `maxContentRangeChunkSize` it sends parts of a range"),
    Kind("RangeHTTPServer", _module("RangeHTTPServer"), module="RangeHTTPServer",
         distribution="rangehttpserver", etag=None, conditions=False, keep_alive=False,
         remark="answers `bytes=0-0` with the header of one byte and the body of all"),
    Kind("http.server", _module("http.server"), empty=200, ranges=False, etag=None,
         conditions=False, keep_alive=False,
         remark="`RangeNotSupportedError` for files of more than 64 KiB"),
    Kind("moto (S3)", _moto, module="moto.server", distribution="moto",
         stamped=False, keep_alive=False, same_second=True, remark="the ETag is the MD5"),
]  # fmt: skip


@contextlib.contextmanager
def web_server(kind: Kind) -> Iterator[Web]:
    """``kind`` over an empty folder. Skips the test with the reason if it is not installed."""
    if (reason := kind.missing()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as place:
        # Servers that were started by root read as somebody else.
        os.chmod(place, 0o755)
        folder, work = Path(place) / "files", Path(place) / "work"
        folder.mkdir(mode=0o755)
        work.mkdir(mode=0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        output = work / "output"
        with output.open("w") as file:
            process = subprocess.Popen(
                kind.make(port, folder, work),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "NODE_PATH": str(NODE_MODULES)},
            )
        try:
            _wait(port, process, output)
            yield (Web if kind.stamped else Bucket)(kind.name, port, folder)
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], output: Path) -> None:
    limit = time.monotonic() + LIMIT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > limit:
                text = output.read_text(errors="replace")
                raise RuntimeError(f"the server did not start: {text[-2000:]}") from None
        time.sleep(0.01)


HEAD = """\
| server | version | ETag, date | `If-Match` | empty file | what shows a replaced file | connections | remarks |
|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def row(kind: Kind, version: str) -> str:
    """What the tests have found, for docs/sources.md."""
    seen = ["size", *["date"] * kind.date, *["less than a second"] * kind.same_second]
    cells = [
        kind.name,
        version,
        f"{kind.etag or 'no ETag'}, {'date' if kind.date else 'no date'}",
        "heeded" if kind.conditions else "ignored",
        str(kind.empty),
        ", ".join(seen) if kind.ranges else "-",
        "kept" if kind.keep_alive else "one each",
        kind.remark,
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(HEAD + "\n".join(row(kind, kind.missing() or kind.version) for kind in KINDS))
