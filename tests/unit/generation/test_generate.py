"""tools/generate.py: which videos it makes, how they are named, what it says, and what it refuses."""

import errno
import gc
import json
import resource
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afd_scale.codecs.codec import VideoForm
from afd_scale.codecs.conversions import to_uint8
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.codecs.wan import WanCodec
from afd_scale.config.models import PolicyConfig
from afd_scale.config.run import ProceduralSource
from afd_scale.data.video import read_video
from afd_scale.data.worlds.drop import ToyPrompt
from afd_scale.evaluation.video import read_title, write_mp4
from afd_scale.flow.randomness import Randomness
from afd_scale.generation import generate, job
from afd_scale.generation.requests import embedded
from afd_scale.models.wan import CausalWan
from afd_scale.rollout.sampler import Sampler
from tests.students import TOY, save_student
from tests.tools import call_tool
from tests.toy_datasets import make_procedural_shards
from tests.wan_models import CHANNELS, TEXT_DIM, save_tiny_wan

TEXTS = [prompt.sentence for prompt in ToyPrompt.every()[:3]]
WAN = {**TOY, "latent_channels": CHANNELS, "text_dim": TEXT_DIM, "text_length": 12, "prediction": "velocity"}
GREY = VideoForm(24, 8.0, 16, 16, colour="rgb24")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "student"
    save_student(folder, TOY, window_frames=3, sink_frames=1)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> tuple[Path, Path]:
    """A frame-wise student of a tiny Wan, and the folder of its VAE and text encoder."""
    folder = tmp_path_factory.mktemp("wan")
    save_student(folder / "student", WAN)
    save_tiny_wan(folder / "models")
    return folder / "student", folder / "models"


def asked(texts=TEXTS) -> list[str]:
    return [part for text in texts for part in ("--prompt", text)]


def test_videos_longer_than_the_window(toy, tmp_path):
    done = call_tool("generate", toy, *asked(), "--frames", 24, "--out", tmp_path / "out", "--seed", 3, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    files = [Path(file) for file in found["files"]]
    assert [read_title(file) for file in files] == TEXTS
    assert (tmp_path / "out" / "contact_sheet.png").stat().st_size > 1000
    assert 0 < found["frames_per_second"]["with_decoding"] < found["frames_per_second"]["denoising"]
    assert 0 < found["seconds_to_first_chunk"] < found["seconds"]

    network = CausalWan(*(getattr(policy_of(toy), name) for name in ("student", "sampler")))
    network.load_state_dict(torch_state(toy))
    sampler, codec = Sampler(network.sampler), IdentityCodec()
    prompts = embedded(TEXTS, codec, network.config)
    noise = sampler.draw(Randomness(3), "generation", 0, (0, 1, 2), (8, 48, 4, 4), torch.device("cpu"))
    expected = to_uint8(codec.decode(sampler.rollout(network, prompts.embeddings, noise)))
    assert np.abs(expected[0].astype(int) - expected[1]).mean() > 16  # or any video would do
    for file, frames in zip(files, expected, strict=True):
        assert np.abs(read_video(file, GREY).astype(int) - frames).mean() < 4  # x264 is lossy


def policy_of(folder: Path) -> PolicyConfig:
    return PolicyConfig.model_validate_json((folder / "student.json").read_bytes())


def torch_state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_video_does_not_depend_on_the_others(toy, tmp_path):
    call_tool("generate", toy, *asked(), "--frames", 12, "--out", tmp_path / "three", "--batch", 3, "--num-videos", 2)
    call_tool("generate", toy, *asked(TEXTS[:1]), "--frames", 12, "--out", tmp_path / "one", "--num-videos", 2)
    names = sorted(path.name for path in (tmp_path / "one").glob("*.mp4"))
    assert [name[-6:] for name in names] == ["_0.mp4", "_1.mp4"]
    form = VideoForm(12, 8.0, 16, 16, colour="rgb24")
    first, second = (read_video(tmp_path / "one" / name, form).astype(int) for name in names)
    assert np.abs(first - second).mean() > 4
    assert np.abs(read_video(tmp_path / "three" / names[1], form) - second).mean() < 0.5  # but for rounding


def test_vbench_finds_five_videos_of_each_prompt(toy, tmp_path):
    done = call_tool("generate", toy, *asked(TEXTS[:2]), "--frames", 3, "--out", tmp_path / "out", "--layout", "vbench")
    assert done.returncode == 0, done.stderr
    there = {path.name for path in (tmp_path / "out").glob("*.mp4")}
    assert there == {f"{text}-{number}.mp4" for text in TEXTS[:2] for number in range(5)}


def test_prompts_of_a_dataset(toy, tmp_path):
    make_procedural_shards(ProceduralSource(clips=8), tmp_path / "shards")
    asked = ("generate", toy, "--dataset", tmp_path / "shards", "--out", tmp_path / "out", "--json")
    done = call_tool(*asked, "--models", "m")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "error: models (m) must not be given: codec identity:3x4x4 has none",
    )
    done = call_tool(*asked)
    assert done.returncode == 0, done.stderr
    listed = [json.loads(line) for line in (tmp_path / "shards" / "prompts.jsonl").read_text().splitlines()]
    files = sorted((tmp_path / "out").glob("*.mp4"))
    assert sorted(map(read_title, files)) == sorted(prompt["prompt"] for prompt in listed)
    assert read_video(files[0], VideoForm(12, 8.0, 16, 16)).shape == (12, 16, 16, 3)


