"""The toy world's codec for any form, and the choice of a codec by the name in a dataset's facts."""

from pathlib import Path

import numpy as np
import pytest

from afd_scale.config import ConfigError
from afd_scale.data.clips import Codec, Frames, RejectedError, VideoForm
from afd_scale.data.codec import SpaceTimeToDepth
from afd_scale.data.codecs.choose import codec_of
from afd_scale.data.codecs.identity import IdentityCodec
from afd_scale.data.text import embed_words


def grey(frames: int, height: int, width: int) -> VideoForm:
    return VideoForm(frames=frames, fps=8.0, height=height, width=width, colour="gray")


def all_values(form: VideoForm) -> Frames:
    """(T, H, W, 1) frames with every brightness somewhere, none of them alike."""
    size = form.frames * form.height * form.width
    order = np.random.default_rng(4).permutation(size)
    return (order % 256).astype(np.uint8).reshape(form.frames, form.height, form.width, 1)


@pytest.mark.parametrize(
    ("form", "name", "latent_shape"),
    [
        (grey(12, 32, 32), "space_time_to_depth:3x4x4", (4, 48, 8, 8)),
        (grey(81, 16, 24), "space_time_to_depth:3x4x4", (27, 48, 4, 6)),
        (grey(8, 12, 20), "space_time_to_depth:2x4x4", (4, 32, 3, 5)),
        (grey(49, 30, 45), "space_time_to_depth:1x3x3", (49, 9, 10, 15)),
        (grey(6, 8, 10), "space_time_to_depth:3x2x2", (2, 12, 4, 5)),
        (grey(5, 17, 19), "space_time_to_depth:1x1x1", (5, 1, 17, 19)),
    ],
)
def test_every_form_folds_and_unfolds_exactly(
    form: VideoForm, name: str, latent_shape: tuple[int, int, int, int]
) -> None:
    codec = IdentityCodec.of_form(form)
    assert codec.name == name
    assert codec.latent_shape(form) == latent_shape
    frames = all_values(form)
    frames.flags.writeable = False
    latents = codec.encode(frames)
    assert latents.dtype == np.float16
    assert latents.shape == latent_shape
    latents.flags.writeable = False
    decoded = codec_of(name).decode(latents)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, frames)


def test_it_is_the_toy_worlds_codec_for_its_clips() -> None:
    codec: Codec = IdentityCodec.of_form(grey(12, 32, 32))
    assert codec.name == SpaceTimeToDepth().name
    assert (codec.colour, codec.text_shape) == ("gray", (16, 32))


@pytest.mark.parametrize(
    ("form", "field"),
    [
        (grey(13, 32, 32), "frames"),
        (grey(12, 30, 32), "height"),
        (grey(12, 32, 34), "width"),
        (VideoForm(frames=12, fps=8.0, height=32, width=32, colour="rgb24"), "colour"),
    ],
)
def test_another_form_is_refused(form: VideoForm, field: str) -> None:
    codec = IdentityCodec(SpaceTimeToDepth(frames=3, pixels=4))
    with pytest.raises(ConfigError, match=rf"^{field} \([a-z\d]+\) must be [^\n]*$"):
        codec.latent_shape(form)


def test_an_embedding_has_a_row_a_word() -> None:
    codec = IdentityCodec(SpaceTimeToDepth(), text_shape=(5, 30))
    embedding = codec.embed(" a Bright\nball ")
    assert embedding.dtype == np.float16
    assert embedding.shape == (3, 30)
    np.testing.assert_array_equal(embedding, embed_words("a bright ball", max_words=5, dim=30)[:3])
    assert codec.embed("").shape == (0, 30)


def test_a_prompt_of_too_many_words_is_rejected() -> None:
    codec = IdentityCodec(SpaceTimeToDepth(), text_shape=(3, 8))
    assert codec.embed("one two three").shape == (3, 8)
    with pytest.raises(RejectedError, match=r"^prompt must have at most 3 words: it has 4$"):
        codec.embed("one two three four")


@pytest.mark.parametrize(
    "name",
    ["", "wan", "vp9:4x8x8", "space_time_to_depth:3x4x5", "space_time_to_depth:0x4x4", "space_time_to_depth:3x4"],
)
def test_an_unknown_codec_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^codec \(.*\) must be space_time_to_depth:TxPxP or wan:TxPxP: [^\n]*$"):
        codec_of(name, models=Path("models"))


def test_wans_codec_needs_its_models() -> None:
    with pytest.raises(ConfigError, match=r"^models must be given: codec wan:4x8x8 [^\n]*$"):
        codec_of("wan:4x8x8")
