"""An S3 server of others (moto's), in a process of its own, and requests by plain boto3."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

LIMIT = 30.0
KEYS = {"access_key_id": "test-key", "secret_access_key": "test-secret", "region": "us-east-1"}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class S3Server:
    """Where it is, and a client to put things there."""

    endpoint: str
    client: Any

    @property
    def options(self) -> dict[str, Any]:
        """What `aiouffd.open` needs beside the URL."""
        return {
            "config": {**KEYS, "endpoint": self.endpoint},
            "client_options": {"allow_http": True},
        }

    def put(self, key: str, data: bytes) -> str | None:
        """Returns the version id, if the bucket has such."""
        answer = self.client.put_object(Bucket="bucket", Key=key, Body=data)
        return answer.get("VersionId")


@contextlib.contextmanager
def s3_server(*, versions: bool = False) -> Iterator[S3Server]:
    """A server with a bucket named ``bucket``."""
    pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(port, process)
        endpoint = f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=KEYS["access_key_id"],
            aws_secret_access_key=KEYS["secret_access_key"],
            region_name=KEYS["region"],
        )
        client.create_bucket(Bucket="bucket")
        if versions:
            client.put_bucket_versioning(
                Bucket="bucket", VersioningConfiguration={"Status": "Enabled"}
            )
        yield S3Server(endpoint, client)
        client.close()
    finally:
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + LIMIT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > limit:
                raise
        time.sleep(0.02)
