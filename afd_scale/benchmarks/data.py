"""How fast one process reads shards, as training reads them, and how fast a large job must be fed."""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afd_scale.config import RunConfig
from afd_scale.data.reader import Ahead, TeacherStream, check_dataset
from afd_scale.data.schema import DatasetFacts, TeacherSample
from afd_scale.data.writer import write_dataset

LATENTS, TEXT = (21, 16, 60, 104), (512, 4096)  # 81 frames of 832x480, and UMT5-XXL
_WAIT_STEPS, _WAIT_STEP_SECONDS = 8, 0.25  # steps that only sleep, while the next batch is drawn
GPUS, GLOBAL_BATCH = 256, 256
_BUCKET = "benchmark"


def benchmark_data(
    samples: int, repeats: int, step_seconds: float, text_rows: int,
    latents: tuple[int, ...] = LATENTS, text: tuple[int, int] = TEXT,
) -> dict[str, Any]:  # fmt: skip
    """Read a dataset of random latents to its end, by variants in turns.

    Local shards are unpacked before the clock runs, as at the start of training. Shards on S3 (moto's server, on this
    machine) are downloaded, unpacked and validated while it runs.
    """
    with tempfile.TemporaryDirectory() as folder, _object_storage() as storage:
        shards = {
            name: _write(Path(folder) / name, samples, latents, (text_rows, text[1]), text, name)
            for name in ("zstd", "none")
        }
        on_disk = {name: sum(path.stat().st_size for path in at.glob("shard.*")) for name, at in shards.items()}
        urls = {f"local, {name}": str(at) for name, at in shards.items()}
        if storage is not None:
            urls |= {f"s3, {name}": _upload(storage, at) for name, at in shards.items()}
        seconds: dict[str, list[float]] = {name: [] for name in urls}
        waits: dict[str, list[float]] = {name: [] for name in urls}
        for turn in range(repeats):
            for name, url in urls.items():
                spent, waited = _read(url, Path(folder) / f"cache{turn}", samples, latents, text)
                seconds[name].append(spent)
                waits[name].append(waited)
                shutil.rmtree(Path(folder) / f"cache{turn}", ignore_errors=True)
    rates = {name: samples / statistics.median(times) for name, times in seconds.items()}
    needed = GLOBAL_BATCH / step_seconds
    return {
        "samples_per_second": rates,
        "bytes_per_sample": {name: size / samples for name, size in on_disk.items()},
        "needed_by_job": {"gpus": GPUS, "global_batch": GLOBAL_BATCH, "step_seconds": step_seconds,
                          "samples_per_second": needed, "samples_per_second_per_gpu": needed / GPUS},
        "wait_share_of_step": {name: statistics.median(shares) for name, shares in waits.items()},
        "wait_step_seconds": _WAIT_STEP_SECONDS,
        "available_to_needed": {name: rate / (needed / GPUS) for name, rate in rates.items()},
        "shape": {"latents": list(latents), "text": list(text), "text_rows": text_rows, "samples": samples},
        "s3": "moto on this machine" if storage is not None else "left out: moto is not installed",
    }  # fmt: skip


def _write(
    folder: Path, samples: int, latents: tuple[int, ...], embedding: tuple[int, int], text: tuple[int, int],
    compression: str,
) -> Path:  # fmt: skip
    generator = np.random.default_rng(0)

    def make() -> Iterator[TeacherSample]:
        for number in range(samples):
            yield TeacherSample(
                prompt=f"prompt {number}", prompt_id=f"p{number}", meta={}, teacher="random", fps=16.0,
                text_embedding=generator.standard_normal(embedding).astype(np.float16),
                latents=generator.standard_normal(latents).astype(np.float16),
            )  # fmt: skip

    facts = DatasetFacts(latents, text, "none", "random", 0, {})
    write_dataset(make(), facts, folder, compression=compression)
    return folder


def _read(url: str, cache: Path, samples: int, latents: tuple[int, ...], text: tuple[int, int]) -> tuple[float, float]:
    """Seconds for all samples, one a batch; then the share of steps spent waiting for the next."""
    frames, channels, height, width = latents
    config = RunConfig.model_validate({
        "method": "sft", "out": cache,
        "student": {"architecture": "toy", "latent_channels": channels, "text_dim": text[1], "text_length": text[0],
                    "chunk_frames": 1},
        "data": {"shards": url, "cache": cache, "global_batch": 1, "latent_frames": frames, "latent_height": height,
                 "latent_width": width},
    })  # fmt: skip
    check_dataset(config)
    stream = TeacherStream(config)
    began = time.perf_counter()
    for _ in islice(stream, samples):
        pass
    spent = time.perf_counter() - began
    ahead = Ahead(stream, pinned=torch.cuda.is_available())
    next(ahead)
    began, ahead.waited_seconds = time.perf_counter(), 0.0
    for _ in range(_WAIT_STEPS):
        time.sleep(_WAIT_STEP_SECONDS)
        next(ahead)
    ahead.close()
    return spent, ahead.waited_seconds / (time.perf_counter() - began)


@contextmanager
def _object_storage() -> Iterator[str | None]:
    """The URL of an S3 server, which the environment names while it lasts; None where moto is not installed."""
    if find_spec("moto") is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    names = {"S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
             "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    before = {name: os.environ.get(name) for name in names}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ.update(names)
    try:
        _wait_for(url)
        yield url
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise ValueError(f"s3 ({url}) must answer within 20 s: moto's server did not start")


def _upload(url: str, folder: Path) -> str:
    import boto3

    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=_BUCKET)
    for path in folder.iterdir():
        client.upload_file(str(path), _BUCKET, f"{folder.name}/{path.name}")
    return f"s3://{_BUCKET}/{folder.name}"
