"""The toy world's codec: any form to latents and back without loss, and its word vectors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from afd_scale.codecs.choose import codec_of
from afd_scale.codecs.codec import Codec, RejectedError, VideoForm
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import ConfigError
from afd_scale.data.worlds.drop import VOCABULARY, ToyPrompt


def grey(frames: int, height: int, width: int) -> VideoForm:
    return VideoForm(frames=frames, fps=8.0, height=height, width=width, colour="gray")


def videos(batch: int, frames: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, frames, 1, height, width, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.mark.parametrize(
    ("form", "name", "latent_shape"),
    [
        (grey(12, 32, 32), "identity:3x4x4", (4, 48, 8, 8)),
        (grey(81, 16, 24), "identity:3x4x4", (27, 48, 4, 6)),
        (grey(8, 12, 20), "identity:2x4x4", (4, 32, 3, 5)),
        (grey(49, 30, 45), "identity:1x3x3", (49, 9, 10, 15)),
        (grey(6, 8, 10), "identity:3x2x2", (2, 12, 4, 5)),
        (grey(5, 17, 19), "identity:1x1x1", (5, 1, 17, 19)),
    ],
)
def test_every_form_there_and_back_exactly(form: VideoForm, name: str, latent_shape: tuple[int, int, int, int]) -> None:
    codec: Codec = IdentityCodec.of_form(form)
    assert codec.name == name
    assert codec.provenance == {"name": name}
    assert codec.latent_shape(form) == latent_shape
    pixels = videos(2, form.frames, form.height, form.width)
    latents = codec.encode(pixels)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, *latent_shape)
    assert torch.equal(latents[1:], codec.encode(pixels[1:]))
    again = codec_of(name)
    assert torch.equal(again.decode(latents), pixels)
    assert torch.equal(again.decode(latents[1:]), pixels[1:])


def test_channel_is_frame_row_column_within_the_patch() -> None:
    pixels = torch.zeros(1, 6, 1, 8, 12)
    pixels[0, 3 + 2, 0, 4 + 1, 8 + 3] = 1.0  # patch (1, 1, 2), inside it frame 2, row 1, column 3
    latents = IdentityCodec().encode(pixels)
    assert latents[0, 1, 2 * 16 + 1 * 4 + 3, 1, 2] == 1.0
    assert latents.sum() == 1.0


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [3, 1], [4]])
def test_chunk_by_chunk_is_at_once(chunks: list[int]) -> None:
    codec = IdentityCodec()
    pixels = videos(2, 12, 8, 16)
    decode = codec.decoder()
    decoded = [decode(chunk) for chunk in codec.encode(pixels).split(chunks, dim=1)]
    assert [chunk.shape[1] for chunk in decoded] == [3 * latent_frames for latent_frames in chunks]
    assert torch.equal(torch.cat(decoded, dim=1), pixels)


def test_any_precision_becomes_float32_on_its_device() -> None:
    codec = IdentityCodec(device="meta")
    latents = codec.encode(videos(1, 3, 4, 4).half())
    pixels = codec.decode(torch.zeros(1, 1, 48, 1, 1, dtype=torch.bfloat16))
    assert {(x.dtype, x.device.type) for x in (latents, pixels)} == {(torch.float32, "meta")}


def test_it_has_the_toy_worlds_patch_and_text() -> None:
    codec = IdentityCodec.of_form(grey(12, 32, 32))
    assert codec.name == IdentityCodec().name
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
    codec = IdentityCodec()
    with pytest.raises(ConfigError, match=rf"^{field} \([a-z\d]+\) must be [^\n]*$"):
        codec.latent_shape(form)
    if form.colour == "gray":
        with pytest.raises(ConfigError, match=rf"^{field} \(\d+\) must be divisible by [^\n]*$"):
            codec.encode(torch.zeros(1, form.frames, 1, form.height, form.width))


def test_wrong_ranks_and_channels_are_refused() -> None:
    codec = IdentityCodec()
    for shape in ((12, 1, 16, 16), (1, 12, 3, 16, 16)):
        with pytest.raises(ConfigError, match=r"^pixels\.shape [^\n]*$"):
            codec.encode(torch.zeros(shape))
    for shape in ((4, 48, 4, 4), (1, 4, 47, 4, 4)):
        with pytest.raises(ConfigError, match=r"^latents\.shape [^\n]* 48[^\n]*$"):
            codec.decode(torch.zeros(shape))


def test_an_embedding_has_a_row_a_word() -> None:
    codec = IdentityCodec(text_shape=(5, 30))
    embedding = codec.embed(" a Bright\nball ")
    assert embedding.dtype == np.float16
    assert embedding.shape == (3, 30)
    assert (np.abs(embedding) == 1).all()
    assert codec.embed("").shape == (0, 30)


def test_a_word_has_one_vector_wherever_it_stands() -> None:
    first, second = map(IdentityCodec().embed, ("bright ball", "a Ball"))
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[0] != first[1]).any()


def test_vectors_are_the_same_in_every_process_and_version() -> None:
    # SHAKE-256 of "ball" begins with the byte 0x63, read from its highest bit.
    embedding = IdentityCodec(text_shape=(1, 8)).embed("ball")
    assert embedding[0].tolist() == [-1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0]


def test_attribute_words_are_nearly_orthogonal() -> None:
    words = [word for table in VOCABULARY for word in table]
    vectors = IdentityCodec(text_shape=(len(words), 64)).embed(" ".join(words)).astype(float)
    cosine = vectors @ vectors.T / 64 - np.eye(len(words))
    assert np.abs(cosine).max() < 0.5
    assert np.linalg.matrix_rank(vectors) == len(words)


def test_every_toy_sentence_fits() -> None:
    for prompt in ToyPrompt.every():
        IdentityCodec().embed(prompt.sentence)


def test_a_prompt_of_too_many_words_is_rejected() -> None:
    codec = IdentityCodec(text_shape=(3, 8))
    assert codec.embed("one two three").shape == (3, 8)
    with pytest.raises(RejectedError, match=r"^prompt must have at most 3 words: it has 4$"):
        codec.embed("one two three four")
