"""An exported pipeline, in a process of its own, computes what our sampler and codec compute."""

import importlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from afd_scale.checkpoint.load_student import read_student
from afd_scale.checkpoint.weights import save_weights
from afd_scale.codecs.conversions import to_unit
from afd_scale.codecs.wan import WanCodec
from afd_scale.config.models import PolicyConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.models.wan import CausalWan
from afd_scale.rollout.sampler import Noise, Sampler
from afd_scale.torchvision_ops import define_torchvision_ops
from tests.networks import make_policy
from tests.parity.test_golden import load_golden
from tests.tools import call_tool
from tests.wan_models import CHANNELS, TEXT_DIM, save_tiny_wan

TOLERANCE = 1e-4
# Three heads of width 22 split RoPE unevenly: 5, 3 and 3 pairs.
SIZES: dict[str, Any] = {
    "dim": 66, "ffn_dim": 70, "num_heads": 3, "num_layers": 2, "freq_dim": 18, "text_dim": TEXT_DIM,
    "text_length": 24, "latent_channels": CHANNELS, "prediction": "velocity", "timestep_shift": 5.0,
}  # fmt: skip
# Fields of the student, and latent frames of a video; the last but one is longer than its window.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "chunks of 3": ({"chunk_frames": 3}, 9),
    "frame-wise": ({"chunk_frames": 1}, 5),
    "first chunk": ({"chunk_frames": 2, "first_chunk_timesteps": (1000, 800, 500, 100), "timesteps": (900, 300)}, 6),
    "window": ({"chunk_frames": 1, "window_frames": 3, "timesteps": (1000, 500)}, 8),
    "window and sink": ({"chunk_frames": 2, "window_frames": 6, "sink_frames": 2, "timestep_shift": 3.0}, 14),
    "places in the window": (
        {"chunk_frames": 2, "window_frames": 8, "sink_frames": 2, "positions": "window", "timesteps": (1000, 500)}, 18,
    ),
    "one, then threes": ({"chunk_frames": 3, "first_chunk_frames": 1}, 7),
    "one as the sink": (
        {"chunk_frames": 2, "first_chunk_frames": 1, "window_frames": 5, "sink_frames": 1, "timesteps": (900, 500)}, 13,
    ),
    "three, and places in the window": (
        {"chunk_frames": 2, "first_chunk_frames": 3, "window_frames": 7, "sink_frames": 3, "positions": "window",
         "timesteps": (1000, 500)}, 17,
    ),
    "x0": ({"chunk_frames": 1, "prediction": "x0", "patch": (1, 1, 1)}, 4),
}  # fmt: skip
PROMPTS = ["the red ball falls on the moon", "a  cat &amp; water"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_wan(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """diffusers copies a folder's code to where it imports it from: not into the user's cache."""
    define_torchvision_ops()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code")))
        patch.setattr(sys, "path", list(sys.path))
        yield


def make_student(**fields: Any) -> CausalWan:
    """A student with every parameter random."""
    torch.manual_seed(3)
    model = make_policy({**SIZES, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return model.eval()


def export(model: CausalWan, folder: Path, models: Path | str) -> Path:
    config = PolicyConfig(student=model.config, sampler=model.sampler)
    save_weights(model.state_dict().items(), folder / "student", config)
    done = call_tool(
        "convert_checkpoint", folder / "student", folder / "exported", "--to", "pipeline", "--models", models
    )
    assert done.returncode == 0, done.stderr
    return folder / "exported"


def load(folder: Path, **fields: Any) -> Any:
    pipe = importlib.import_module("diffusers").DiffusionPipeline.from_pretrained(
        folder, trust_remote_code=True, **fields
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_noise(model: CausalWan, frames: int, batch: int = 2) -> Noise:
    generator = torch.Generator().manual_seed(7)
    shape = (batch, frames, model.config.latent_channels, 4, 6)
    first, later = Sampler(model.sampler).first_sigmas, Sampler(model.sampler).sigmas
    steps = max(len(first), len(later))
    return Noise(torch.randn(shape, generator=generator), torch.randn((steps - 1, *shape), generator=generator))


def as_theirs(noise: Noise) -> dict[str, Tensor]:
    return {"latents": noise.initial.transpose(1, 2), "renoise": noise.again.transpose(2, 3)}


def embeddings(models: Path, model: CausalWan) -> Tensor:
    codec = WanCodec(models, text_length=model.config.text_length)
    rows = [torch.from_numpy(codec.embed(prompt)) for prompt in PROMPTS]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()


def rollout(model: CausalWan, models: Path, noise: Noise) -> Tensor:
    """(B, C, F, H, W) latents of our own sampler."""
    return Sampler(model.sampler).rollout(model, embeddings(models, model), noise).transpose(1, 2)


@pytest.mark.parametrize("case", CASES)
def test_the_same_latents(case: str, models: Path, tmp_path: Path) -> None:
    """From prompts, given our noise."""
    fields, frames = CASES[case]
    model = make_student(**fields)
    pipe = load(export(model, tmp_path, models))
    noise = make_noise(model, frames)
    ours = rollout(model, models, noise)
    assert ours.std() > 0.3
    seen: list[Tensor] = []
    theirs = pipe(PROMPTS, **as_theirs(noise), output_type="latent", callback_on_chunk=lambda _, x: seen.append(x))
    difference = (theirs.frames - ours).abs().max().item()
    print(f"{case}: latents differ by {difference:.1e}")
    assert difference < TOLERANCE
    assert torch.equal(torch.cat(seen, dim=2), theirs.frames)
    assert [chunk.shape[2] for chunk in seen] == model.sampler.chunks.lengths(frames)


def test_the_same_embeddings(models: Path, tmp_path: Path) -> None:
    model = make_student()
    pipe = load(export(model, tmp_path, models))
    theirs, ours = torch.cat([pipe.encode_prompt(prompt) for prompt in PROMPTS]), embeddings(models, model)
    assert theirs.shape == (2, 24, TEXT_DIM)
    assert torch.equal(theirs[:, : ours.shape[1]].float(), ours)
    assert not theirs[:, ours.shape[1] :].any()
    torch.testing.assert_close(pipe.encode_prompt(PROMPTS), theirs, atol=2e-3, rtol=0)  # a batch rounds otherwise


@pytest.mark.parametrize(
    "golden", sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors")), ids=lambda path: path.stem
)
def test_the_reference_rollout(golden: Path, tmp_path: Path) -> None:
    """What the Self-Forcing implementation itself computed."""
    reference = load_golden(golden, "plain")
    noise = Noise(reference.io["rollout_noise"], reference.io["rollout_renoise"])
    pipe = load(export(reference.model, tmp_path, "none"))
    latents = pipe(prompt_embeds=reference.io["text"], **as_theirs(noise), output_type="latent").frames
    difference = (latents - reference.io["rollout_latents"].transpose(1, 2)).abs().max().item()
    print(f"{golden.stem}: latents differ by {difference:.1e}")
    assert difference < 2e-4


def test_in_bfloat16(models: Path, tmp_path: Path) -> None:
    """As it is run on a GPU; the VAE stays in float32."""
    model = make_student(chunk_frames=1, window_frames=3, sink_frames=1)
    dtypes = {"vae": torch.float32, "default": torch.bfloat16}
    pipe = load(export(model, tmp_path, models), torch_dtype=dtypes)
    assert (pipe.transformer.blocks[0].attn1.to_q.weight.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    noise = make_noise(model, 5)
    latents = pipe(PROMPTS, **as_theirs(noise), output_type="latent").frames
    assert latents.dtype == torch.float32
    error, ours = latents - rollout(model, models, noise), rollout(model, models, noise)
    assert error.std() < 0.1 * ours.std()
    assert pipe(PROMPTS, **as_theirs(noise), output_type="pt").frames.dtype == torch.float32


@pytest.mark.parametrize("case", ["chunks of 3", "frame-wise"])
def test_streamed_frames_are_those_decoded_at_once(case: str, models: Path, tmp_path: Path) -> None:
    fields, frames = CASES[case]
    model = make_student(**fields)
    pipe = load(export(model, tmp_path, models))
    noise = make_noise(model, frames)
    chunks = list(pipe.stream(PROMPTS, **as_theirs(noise)))
    first = 1 + 4 * (model.sampler.chunk_frames - 1)
    assert [chunk.shape[1] for chunk in chunks] == [first] + [4 * model.sampler.chunk_frames] * (len(chunks) - 1)
    whole = pipe(PROMPTS, **as_theirs(noise)).frames
    at_once = WanCodec(models).decode(rollout(model, models, noise).transpose(1, 2)).movedim(2, 4) / 2 + 0.5
    assert whole.shape == (2, 1 + 4 * (frames - 1), 32, 48, 3)
    assert whole.std() > 0.05
    for theirs in (whole, np.concatenate(chunks, axis=1)):
        difference = np.abs(theirs - at_once.numpy()).max()
        print(f"{case}: frames differ by {difference:.1e}")
        assert difference < TOLERANCE


def test_several_videos_under_way_and_the_network_itself(models: Path, tmp_path: Path) -> None:
    """Streams do not see each other; between their passes the transformer is diffusers' own, which sees both ways."""
    model = make_student(chunk_frames=1)
    pipe = load(export(model, tmp_path, models))
    noise = as_theirs(make_noise(model, 3))
    flipped = {name: given.flip(-1) for name, given in noise.items()}
    alone = [pipe(PROMPTS, **given, output_type="latent").frames for given in (noise, flipped)]
    x, text = noise["latents"], torch.randn(2, 24, TEXT_DIM)
    streams = [pipe.stream(PROMPTS, **given, output_type="latent") for given in (noise, flipped)]
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(3):
        for stream, part in zip(streams, parts, strict=True):
            part.append(next(stream))
            with torch.no_grad():
                theirs = pipe.transformer(x, torch.full((2,), 500.0), text).sample
    for part, expected in zip(parts, alone, strict=True):
        assert torch.equal(torch.cat(part, dim=2), expected)
    at_once = CausalWan(model.config, SamplerConfig(chunk_frames=3))  # one chunk: every frame sees every frame
    at_once.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours = at_once(x.transpose(1, 2), torch.full((2, 3), 500.0), text)
    torch.testing.assert_close(theirs, ours.transpose(1, 2), atol=TOLERANCE, rtol=0)


def test_a_longer_video_starts_as_a_shorter_one(models: Path, tmp_path: Path) -> None:
    folder = export(make_student(chunk_frames=1, window_frames=3, sink_frames=1), tmp_path, models)

    def video(pipe: Any, **options: Any) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(5)
        return pipe.stream(PROMPTS[0], height=32, width=48, output_type="latent", generator=generator, **options)

    pipe = load(folder)
    short, long, endless = list(video(pipe, num_frames=13)), list(video(pipe, num_frames=25)), video(pipe)
    assert (len(short), len(long)) == (4, 7)
    for chunk in range(4):
        assert torch.equal(short[chunk], long[chunk])
    assert all(torch.equal(next(endless), chunk) for chunk in long)
    unwindowed = list(video(load(folder, window_frames=None, sink_frames=0), num_frames=25))
    same = [torch.equal(chunk, other) for chunk, other in zip(unwindowed, long, strict=True)]
    assert same == [True] * 3 + [False] * 4


ISOLATED = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("afd_scale", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
for name in ("nms", "qnms"):  # a torch without CUDA beside PyPI's torchvision
    if not hasattr(torch.ops.torchvision, name):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
folder, out = sys.argv[1:]
card = open(f"{folder}/README.md").read().split("```python\\n")[1].split("```")[0].replace('.to("cuda")', "")
exec(card.replace("path/to/this/folder", folder).replace("height=480, width=832", "height=32, width=48"))
assert frames.shape == (1 + 4 * 19, 32, 48, 3)
stream = pipe.stream("the red ball falls", height=32, width=48, output_type="pil", generator=torch.manual_seed(1))
frames = [frame for _ in range(6) for frame in next(stream)[0]]
assert len(frames) == 1 + 4 * 11 and frames[0].size == (48, 32)
given = torch.load(out, weights_only=True)
torch.save(pipe(prompt_embeds=given.pop("text"), output_type="latent", **given).frames, out)
assert not any(name.split(".")[0] == "afd_scale" for name in sys.modules)
"""


def test_without_our_package(models: Path, tmp_path: Path) -> None:
    """Only torch and diffusers: an endless stream, beyond the window that the student was made with."""
    model = make_student(chunk_frames=2, window_frames=6, sink_frames=2)
    folder = export(model, tmp_path, models)
    noise, out = make_noise(model, 14), tmp_path / "given.pt"
    text = embeddings(models, model)
    torch.save({"text": text, **as_theirs(noise)}, out)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED, folder, out], cwd=tmp_path, capture_output=True, text=True,
        env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (torch.load(out, weights_only=True) - rollout(model, models, noise)).abs().max() < TOLERANCE


def test_it_starts_with_an_image(models: Path, tmp_path: Path) -> None:
    """The first frame is the image as the VAE keeps it; what follows is our own student's after the same frame."""
    model = make_student(chunk_frames=1)
    pipe = load(export(model, tmp_path, models))
    colours = np.random.default_rng(2).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colours.repeat(8, axis=0).repeat(8, axis=1))
    codec, noise = WanCodec(models), make_noise(model, 4)
    kept = codec.encode(to_unit(np.asarray(image))[None, None])
    frames = pipe(PROMPTS, image=image, **as_theirs(noise)).frames
    reconstruction = codec.decode(kept)[0, 0].movedim(0, -1) / 2 + 0.5
    for video in frames:
        np.testing.assert_allclose(video[0], reconstruction.numpy(), atol=TOLERANCE)

    latents = pipe(PROMPTS, image=image, **as_theirs(noise), output_type="latent").frames
    torch.testing.assert_close(latents[:, :, 0], kept[:, 0].expand(2, -1, -1, -1), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(latents[:, :, 1:], continued(model, kept, embeddings(models, model), noise),
                               atol=TOLERANCE, rtol=0)  # fmt: skip
    assert (latents - rollout(model, models, noise))[:, :, 1:].abs().max() > 0.01, "the image was seen"


def continued(model: CausalWan, start: Tensor, text: Tensor, noise: Noise) -> Tensor:
    """(B, C, F, H, W) what our student generates after a given first frame, by teacher forcing's clean pass."""
    frames = [start.expand(2, -1, -1, -1, -1)]
    sigmas = Sampler(model.sampler).sigmas
    for index in range(1, noise.initial.shape[1]):
        clean = torch.cat([*frames, torch.zeros_like(frames[0])], dim=1)
        x = noise.initial[:, index : index + 1]
        for step, sigma in enumerate(sigmas):
            noisy = torch.cat([torch.zeros_like(clean[:, :-1]), x], dim=1)
            timestep = torch.full(noisy.shape[:2], 1000 * float(sigma))
            with torch.no_grad():
                velocity = model(noisy, timestep, text, clean=clean)[:, -1:]
            x = x - sigma * velocity
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * x + sigmas[step + 1] * noise.again[step][:, index : index + 1]
        frames.append(x)
    return torch.cat(frames[1:], dim=1).transpose(1, 2)


def test_it_goes_on_from_given_chunks(models: Path, tmp_path: Path) -> None:
    model = make_student(chunk_frames=2)
    pipe = load(export(model, tmp_path, models))
    noise = as_theirs(make_noise(model, 6))
    whole = pipe(PROMPTS, **noise, output_type="latent").frames
    again = pipe(PROMPTS, start_latents=whole[:, :, :4], **noise, output_type="latent").frames
    assert torch.equal(again, whole)
    other = pipe(PROMPTS, start_latents=whole[:, :, :4].flip(-1), **noise, output_type="latent").frames
    assert not torch.equal(other[:, :, 4:], whole[:, :, 4:])


@pytest.mark.parametrize(("first", "shown"), [(None, 12), (1, 10)])
def test_without_a_vae(first: int | None, shown: int, tmp_path: Path) -> None:
    """A toy student: embeddings in, latents out."""
    model = make_student(architecture="toy", chunk_frames=3, first_chunk_frames=first)
    pipe = load(export(model, tmp_path, "none"))
    frames = model.sampler.chunks.start(2)
    noise = make_noise(model, frames)
    text = torch.randn(2, 5, TEXT_DIM)
    ours = Sampler(model.sampler).rollout(model, text, noise).transpose(1, 2)
    theirs = pipe(prompt_embeds=text, **as_theirs(noise), output_type="latent").frames
    assert (theirs - ours).abs().max() < TOLERANCE
    said = (tmp_path / "exported" / "README.md").read_text().split("```python\n")[1].split("```")[0].splitlines()[-1]
    exec(said, scope := {"pipe": pipe, "embeddings": text})
    assert scope["latents"].shape == (2, CHANNELS, shown, 4, 4)
    assert (
        pipe(prompt_embeds=text, num_frames=frames, height=4, width=6, output_type="latent").frames.shape == ours.shape
    )
    for options, rule in (
        ({"prompt_embeds": text}, "output_type must be latent"),
        ({"prompt": "a cat", "output_type": "latent"}, "prompt must be given as prompt_embeds"),
        ({"prompt_embeds": text, "image": Image.new("RGB", (6, 4)), "output_type": "latent"}, "given as start_latents"),
    ):
        with pytest.raises(ValueError, match=rule):
            pipe(num_frames=frames, height=4, width=6, **options)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"num_frames": 11}, r"num_frames \(11\) must be of whole chunks, 3 latent frames each: the nearest is 9$"),
        ({"num_frames": None}, "num_frames must be given: without window_frames"),
        ({"height": 40}, r"height \(40\) must be a multiple of 16"),
        ({"prompt": None}, "prompt or prompt_embeds must be given"),
        ({"prompt_embeds": torch.zeros(1, 2, TEXT_DIM)}, "prompt or prompt_embeds must be given"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 25, TEXT_DIM)}, r"\(25 rows\) must have at most 24"),
        (
            {"image": Image.new("RGB", (48, 32))},
            r"image \(1 latent frames\) must be whole chunks, 3 latent frames each: a chunk",
        ),
        (
            {"start_latents": torch.zeros(1, 4, 3, 6, 4)},
            r"start_latents \(4 channels, 6 x 4\) must be 4 channels, 4 x 6$",
        ),
        ({"start_latents": torch.zeros(1, 4, 2, 4, 6)}, r"start_latents \(2 latent frames\) must be whole chunks"),
        ({"image": Image.new("RGB", (48, 32)), "start_latents": torch.zeros(1, 4, 3, 4, 6)}, "must not both be given"),
    ],
)
def test_wrong_use_is_refused_at_once(options: dict[str, Any], rule: str, pipe_of_3: Any) -> None:
    asked = {"prompt": "a cat", "num_frames": 9, "height": 32, "width": 48, **options}
    with pytest.raises(ValueError, match=rule):
        pipe_of_3.stream(**asked)


@pytest.fixture(scope="module")
def pipe_of_3(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(export(make_student(chunk_frames=3), tmp_path_factory.mktemp("pipe"), models))


def test_settings_can_be_others_when_it_is_loaded(models: Path, tmp_path: Path) -> None:
    folder = export(make_student(chunk_frames=3), tmp_path, models)
    assert load(folder, window_frames=12, sink_frames=3).config.window_frames == 12
    pipe = load(folder, first_chunk_frames=1, window_frames=7, sink_frames=1)
    endless = pipe.stream("a cat", height=32, width=48, output_type="latent")
    assert [chunk.shape[2] for chunk in itertools.islice(endless, 4)] == [1, 3, 3, 3]
    behind = "3 latent frames each behind a first one of 1"
    with pytest.raises(ValueError, match=rf"^window_frames \(6\) and sink_frames \(3\) must be whole chunks, {behind}"):
        load(folder, first_chunk_frames=1, window_frames=6, sink_frames=3)
    with pytest.raises(ValueError, match=r"^chunk_frames \(3\) must be 1 or more, and first_chunk_frames \(0\) too"):
        load(folder, first_chunk_frames=0)
    for window, sink in ((4, 0), (6, 1), (6, 6), (None, 3)):
        with pytest.raises(ValueError, match=rf"^window_frames \({window}\) and sink_frames \({sink}\) must be whole"):
            load(folder, window_frames=window, sink_frames=sink)
    assert load(folder, window_frames=12, positions="window").config.positions == "window"
    for positions in ("window", "relative"):
        with pytest.raises(ValueError, match=rf"^positions \({positions}\) must be absolute, or window where"):
            load(folder, positions=positions)


def test_a_first_chunk_of_one_takes_an_image(models: Path, tmp_path: Path) -> None:
    model = make_student(chunk_frames=3, first_chunk_frames=1)
    folder = export(model, tmp_path, models)
    assert "latent frames at a time, the first time 1, in" in (folder / "README.md").read_text()
    pipe, noise = load(folder), as_theirs(make_noise(model, 7))
    whole = pipe(PROMPTS, **noise, output_type="latent").frames
    for chunks in (1, 4):
        given = pipe(PROMPTS, start_latents=whole[:, :, :chunks], **noise, output_type="latent").frames
        assert torch.equal(given, whole)
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    kept = WanCodec(models).encode(to_unit(np.asarray(image))[None, None])
    latents = pipe(PROMPTS, image=image, **noise, output_type="latent").frames
    drawn = replace(make_noise(model, 7), given=kept.expand(2, -1, -1, -1, -1))
    ours = Sampler(model.sampler).rollout(model, embeddings(models, model), drawn).transpose(1, 2)
    torch.testing.assert_close(latents, ours, atol=TOLERANCE, rtol=0)
    usual = pipe(PROMPTS[0], image=image, height=32, width=48, output_type="latent").frames
    assert usual.shape[2] == 19, "of 21 those are whole chunks"
    assert "num_frames=73, " in (folder / "README.md").read_text()
    assert [len(chunk[0]) for chunk in pipe.stream(PROMPTS, 25, 32, 48, image=image)] == [1, 12, 12]
    each = "3 latent frames each behind a first one of 1"
    with pytest.raises(ValueError, match=rf"^num_frames \(33\) must be of whole chunks, {each}: the nearest is 37$"):
        pipe.stream(PROMPTS, 33, 32, 48)
    with pytest.raises(ValueError, match=rf"^start_latents \(3 latent frames\) must be whole chunks, {each}: a chunk"):
        pipe.stream(PROMPTS, 37, 32, 48, start_latents=whole[:, :, :3])
    with pytest.raises(ValueError, match=r"^sink_frames \(0\) must hold the first chunk with first_chunk_frames \(1\)"):
        load(folder, window_frames=7)


def test_the_folder(models: Path, tmp_path: Path) -> None:
    """Whole, without pickles, and a source of the same student."""
    given = tmp_path / "models"
    shutil.copytree(models, given)
    (given / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (given / "text_encoder" / "model.safetensors").rename(tmp_path / "elsewhere")  # as a hub's cache links
    (given / "text_encoder" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    model = make_student(chunk_frames=1, window_frames=3)
    folder = export(model, tmp_path, given)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "pipeline.py", "model_index.json", "scheduler/scheduler_config.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pyc")) for name in files)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    source = read_student(folder)
    assert source.config() == PolicyConfig(student=model.config, sampler=model.sampler)
    assert all(torch.equal(source.state[key], tensor) for key, tensor in model.state_dict().items())
    scheduler = importlib.import_module("diffusers").FlowMatchEulerDiscreteScheduler.from_pretrained(
        folder, subfolder="scheduler"
    )
    scheduler.set_timesteps(sigmas=[t / 1000 for t in model.sampler.timesteps])
    torch.testing.assert_close(scheduler.sigmas[:-1], Sampler(model.sampler).sigmas)
    assert json.loads((folder / "model_index.json").read_text())["window_frames"] == 3
