"""The Wan codec computes what diffusers' own Wan pipelines compute, from a tiny random model in diffusers' layout."""

import gc
import importlib
import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from afd_scale.codecs.choose import codec_of
from afd_scale.codecs.codec import Codec, RejectedError, VideoForm
from afd_scale.codecs.conversions import to_uint8, to_unit
from afd_scale.codecs.wan import WanCodec
from afd_scale.config import ConfigError
from afd_scale.data.clips import Frames
from afd_scale.data.make_shards import encode_frames
from tests.wan_models import save_tiny_wan

LENGTH = 24
WAN_2_2: dict[str, Any] = {
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True, "scale_factor_spatial": 16,
    "dim_mult": [1, 2, 2, 2],
}  # fmt: skip
PROMPTS = [
    "the red ball falls on the moon",
    "  Of  a cat\n&amp;lt; under\twater &amp; ",
    "",
    "a cat under the moon, a ball falls on the red water of the blue moon",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    save_tiny_wan(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(models: Path) -> Any:
    """diffusers' own reading of the folder."""
    return importlib.import_module("diffusers").WanPipeline.from_pretrained(models)


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of the models, to damage."""
    return Path(shutil.copytree(models, tmp_path / "models"))


def video(frames: int = 9, height: int = 32, width: int = 48) -> Frames:
    """(T, H, W, 3) coarse blocks of random colours, which move."""
    generator = np.random.default_rng(7)
    blocks = generator.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def videos(frames: int = 9, batch: int = 3) -> Tensor:
    """(B, T, 3, 32, 48) pixels of the video and, turned over and darkened, two more."""
    first = to_unit(video(frames))
    return torch.stack([first, first.flip(3) * 0.9, first.flip(1, 2) * 0.8][:batch])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_embedding(prompt: str, models: Path, pipeline: Any) -> None:
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    assert theirs.shape == (1, LENGTH, 32)
    ours = WanCodec(models, text_length=LENGTH).embed(prompt)
    assert ours.dtype == np.float16
    assert 1 <= len(ours) <= LENGTH
    assert ours.std() > 0.5
    np.testing.assert_array_equal(ours, theirs[0, : len(ours)].to(torch.float16).numpy())
    assert not theirs[0, len(ours) :].any()


@torch.no_grad()
def test_the_same_embedding_in_bfloat16(models: Path) -> None:
    """As WanPipeline is run on a GPU, the VAE in float32 beside it."""
    theirs = importlib.import_module("diffusers").WanPipeline.from_pretrained(
        models, torch_dtype={"text_encoder": torch.bfloat16, "default": torch.float32}
    )
    codec = WanCodec(models, text_length=LENGTH, text_dtype=torch.bfloat16)
    expected = theirs._get_t5_prompt_embeds(PROMPTS[0], max_sequence_length=LENGTH)
    assert expected.dtype == torch.bfloat16
    ours = codec.embed(PROMPTS[0])
    np.testing.assert_array_equal(ours, expected[0, : len(ours)].to(torch.float16).numpy())
    assert not np.array_equal(ours, WanCodec(models, text_length=LENGTH).embed(PROMPTS[0]))
    assert codec._vae.dtype == theirs.vae.dtype == torch.float32


def test_one_token_more_than_the_length_is_cut(models: Path, pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "the red ball falls on the moon"  # seven tokens and the end
    fits, cut = WanCodec(models, text_length=8), WanCodec(models, text_length=7)
    with caplog.at_level(logging.WARNING, logger="afd_scale"):
        assert fits.embed(prompt).shape == (8, 32)
        assert not caplog.messages
        embedding = cut.embed(prompt)
        cut.embed(prompt)
    assert caplog.messages == [f"prompt {prompt!r} loses its end: it has 8 tokens, an embedding 7"]
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=7)
    np.testing.assert_array_equal(embedding, theirs[0].to(torch.float16).numpy())


@torch.no_grad()
def test_the_same_latents(models: Path, pipeline: Any) -> None:
    """As WanVideoToVideoPipeline prepares them, which noises them by the scheduler: by nothing here."""
    theirs = importlib.import_module("diffusers").WanVideoToVideoPipeline(
        tokenizer=pipeline.tokenizer, text_encoder=pipeline.text_encoder, transformer=None, vae=pipeline.vae,
        scheduler=_NoNoise(),
    )  # fmt: skip
    frames = video()
    preprocessed = theirs.video_processor.preprocess_video([frame.astype(np.float32) / 255 for frame in frames])
    expected = theirs.prepare_latents(preprocessed, num_channels_latents=4, height=32, width=48,
                                      dtype=torch.float32, device=torch.device("cpu"))  # fmt: skip
    codec: Codec = WanCodec(models)
    latents = codec.encode(to_unit(frames)[None])
    assert latents.dtype == torch.float32
    assert latents.shape[1:] == codec.latent_shape(VideoForm(frames=9, fps=16.0, height=32, width=48)) == (3, 4, 4, 6)
    assert expected.std() > 0.3
    assert expected.std(dim=(2, 3, 4)).min() > 0.03
    torch.testing.assert_close(latents.transpose(1, 2), expected, atol=1e-5, rtol=0)
    stored = encode_frames(codec, frames)
    np.testing.assert_array_equal(stored, latents[0].to(torch.float16).numpy())


class _NoNoise:
    order = 1
    config: dict[str, Any] = {}

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        return latents


@torch.no_grad()
def test_the_same_frames(models: Path, pipeline: Any) -> None:
    """As the last step of WanPipeline decodes latents; there is no denoising step before it."""
    codec = WanCodec(models)
    latents = codec.encode(videos(batch=1)) * 3  # a VAE without training answers little to its input
    config = pipeline.vae.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    decoded = pipeline.vae.decode(latents.transpose(1, 2) / (1.0 / std) + mean, return_dict=False)[0]
    expected = pipeline.video_processor.postprocess_video(decoded, output_type="np")[0] * 255
    pixels = codec.decode(latents)
    assert pixels.dtype == torch.float32
    frames = to_uint8(pixels[0])
    assert frames.shape == expected.shape == (9, 32, 48, 3)
    assert expected.std() > 5
    assert np.abs(frames - expected).max() < 0.51


@pytest.fixture(scope="module", params=[{}, WAN_2_2], ids=["wan-2.1", "wan-2.2"])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WanCodec:
    folder = tmp_path_factory.mktemp("wan")
    save_tiny_wan(folder, **request.param)
    return WanCodec(folder)


def test_a_batch_is_its_videos_one_by_one(codec: WanCodec) -> None:
    pixels = videos()
    latents = codec.encode(pixels)
    torch.testing.assert_close(latents, torch.cat([codec.encode(one) for one in pixels.split(1)]), atol=1e-5, rtol=0)
    assert (latents[0] - latents[1]).abs().max() > 0.1
    decoded = codec.decode(latents * 3)
    one_by_one = torch.cat([codec.decode(one * 3) for one in latents.split(1)])
    torch.testing.assert_close(decoded, one_by_one, atol=1e-5, rtol=0)
    assert (decoded[0] - decoded[1]).abs().max() > 0.1


@pytest.mark.parametrize("chunks", [[1] * 5, [2, 3], [3, 1, 1], [5]], ids=str)
def test_chunk_by_chunk_is_at_once(codec: WanCodec, chunks: list[int]) -> None:
    latents = codec.encode(videos(17, batch=2)) * 3
    decode = codec.decoder()
    decoded = [decode(chunk) for chunk in latents.split(chunks, dim=1)]
    frames = [4 * latent_frames for latent_frames in chunks]
    assert [chunk.shape[1] for chunk in decoded] == [frames[0] - 3, *frames[1:]]
    assert {chunk.dtype for chunk in decoded} == {torch.float32}
    whole = codec.decode(latents)
    assert (whole[:, 1:] - whole[:, :-1]).std() > 0.01, "it moves"
    torch.testing.assert_close(torch.cat(decoded, dim=1), whole, atol=1e-4, rtol=0)


def test_decoders_do_not_disturb_each_other(codec: WanCodec) -> None:
    """Nor what the codec encodes and decodes at once in between."""
    latents = codec.encode(videos(9)) * 3
    expected = codec.decode(latents)
    first, second = codec.decoder(), codec.decoder()
    pixels: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunk in latents.split(1, dim=1):
        pixels[0].append(first(chunk[:1]))
        codec.encode(videos(5, batch=1))
        pixels[1].append(second(chunk[1:]))
        codec.decode(latents[:1, :1])
    torch.testing.assert_close(torch.cat(pixels[0], dim=1), expected[:1], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(pixels[1], dim=1), expected[1:], atol=1e-4, rtol=0)


def test_frames_that_need_tiles_are_not_decoded_chunk_by_chunk(models: Path) -> None:
    latents = torch.zeros(1, 1, 4, 4, 6)
    assert WanCodec(models, whole_frame_pixels=32 * 48).decoder()(latents).shape == (1, 1, 3, 32, 48)
    decode = WanCodec(models, whole_frame_pixels=32 * 48 - 1).decoder()
    with pytest.raises(ConfigError, match=r"^whole_frame_pixels \(1535\) must be at least a frame's 1536 [^\n]*$"):
        decode(latents)


def test_tiles_are_blended_into_nearly_the_whole(models: Path) -> None:
    """diffusers cuts tiles 256 wide, 192 apart; the VAE's attention reaches as far as its tile."""
    frames = to_unit(video(5, 16, 320))[None]
    whole, tiled = WanCodec(models), WanCodec(models, whole_frame_pixels=16 * 320 - 1)
    latents, in_tiles = whole.encode(frames), tiled.encode(frames)
    assert in_tiles.shape == latents.shape == (1, 2, 4, 2, 40)
    error = (in_tiles - latents).abs()
    assert latents.std() > 0.3
    assert error.mean() < 0.01
    assert error[..., :20].max() < 0.03  # before the first seam, at 192 pixels
    assert 0.03 < error.max() < 0.15
    pictures, from_tiles = whole.decode(latents), tiled.decode(latents)
    assert from_tiles.shape == pictures.shape == frames.shape
    error = (from_tiles - pictures).abs() * 127.5
    assert pictures.std() * 127.5 > 10
    assert error.mean() < 0.5
    assert error[..., :160].max() <= 2


def test_tiles_only_beyond_the_limit(models: Path) -> None:
    pixels, small = to_unit(video(1, 8, 264))[None], to_unit(video(1, 8, 8))[None]
    expected = WanCodec(models).encode(pixels)
    at_limit, beyond = (WanCodec(models, whole_frame_pixels=limit) for limit in (8 * 264, 8 * 264 - 1))
    assert torch.equal(at_limit.encode(pixels), expected)
    in_tiles = beyond.encode(pixels)
    assert not torch.equal(in_tiles, expected)
    assert not torch.equal(beyond.decode(expected), at_limit.decode(expected))
    beyond.encode(small)
    assert not beyond._vae.use_tiling
    assert torch.equal(beyond.encode(pixels), in_tiles)


def test_wan_2_2s_factors(tmp_path: Path) -> None:
    """Its VAE folds 2 x 2 pixels before it starts: 16 pixels a latent, all from the folder's config."""
    save_tiny_wan(tmp_path, **WAN_2_2)
    codec = WanCodec(tmp_path)
    assert codec.name == "wan:4x16x16"
    form = VideoForm(frames=5, fps=16.0, height=32, width=48)
    assert codec.latent_shape(form) == (2, 4, 2, 3)
    latents = codec.encode(videos(5))
    assert latents.shape == (3, 2, 4, 2, 3)
    assert codec.decode(latents).shape == (3, 5, 3, 32, 48)
    with pytest.raises(ConfigError, match=r"^width \(40\) must be a multiple of 16: [^\n]*the nearest: 32 and 48$"):
        codec.latent_shape(VideoForm(frames=5, fps=16.0, height=32, width=40))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((80, 32, 32), r"^frames \(80\) must be 1 \+ a multiple of 4: [^\n]*; the nearest are 77 and 81$"),
        ((81, 30, 32), r"^height \(30\) must be a multiple of 8: [^\n]*; the nearest: 24 and 32$"),
        ((81, 32, 7), r"^width \(7\) must be a multiple of 8: [^\n]*; the nearest: 8$"),
    ],
)
def test_sizes_that_the_vae_would_cut_are_refused(models: Path, sizes: tuple[int, int, int], message: str) -> None:
    codec = WanCodec(models)
    frames, height, width = sizes
    with pytest.raises(ConfigError, match=message):
        codec.latent_shape(VideoForm(frames=frames, fps=16.0, height=height, width=width))
    with pytest.raises(ConfigError, match=message):
        codec.encode(torch.zeros(1, frames, 3, height, width))
    with pytest.raises(ConfigError, match=r"^colour \(gray\) must be rgb24: [^\n]*$"):
        codec.latent_shape(VideoForm(frames=81, fps=16.0, height=32, width=32, colour="gray"))


