"""An S3 server over HTTP on this machine: moto's, in a process of its own. Tests and benchmarks share it."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUCKET = "shards"
_START_SECONDS = 20


@contextmanager
def object_storage() -> Iterator[dict[str, str]]:
    """The environment variables under which S3 is this server, which has one bucket.

    Raises:
        TimeoutError: it does not answer; moto is perhaps not installed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        "S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(url)
        client(environment).create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        server.terminate()
        server.wait(10)


def client(environment: dict[str, str]) -> Any:
    """A boto3 client of the server."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=environment["S3_ENDPOINT_URL"], region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


def upload(environment: dict[str, str], folder: Path, name: str) -> str:
    """Copy a dataset to the server; its URL."""
    s3 = client(environment)
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            s3.upload_file(str(path), BUCKET, f"{name}/{path.name}")
    return f"s3://{BUCKET}/{name}"


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"moto's S3 server must answer at {url} within {_START_SECONDS} s: it did not")
