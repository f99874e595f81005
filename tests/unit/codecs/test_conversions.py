"""Between what is stored and what is computed with."""

import numpy as np
import pytest
import torch

from afd_scale.codecs.codec import RejectedError
from afd_scale.codecs.conversions import to_float16, to_uint8, to_unit


def every_value() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(2, 4, 16, 2)


def test_uint8_round_trip_is_exact() -> None:
    frames = every_value()
    frames.flags.writeable = False
    pixels = to_unit(frames)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (2, 2, 4, 16)
    assert pixels[0, 1, 2, 3].item() == pytest.approx(frames[0, 2, 3, 1].item() / 127.5 - 1)
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(pixels), frames)


def test_half_precision_round_trips() -> None:
    np.testing.assert_array_equal(to_uint8(to_unit(every_value()).half()), every_value())


def test_uint8_is_rounded_and_clamped() -> None:
    pixels = torch.tensor([-3.0, 0.001, 0.0055, 7.0]).view(1, 1, 4)
    assert to_uint8(pixels).flatten().tolist() == [0, 128, 128, 255]


def test_float16() -> None:
    values = torch.tensor([0.1, -65504.0])
    np.testing.assert_array_equal(to_float16(values, "latents"), values.numpy().astype(np.float16))
    for bad, reason in ((float("nan"), "finite"), (float("-inf"), "finite"), (-7e4, "float16: its largest")):
        with pytest.raises(RejectedError, match=rf"^latents must [^\n]*{reason}[^\n]*$"):
            to_float16(torch.tensor([0.0, bad, 1.0]), "latents")