def test_a_prompt_is_embedded_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afd_scale.codecs.wan._CACHED_PROMPTS", 2)
    embedded: list[str] = []
    embed = WanCodec._embed
    monkeypatch.setattr(WanCodec, "_embed", lambda self, prompt: embedded.append(prompt) or embed(self, prompt))
    codec = WanCodec(models, text_length=LENGTH)
    first = codec.embed("a cat")
    first[:] = 0  # the caller's own copy
    assert codec.embed("a cat").any()
    for prompt in ("the ball", "a cat", "the moon", "a cat", "the ball"):
        codec.embed(prompt)
    assert embedded == ["a cat", "the ball", "the moon", "the ball"]  # the ball was used the longest ago


def test_decoding_loads_no_text_encoder(models: Path) -> None:
    encoder = WanCodec(models, text_length=LENGTH)
    encoder.embed("a cat")
    assert "_loaded_vae" not in vars(encoder)
    codec = codec_of("wan:4x8x8", models=models)
    codec.decode(torch.zeros(1, 1, 4, 4, 4, dtype=torch.float16))
    assert "_loaded_vae" in vars(codec)
    assert "_text" not in vars(codec)


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "finite"), (float("inf"), "finite"), (1e6, "float16")])
def test_values_that_float16_cannot_hold_are_rejected(models: Path, value: float, reason: str) -> None:
    codec = WanCodec(models, text_length=LENGTH)
    with torch.no_grad():
        codec._vae.quant_conv.bias[1] = value
        codec._text[1].encoder.final_layer_norm.weight[3] = value
    with pytest.raises(RejectedError, match=rf"^latents must [^\n]*{reason}[^\n]*$"):
        encode_frames(codec, video(5))
    with pytest.raises(RejectedError, match=rf"^text embedding must [^\n]*{reason}[^\n]*$"):
        codec.embed("a cat")


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop_weight(path: Path, key: str) -> None:
    safetensors = importlib.import_module("safetensors.torch")
    state = safetensors.load_file(path)
    del state[key]
    safetensors.save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no folder is there"),
        (lambda f: shutil.rmtree(f / "vae"), "vae/config.json"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder/config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer/tokenizer_config.json"),
        (lambda f: next((f / "vae").glob("*.safetensors")).rename(f / "vae" / "vae.pth"), r"vae/\*.safetensors"),
        (lambda f: (f / "vae/config.json").write_text("{"), "have an AutoencoderKLWan in vae/: "),
        (lambda f: edit(f / "vae/config.json", _class_name="AutoencoderKL"), "it is of AutoencoderKL$"),
        (lambda f: edit(f / "text_encoder/config.json", model_type="t5"), "it is of t5$"),
        (lambda f: (f / "text_encoder/config.json").write_text("{"), "have a UMT5EncoderModel in text_encoder/: "),
    ],
)  # fmt: skip
def test_wrong_models_are_refused_at_once(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=rf"^models \({folder}\) must [^\n]*{message}[^\n]*$"):
        WanCodec(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"?"), "AutoencoderKLWan weights in"),
        (lambda f: drop_weight(f / "vae/diffusion_pytorch_model.safetensors", "quant_conv.bias"),
         "1 are absent, the first is quant_conv.bias$"),
        (lambda f: edit(f / "vae/config.json", base_dim=16), "AutoencoderKLWan weights in"),
        (lambda f: edit(f / "vae/config.json", scale_factor_spatial=4), "scale_factor_spatial"),
    ],
)  # fmt: skip
def test_a_damaged_vae_is_refused_when_loaded(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    codec = WanCodec(folder)
    with pytest.raises(ConfigError, match=rf"^models \({folder}\) must [^\n]*{message}[^\n]*$"):
        codec.encode(videos(5))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: drop_weight(f / "text_encoder/model.safetensors", "encoder.final_layer_norm.weight"),
         "1 are absent, the first is encoder.final_layer_norm.weight$"),
        (lambda f: edit(f / "text_encoder/config.json", d_ff=40), "UMT5EncoderModel weights in text_encoder/: "),
        (lambda f: edit(f / "text_encoder/config.json", vocab_size=40), "the one has 58 tokens, the other 40$"),
        (lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"), "T5 tokenizer in tokenizer/: "),
        (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "T5 tokenizer in tokenizer/: "),
    ],
)  # fmt: skip
def test_a_damaged_text_encoder_is_refused_when_loaded(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    codec = WanCodec(folder)
    with pytest.raises(ConfigError, match=rf"^models \({folder}\) must [^\n]*{message}[^\n]*$"):
        codec.embed("a cat")


def test_the_models_must_be_those_that_encoded(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be of codec wan:4x16x16: they are of wan:4x8x8$"):
        codec_of("wan:4x16x16", models=models)


def test_a_dropped_codec_frees_its_models_at_once(models: Path) -> None:
    codec = WanCodec(models)
    codec.embed("the ball")
    encoder = weakref.ref(codec._text[1])
    gc.disable()
    try:
        del codec
        assert encoder() is None
    finally:
        gc.enable()