@pytest.mark.parametrize("sampler", [{}, {"chunk_frames": 3, "first_chunk_frames": 1}], ids=str)
def test_an_image_is_the_first_frame(wan, tmp_path, sampler):
    (_, models), student = wan, tmp_path / "student"
    save_student(student, WAN, **sampler)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    options = ("--models", models, "--prompt", "a red ball", "--frames", 13, "--size", "32x32", "--json")
    for name, start in (("started", ("--image", tmp_path / "start.png")), ("free", ())):
        done = call_tool("generate", student, *options, *start, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        chunk = 4 * sampler.get("chunk_frames", 1)
        assert json.loads(done.stdout.splitlines()[-1])["chunk_frames"] == [1, chunk]
    form = VideoForm(13, 16.0, 32, 32)
    started, free = (
        read_video(next((tmp_path / name).glob("*.mp4")), form).astype(int) for name in ("started", "free")
    )
    codec = WanCodec(models)
    latents = codec.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None, None] / 127.5 - 1)
    first = to_uint8(codec.decode(latents))[0, 0]

    def likeness(video: np.ndarray) -> float:
        """Correlation of brightness; x264 takes colours together by four pixels."""
        return np.corrcoef(video[0].mean(-1).ravel(), first.mean(-1).ravel())[0, 1]

    assert likeness(started) > 0.9
    assert likeness(free) < 0.75


