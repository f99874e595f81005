"""The lossless codec in the VAE's place."""

import pytest
import torch

from afd_scale.data.codec import SpaceTimeToDepth, to_uint8, to_unit


def test_decode_inverts_encode_exactly():
    codec = SpaceTimeToDepth()
    video = torch.rand(2, 12, 16, 20) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 48, 4, 5)
    assert torch.equal(codec.decode(latents), video)


def test_channel_is_frame_row_column_within_the_patch():
    codec = SpaceTimeToDepth(frames=3, pixels=4)
    video = torch.zeros(1, 6, 8, 12)
    video[0, 3 + 2, 4 + 1, 8 + 3] = 1.0  # patch (1, 1, 2), inside it frame 2, row 1, column 3
    latents = codec.encode(video)
    assert latents[0, 1, 2 * 16 + 1 * 4 + 3, 1, 2] == 1.0
    assert latents.sum() == 1.0


@pytest.mark.parametrize(
    ("shape", "name"),
    [((1, 11, 16, 16), "frames"), ((1, 12, 15, 16), "height"), ((1, 12, 16, 18), "width")],
)
def test_sizes_that_do_not_divide_are_refused(shape, name):
    with pytest.raises(ValueError, match=rf"video {name} \(\d+\) must be divisible"):
        SpaceTimeToDepth().encode(torch.zeros(shape))


def test_wrong_ranks_and_channels_are_refused():
    with pytest.raises(ValueError, match=r"video\.shape"):
        SpaceTimeToDepth().encode(torch.zeros(1, 1, 12, 16, 16))
    with pytest.raises(ValueError, match=r"latents\.shape .* 48"):
        SpaceTimeToDepth().decode(torch.zeros(1, 4, 47, 4, 4))


def test_uint8_round_trip_is_exact_and_clamps():
    frames = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(frames)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(unit), frames)
    assert to_uint8(torch.tensor([-3.0, 0.001, 0.0055, 7.0])).tolist() == [0, 128, 128, 255]


def test_half_precision_video_round_trips():
    frames = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(frames).half()), frames)
