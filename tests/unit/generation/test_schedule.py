"""Prompts that change in the middle of a video: from a table or from Python, to the chunks that are made of them."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from afd_scale.chunks import Chunks
from afd_scale.codecs.codec import VideoForm
from afd_scale.codecs.conversions import to_uint8
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import ConfigError
from afd_scale.data.video import read_video
from afd_scale.data.worlds.drop import ToyPrompt
from afd_scale.evaluation.video import read_title
from afd_scale.flow.randomness import Randomness
from afd_scale.generation.generate import Request, batches
from afd_scale.generation.job import Job, generate
from afd_scale.generation.requests import Script, chunks_of_schedule, embedded, schedule_of, scripts_of_file
from afd_scale.generation.student import load_student
from afd_scale.parallel.ranks import alone
from afd_scale.rollout.sampler import Sampler, scheduled
from tests.tools import call_tool

FIRST, SECOND, THIRD = TEXTS = [prompt.sentence for prompt in ToyPrompt.every()[::47]]
FRAMES, WINDOW = 18, {"window_frames": 4, "sink_frames": 1}


TOY = Path(__file__).parents[3] / "configs/toy/base"  # its chunk is one latent frame, three frames of the video


def table(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def expected(starts: list[tuple[int, str]], key: int, **sampler) -> np.ndarray:
    student = load_student(TOY, alone(), precision="fp32", sampler=sampler)
    codec = IdentityCodec()
    prompts = embedded(TEXTS, codec, student.policy.student)
    sampler = Sampler(student.policy.sampler)
    noise = sampler.draw(Randomness(0), "generation", 0, (key,), (FRAMES // 3, 48, 4, 4), torch.device("cpu"))
    text = scheduled([(start, prompts.embeddings[[TEXTS.index(text)]]) for start, text in starts])
    return to_uint8(codec.decode(sampler.rollout(student.network, text, noise)))[0]


def made(file: Path) -> np.ndarray:
    return read_video(file, VideoForm(FRAMES, 8.0, 16, 16, colour="rgb24")).astype(int)


def difference(file: Path, frames: np.ndarray) -> float:
    """Of a video's end, where all its prompts have been read."""
    return float(np.abs(made(file) - frames)[-3:].mean())