@pytest.mark.parametrize(
    ("sampler", "given"),
    [({"window_frames": 3, "sink_frames": 1}, 6), ({"chunk_frames": 2, "first_chunk_frames": 1}, 9)],
)
def test_a_video_goes_on(tmp_path, sampler, given):
    save_student(tmp_path / "student", TOY, **sampler)
    moving = np.zeros((12, 16, 16), np.uint8)
    for frame in range(12):
        moving[frame, 4:8, frame : frame + 4] = 255
    write_mp4(moving, tmp_path / "start.mp4", 8.0)
    done = call_tool("generate", tmp_path / "student", *asked(TEXTS[:1]), "--frames", 18, "--video",
                     tmp_path / "start.mp4", "--video-chunks", 2, "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = read_video(next((tmp_path / "out").glob("*.mp4")), VideoForm(18, 8.0, 16, 16)).astype(int)
    assert np.abs(made[:given].mean(-1) - moving[:given]).mean() < 8
    assert np.abs(made[given:12].mean(-1) - moving[given:12]).mean() > 16


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "prompt, prompts or dataset must be given"),
        (("--prompt", "a", "--prompts", "p.txt"), "prompt, prompts or dataset must be given, one of them"),
        (("--prompts", "p.md"), "prompts (p.md) must be one of .jsonl, .csv, .txt"),
        (("--prompt", "a", "--split", "test"), "split (test) must come with dataset"),
        (("--prompt", "a", "--frames", 0), "frames (0) must be positive"),
        (("--prompt", "a", "--size", "16"), "size (16) must be HEIGHTxWIDTH"),
        (("--prompt", "a", "--size", "12x16"), "must have a height of whole tokens, a multiple of 8"),
        (("--prompt", "a", "--sequence", 2), "sequence (2) must be 1 without a launcher"),
        (("--prompt", "a", "--image", "no.png"), "must be for a student whose first chunk is one frame"),
        (("--prompt", "a", "--video", "no.mp4"), "video (no.mp4): must be a readable file: it is not there"),
        (("--prompt", "a/b", "--layout", "vbench"), "prompt (a/b) must name a file with layout vbench"),
        (("--prompt", "word " * 20), "must have at most 16 words"),
        (("--prompt", "a", "--prompt", "word " * 20), "must have at most 16 words"),
        (("--prompt", "a", "--frames", 3, "--seconds", 1), "seconds (1) must not come with frames"),
        (("--prompt", "a", "--fps", 0), "fps (0.0) must be positive"),
        (("--prompt", "a", "--fps", "nan"), "fps (nan) must be positive, and at most"),
        (("--prompt", "a", "--frames", 10**30), f"frames ({10**30}) must be positive, and at most"),
        (("--prompt", "a", "--seconds", "inf"), "seconds (inf) must be positive, and at most"),
        (("--prompt", "a", "--seed", 10**30), f"seed ({10**30}) must be a number of 64 bits"),
        (("--prompt", "a\udcff"), "prompt (a\\udcff) must be text"),
        (("--prompt", "a", "--video-chunks", 2), "video_chunks (2) must come with video"),
        (("--prompt", "a", "--image", "no.png", "--video-chunks", 1), "video_chunks (1) must come with video"),
        (("--prompt", "a", "--architecture", "toy"), "architecture (toy) must not be given"),
        (("--prompt", "a", "--family", "toy"), "family (toy) must not be given"),
        (("--prompt", "a", "--prompt", "a", "--layout", "vbench"), "prompt (a) must be given once with layout vbench"),
        (("--prompt", "a" * 240, "--layout", "vbench"), "it is too long"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(toy, tmp_path, arguments, line):
    done = call_tool("generate", toy, *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert line in last
    assert not (tmp_path / "out").exists()


def test_other_sources_and_folders(toy, wan, tmp_path):
    for source, line in ((tmp_path / "none", "must exist"), (wan[0], "models must be given")):
        done = call_tool("generate", source, "--prompt", "a", "--out", tmp_path / "out")
        assert done.returncode == 2
        assert line in done.stderr
    done = call_tool("generate", toy, "--prompt", "a", "--out", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: out ({tmp_path}) must not exist yet: nothing is overwritten\n",
    )


@pytest.mark.parametrize("layout", ["plain", "vbench"])
def test_names_as_long_as_they_may_be(toy, tmp_path, layout):
    text = "\U0001d538" * 60 if layout == "plain" else "a" * 231
    done = call_tool("generate", toy, "--prompt", text, "--num-videos", 1, "--layout", layout, "--frames", 3,
                     "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [read_title(file) for file in (tmp_path / "out").glob("*.mp4")] == [text]


def test_frames_that_cannot_be_decoded_chunk_by_chunk_are_refused_before_they_are_made(wan, tmp_path):
    student, models = wan
    done = call_tool("generate", student, "--models", models, "--prompt", "a red ball", "--frames", 1,
                     "--size", "1088x1920", "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 2
    assert "error: size (1088x1920) must be 720x1264 at most, or another of 921600 pixels" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_empty_folder(toy, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        done = call_tool("generate", toy, "--prompt", "a", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith("error: ")
    assert line.endswith("File too large; no video is finished") or "; no video is finished" in line
    assert not (tmp_path / "out").exists()


def test_what_is_finished_stays_and_is_said(toy, tmp_path, monkeypatch):
    begun = []

    @contextmanager
    def until_it_is_full(path, *arguments, **more):
        begun.append(path)
        if len(begun) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        with writing(path, *arguments, **more) as write:
            yield write

    writing = generate.writing_mp4
    monkeypatch.setattr(generate, "writing_mp4", until_it_is_full)
    done = call_tool("generate", toy, *asked(), "--frames", 3, "--out", tmp_path / "out")
    assert done.returncode == 2
    said = f"No space left on device; finished videos, which stay in {tmp_path / 'out'}: 1"
    assert done.stderr.splitlines()[-1] == f"error: [Errno 28] {said}"
    assert list((tmp_path / "out").iterdir()) == begun[:1]


def test_the_text_encoder_is_gone_before_there_are_videos(toy, tmp_path, monkeypatch):
    made, alive = [], []

    class Seen(IdentityCodec):
        def embed(self, prompt):
            made.append(weakref.ref(self))
            return super().embed(prompt)

    def counted(*arguments):
        alive.append(sum(codec() is not None for codec in made))
        return write(*arguments)

    write = job.Generator.write
    monkeypatch.setattr(job, "codec_of", lambda name, **more: Seen())
    monkeypatch.setattr(job.Generator, "write", counted)
    gc.disable()
    try:
        done = call_tool("generate", toy, "--prompt", "a", "--frames", 3, "--out", tmp_path / "out")
    finally:
        gc.enable()
    assert done.returncode == 0, done.stderr
    assert (len(made), alive) == (1, [0])


def test_launchers_may_say_the_local_rank(toy, tmp_path):
    done = call_tool("generate", toy, "--local_rank=0", "--prompt", "a", "--frames", 3, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
