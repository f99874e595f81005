"""tools/serve.py as it is called, and that the toy student streams faster than it is shown."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

from afd_scale.generation.generate import Clock
from tests.live_server import Watcher, studio_of
from tests.tools import call_tool

ROOT = Path(__file__).parents[3]
BASE = ROOT / "configs" / "toy" / "base"
PROMPT = "a bright large ball moves rightward quickly under strong gravity over a clay floor"


def test_a_toy_student_streams_faster_than_its_frame_rate_on_one_core(tmp_path):
    """By the core's own clock: other work on the machine does not count."""
    studio = studio_of(BASE, tmp_path, sink=1)
    text, frames = studio.embed(PROMPT), 96
    assert torch.get_num_threads() == 1
    began = time.thread_time()
    made = sum(map(len, studio.stream(lambda _: text, 0, frames, Clock(studio.device), lambda: None)))
    rate = made / (time.thread_time() - began)
    assert made == frames, "eight times the length that it learned"
    assert rate > 3 * studio.pixels.fps


def test_it_serves_until_it_is_told_to_stop(tmp_path):
    token = tmp_path / "token"
    token.write_text("correct-horse-battery\n")
    command = [
        sys.executable,
        "tools/serve.py",
        str(BASE),
        "--port",
        "0",
        "--token-file",
        str(token),
        "--host",
        "0.0.0.0",
    ]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:  # fmt: skip
        try:
            line = server.stdout.readline()
            port = re.search(r"http://0\.0\.0\.0:(\d+)/", line)[1]
            headers = {"Authorization": "Bearer correct-horse-battery"}
            assert httpx.get(f"http://127.0.0.1:{port}/v1/server").status_code == 401
            assert httpx.get(f"http://127.0.0.1:{port}/v1/server", headers=headers).json()["name"] == "base"
            with Watcher(f"http://127.0.0.1:{port}") as viewer:
                viewer.tell(token="correct-horse-battery", start={"prompt": PROMPT})
                while not viewer.chunks:
                    viewer.hear()
                server.send_signal(signal.SIGTERM)
                assert server.wait(20) == 0, "while somebody watches"
        finally:
            server.kill()
        assert "Traceback" not in server.stderr.read()
    assert not list(tmp_path.glob("afd-serve-*"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((BASE, "--host", "0.0.0.0"), "host (0.0.0.0) must come with token_file or token_env"),
        ((BASE, "--host", "no.such.host.invalid", "--token-env", "T"), "(no.such.host.invalid, 8000) must be"),
        ((BASE, "--token-env", "NONE"), "token_env (NONE) must hold a token"),
        ((BASE, "--token", "secret"), "--token"),
        (("nothing-here", "--port", "0"), "nothing-here"),
        ((BASE, "--port", "70000"), "must be a port"),
        ((BASE, "--port", "0", "--size", "10x10"), "must"),
        ((BASE, "--port", "0", "--viewers", "0"), "must be positive"),
        (("nothing-here", "--port", "0", "--keep-seconds", "1e308"), "(1e308) must be at most 1000000"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, arguments, why):
    monkeypatch.setenv("T", "correct-horse-battery")
    monkeypatch.delenv("NONE", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        done = call_tool("serve", *arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