def test_rows_with_a_schedule_among_others(tmp_path, caplog):
    prompts = table(
        tmp_path / "prompts.jsonl",
        {"prompt": FIRST},
        {"prompt": SECOND, "schedule": [[0, SECOND], [7, f" {THIRD}  "], [15, FIRST]]},
        {"prompt": FIRST, "schedule": [[0, FIRST], [9, SECOND]]},
        {"prompt": THIRD},
    )
    with caplog.at_level(logging.INFO):
        done = call_tool("generate", TOY, "--prompts", prompts, "--frames", FRAMES, "--out", tmp_path / "out",
                         "--batch", 4, "--window", 4, "--sink", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"the prompt of frame 7 begins at frame 9, with a chunk: {THIRD}" in done.stderr + caplog.text
    files = sorted((tmp_path / "out").glob("*.mp4"))
    assert [read_title(file) for file in files] == [FIRST, SECOND, FIRST, THIRD]
    schedules = [[(0, FIRST)], [(0, SECOND), (3, THIRD), (5, FIRST)], [(0, FIRST), (3, SECOND)], [(0, THIRD)]]
    for key, (file, schedule) in enumerate(zip(files, schedules, strict=True)):
        ours = difference(file, expected(schedule, key, **WINDOW))
        assert ours < 2  # x264 is lossy
        if len(schedule) > 1:
            alone = expected(schedule[:1], key, **WINDOW)
            assert difference(file, alone) > 1.5 * ours, "or any text would do"
            assert np.abs(made(file)[:9] - alone[:9]).mean() < 1


def test_scripts_in_python(tmp_path):
    script = Script(FIRST, ((0, FIRST), (9, SECOND)))
    job = Job(TOY, tmp_path / "out", prompt=[script, THIRD], frames=FRAMES, window=3, sink=0, at_prompt_change="keep")
    files = [Path(file) for file in generate(job, alone())["files"]]
    sampler = {"window_frames": 3, "at_prompt_change": "keep"}
    ours = difference(files[0], expected([(0, FIRST), (3, SECOND)], 0, **sampler))
    assert ours < 2
    assert difference(files[1], expected([(0, THIRD)], 1, **sampler)) < 2
    recomputed = expected([(0, FIRST), (3, SECOND)], 0, window_frames=3)
    assert difference(files[0], recomputed) > 1.5 * ours, "or what is cached would not matter"


def test_videos_whose_prompts_change_together_are_made_together():
    texts = [(), (), ((0, 0), (2, 1)), ((0, 1), (2, 2)), ((0, 1), (3, 2)), ()]
    requests = [Request(number, number, Path(f"{number}.mp4"), each) for number, each in enumerate(texts)]
    made_together = [[request.key for request in batch] for batch in batches(requests, 4)]
    assert made_together == [[0, 1], [2, 3], [4], [5]]
    assert [len(batch) for batch in batches(requests[:2], 1)] == [1, 1]


class Wan:
    """Frames as Wan's VAE has them: one, and then four for each latent frame."""

    def frames(self, latent_frames):
        return 1 + 4 * (latent_frames - 1)


@pytest.mark.parametrize(
    ("frames", "chunks"), [((0, 81), (0, 7)), ((0, 9, 21), (0, 1, 2)), ((0, 1, 10), (0, 1, 2)), ((0, 70), (0, 7))]
)
def test_a_prompt_begins_at_a_chunk_of_its_frame_or_the_next_one(frames, chunks):
    script = Script("a", tuple((frame, "b") for frame in frames))
    assert chunks_of_schedule(script, 105, Wan(), Chunks(3)) == chunks


def test_a_prompt_may_begin_behind_a_first_chunk_of_another_length():
    script = Script("a", ((0, "a"), (1, "b"), (14, "c")))  # chunks begin at frames 0, 1, 13, 25
    assert chunks_of_schedule(script, 37, Wan(), Chunks(3, 1)) == (0, 1, 3)


@pytest.mark.parametrize(
    ("frames", "line"),
    [
        ((0, 82), "schedule (frame 82) must be 69 at the latest: in a video of 81 frames the last chunk begins there"),
        ((0, 10, 21), "schedule (frame 21) must leave each prompt a chunk: the one before it begins at frame 21 too"),
    ],
)
def test_a_prompt_without_a_chunk_is_refused(frames, line):
    with pytest.raises(ConfigError) as error:
        chunks_of_schedule(Script("a", tuple((frame, "b") for frame in frames)), 81, Wan(), Chunks(3))
    assert str(error.value) == line


LIST = "must be a list of [frame, prompt]: numbers and texts"
BAD = [
    ("words", LIST), ([], LIST), (7, LIST), ([[0]], LIST), ([[0, "a", 1]], LIST), ([["0", "a"]], LIST),
    ([[0, 3]], LIST), ([[True, "a"]], LIST), ([[0, "a"], 5], LIST), ({"0": "a"}, LIST),
    ([[1, "a"]], "must begin at frame 0 and rise"), ([[0, "a"], [0, "b"]], "must begin at frame 0 and rise"),
    ([[0, "a"], [4, "b"], [3, "c"]], "must begin at frame 0 and rise"), ([[0, "a"], [4, "  "]], "no empty prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "line"), BAD, ids=str)
def test_a_bad_schedule_is_one_line_with_its_place(tmp_path, schedule, line):
    path = table(tmp_path / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b", "schedule": schedule})
    with pytest.raises(ConfigError) as error:
        scripts_of_file(path)
    assert str(error.value).startswith(f"prompts ({path}): prompts.jsonl:2: schedule (")
    assert line in str(error.value)


def test_rows_that_differ_in_their_schedule_alone_are_two(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a", "schedule": None}, {"prompt": "a", "schedule": [[0, "a"], [3, "b"]]}]
    scripts = scripts_of_file(table(tmp_path / "prompts.jsonl", *rows))
    assert scripts == [Script("a"), Script("a", ((0, "a"), (3, "b")))]
    assert schedule_of([[0, " a\u00a0 b "]]) == ((0, "a b"),)


def test_a_sampler_is_refused_in_one_line(tmp_path):
    done = call_tool("generate", TOY, "--prompt", "a", "--window", 1, "--sink", 1, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "error: window_frames (1) must hold the sink (1) and one chunk (1)",
    )  # fmt: skip
