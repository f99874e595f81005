"""The choice of a codec by the name in a dataset's facts."""

from pathlib import Path

import pytest

from afd_scale.codecs.choose import codec_of
from afd_scale.config import ConfigError


@pytest.mark.parametrize("name", ["", "wan", "vp9:4x8x8", "identity:3x4x5", "identity:0x4x4", "identity:3x4"])
def test_an_unknown_codec_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^codec \(.*\) must be identity:TxPxP or wan:TxPxP: [^\n]*$"):
        codec_of(name, models=Path("models"))


def test_a_dataset_of_the_identity_codecs_earlier_name() -> None:
    with pytest.raises(ConfigError, match=r"^codec \(space_time_to_depth:2x4x4\) must be identity:2x4x4: [^\n]*$"):
        codec_of("space_time_to_depth:2x4x4")


def test_wans_codec_needs_its_models() -> None:
    with pytest.raises(ConfigError, match=r"^models must be given: codec wan:4x8x8 [^\n]*$"):
        codec_of("wan:4x8x8")
