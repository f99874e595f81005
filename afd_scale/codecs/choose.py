"""Which codec made a dataset's latents."""

import re
from pathlib import Path

import torch

from afd_scale.codecs.codec import Codec
from afd_scale.codecs.identity import NAME as IDENTITY
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.codecs.wan import NAME as WAN
from afd_scale.codecs.wan import WanCodec
from afd_scale.config import ConfigError


def codec_of(name: str, *, models: str | Path | None = None, device: torch.device | str = "cpu") -> Codec:
    """The codec that decodes the latents of a dataset.

    Args:
        name: of the codec, in the dataset's facts.
        models: where Wan's models are; only its codec needs them.
        device: where they run.
    Raises:
        ConfigError: no codec has this name, or the models are absent, others, or of no use.
    """
    if match := re.fullmatch(rf"{IDENTITY}:([1-9]\d*)x([1-9]\d*)x\2", name):
        if models is not None:
            raise ConfigError(f"models ({models}) must not be given: codec {name} has none")
        return IdentityCodec(int(match[1]), int(match[2]), device=device)
    if name.startswith(earlier := "space_time_to_depth:"):
        raise ConfigError(f"codec ({name}) must be {IDENTITY}:{name.removeprefix(earlier)}: it was renamed; write the "
                          "new name in dataset.json, or make the dataset again")  # fmt: skip
    if not name.startswith(f"{WAN}:"):
        raise ConfigError(f"codec ({name}) must be {IDENTITY}:TxPxP or {WAN}:TxPxP: no other is known")
    if models is None:
        raise ConfigError(f"models must be given: codec {name} decodes with the VAE that encoded")
    codec = WanCodec(models, device=device)
    if codec.name != name:
        raise ConfigError(f"models ({models}) must be of codec {name}: they are of {codec.name}")
    return codec
