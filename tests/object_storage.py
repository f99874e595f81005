"""An S3 server over HTTP, for tests: moto's, in a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3

BUCKET = "shards"


@contextmanager
def object_storage() -> Iterator[dict[str, str]]:
    """The environment in which S3 is this server, with one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        "S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(url)
        client(environment).create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        server.terminate()
        server.wait(10)


def client(environment: dict[str, str]):
    return boto3.client(
        "s3", endpoint_url=environment["S3_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test",
        region_name="us-east-1",
    )  # fmt: skip


def upload(environment: dict[str, str], folder: Path, name: str) -> str:
    """Copy a dataset to the server; its URL."""
    for path in sorted(folder.iterdir()):
        client(environment).upload_file(str(path), BUCKET, f"{name}/{path.name}")
    return f"s3://{BUCKET}/{name}"


def _wait(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no S3 server at {url} (of {os.getpid()})")
