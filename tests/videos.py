"""Real video files for tests."""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
TEACHER_PROMPTS = ("a red ball falls", "a blue ball falls", "the cat on the moon", "water under the moon")


def moving_bar(frames: int, height: int, width: int, brightness: int = 200) -> Frames:
    """(T, H, W, 3): a bar that goes from left to right."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for number, image in enumerate(video):
        left = number * (width - 4) // max(1, frames - 1)
        image[:, left : left + 4] = brightness
    return video


def write_teacher(folder: Path) -> None:
    """Four mp4s of 32 x 32 with a table of their prompts, whose words the tokenizer of tests/wan_models.py has."""
    rows = []
    for number, text in enumerate(TEACHER_PROMPTS):
        colour = np.array([(220, 60, 40), (40, 80, 220), (200, 180, 60), (60, 160, 160)][number]) / 200
        bar = moving_bar(13, 32, 32).astype(float)
        frames = (bar if number % 2 else bar.transpose(0, 2, 1, 3)) * colour
        write_video(folder / f"{number}.mp4", frames.clip(0, 255).astype(np.uint8), 16)
        rows.append({"video": f"{number}.mp4", "prompt": text})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_video(
    path: Path,
    frames: Frames | Sequence[av.VideoFrame],
    rate: Fraction | int = 8,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    setup: Callable[[Any], object] | None = None,
    times: Iterable[int] | None = None,
    durations: Iterable[int] | None = None,
    rotation: int = 0,
    **stream_settings: Any,
) -> Path:
    """Write (T, H, W, 3), or (T, H, W) in grey, or frames, as the container that the suffix says.

    Args:
        options: of the container.
        setup: is given the stream before anything is written.
        times: of the frames, in units of 1 / rate; None shows one after another.
        durations: of the packets, in the same units; for codecs that keep frames in order.
        rotation: that the metadata asks players for, degrees.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        lossless = {"qp": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=lossless | (codec_options or {}))
        first = frames[0]
        size = (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        if pix_fmt == "gray":  # all values are used; a grey stream that does not say so is read as 16 to 235
            stream.codec_context.color_range = 2
        for name, value in stream_settings.items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        if setup:
            setup(stream)
        packets: list[av.Packet] = []
        for time, image in zip(times or range(len(frames)), frames, strict=True):
            frame = image if isinstance(image, av.VideoFrame) else _frame(image)
            frame.pts = time
            frame.time_base = 1 / Fraction(rate)
            packets += stream.encode(frame)
        packets += stream.encode()
        for duration, packet in zip(durations or [], packets, strict=False):
            packet.duration = round(duration / Fraction(rate) / packet.time_base)
        container.mux(packets)
    return path


def _frame(image: Frames) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(image, format="gray" if image.ndim == 2 else "rgb24")


def box(kind: str, content: bytes) -> bytes:
    """A box of an mp4."""
    return struct.pack(">I", 8 + len(content)) + kind.encode() + content


def add_box(path: Path, added: bytes, *parents: str) -> Path:
    """Put a box at the end of a nested one of an mp4. Its index lies behind its pictures, which do not move."""
    content = bytearray(path.read_bytes())
    places, begin, end = [], 0, len(content)
    for parent in parents:
        while bytes(content[begin + 4 : begin + 8]) != parent.encode():
            begin += int.from_bytes(content[begin : begin + 4], "big")
            assert begin < end, f"there is no {parent}"
        places.append(begin)
        end = begin + int.from_bytes(content[begin : begin + 4], "big")
        begin += {"stsd": 16, "avc1": 86}.get(parent, 8)
    for place in places:
        struct.pack_into(">I", content, place, int.from_bytes(content[place : place + 4], "big") + len(added))
    content[end:end] = added
    path.write_bytes(content)
    return path


def remuxed(
    path: Path, target: Path, change: Callable[[bytes], bytes] | None = None,
    setup: Callable[[Any], object] = lambda stream: None,
) -> Path:  # fmt: skip
    """The same packets in another container, with all that FFmpeg takes along.

    Args:
        change: of a packet's bytes, which are all that is kept of it then, and its times.
        setup: is given the new stream before anything is written.
    """
    with av.open(str(path)) as source, av.open(str(target), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        setup(stream)
        for packet in source.demux(video=0):
            if packet.size:
                packet = _changed(packet, change) if change else packet
                packet.stream = stream
                copy.mux(packet)
    return target


def _changed(packet: av.Packet, change: Callable[[bytes], bytes]) -> av.Packet:
    changed = av.Packet(change(bytes(packet)))
    changed.time_base = packet.time_base
    for name in ("pts", "dts", "duration", "is_keyframe"):
        setattr(changed, name, getattr(packet, name))
    return changed
