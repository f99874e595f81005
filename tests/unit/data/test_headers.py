"""Headers of damaged files: no size in them is trusted, and reading ends soon."""

import random
import struct
import time
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest

from afd_scale.codecs.codec import RejectedError
from afd_scale.data.headers import Header, read_header
from tests.videos import add_box, box, remuxed, write_video

SAMPLE_ENTRY = ("moov", "trak", "mdia", "minf", "stbl", "stsd", "avc1")
CLEAN = box("clap", struct.pack(">IIIIiIiI", 20, 1, 24, 1, 0, 1, -4, 1))


@pytest.fixture
def mp4(tmp_path: Path) -> Path:
    return add_box(write_video(tmp_path / "a.mp4", np.full((2, 32, 32), 90, np.uint8)), CLEAN, *SAMPLE_ENTRY)


def test_headers_of_whole_files(mp4: Path, tmp_path: Path) -> None:
    expected = Header(crop=(6, 0, 6, 8))
    assert read_header(mp4, "mov,mp4", 1, 0) == expected
    assert read_header(mp4, "mov,mp4", 2, 0) == Header(), "of no other track"
    mkv = remuxed(mp4, tmp_path / "a.mkv")
    assert read_header(mkv, "matroska,webm", 0, 0) == expected
    assert read_header(mkv, "matroska,webm", 0, 1) == Header()
    assert read_header(mkv, "avi", 0, 0) == Header()


def test_header_of_a_film_behind_its_sound(mp4: Path, tmp_path: Path) -> None:
    with av.open(str(mp4)) as source, av.open(str(tmp_path / "a.mkv"), "w") as copy:
        sound = copy.add_stream("pcm_s16le", rate=8000)
        film = copy.add_stream_from_template(source.streams.video[0])
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        samples.rate = 8000
        copy.mux(sound.encode(samples))
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = film
                copy.mux(packet)
    assert read_header(tmp_path / "a.mkv", "matroska,webm", 0, 0) == Header(crop=(6, 0, 6, 8))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_headers_of_damaged_files(mp4: Path, tmp_path: Path, suffix: str) -> None:
    content = (mp4 if suffix == "mp4" else remuxed(mp4, tmp_path / "a.mkv")).read_bytes()
    container = {"mp4": "mov,mp4", "mkv": "matroska,webm"}[suffix]
    chance = random.Random(0)
    began = time.monotonic()
    for _ in range(300):
        damaged = bytearray(content[: chance.randrange(len(content))] if chance.random() < 0.3 else content)
        for _ in range(chance.randrange(20)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.choice([0, 1, 127, 128, 255])
        (tmp_path / "b").write_bytes(damaged)
        with suppress(RejectedError):
            assert isinstance(read_header(tmp_path / "b", container, 1, 0), Header)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("container", ["mov,mp4", "matroska,webm"])
@pytest.mark.parametrize(
    "content", [b"", bytes(100_000), b"\xff" * 100_000, b"\x1a" * 99, struct.pack(">I", 8) * 90_000]
)
def test_headers_of_other_files(tmp_path: Path, content: bytes, container: str) -> None:
    (tmp_path / "a").write_bytes(content)
    assert read_header(tmp_path / "a", container, 1, 0) == Header()
