"""What a JSON file says of a student: our own, a diffusers transformer's, original Wan's or a causal Wan's config."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afd_scale.checkpoint.formats.diffusers import CONFIG_NAME, stated_by_diffusers
from afd_scale.checkpoint.formats.wan import SIDECAR_NAME, Stated, nothing_stated
from afd_scale.checkpoint.lazy import read_object
from afd_scale.checkpoint.signatures import IMAGE_TO_VIDEO, MODEL_TYPES
from afd_scale.checkpoint.weights import read_config
from afd_scale.config.errors import shown

WAN_CLASS = re.compile(r"(?!Autoencoder)\w*Wan\w*(?<!Pipeline)")
# Original Wan's names, Self-Forcing's and our own of the same fields.
_STUDENT = {
    **{name: name for name in ("dim", "ffn_dim", "freq_dim", "text_dim", "num_heads", "num_layers", "eps")},
    "text_len": "text_length", "text_length": "text_length", "in_dim": "latent_channels",
    "latent_channels": "latent_channels", "prediction": "prediction",
}  # fmt: skip
_SAMPLER = {
    "chunk_frames": "chunk_frames", "first_chunk_frames": "first_chunk_frames", "num_frames_per_block": "chunk_frames",
    "num_frame_per_block": "chunk_frames", "window_frames": "window_frames",
    "local_attn_size": "window_frames", "sink_frames": "sink_frames", "sink_size": "sink_frames",
    "timestep_shift": "timestep_shift", "timesteps": "timesteps", "positions": "positions",
}  # fmt: skip


def read_stated(path: Path) -> Stated:
    """The fields that a JSON file states.

    Raises:
        ValueError: it is no JSON, or of something that is no text-to-video Wan 2.1.
    """
    said = read_object(path, "config")
    class_name = str(said.get("_class_name", "WanModel"))
    if "student" in said:
        return read_config(path).model_dump()
    if not WAN_CLASS.fullmatch(class_name):
        raise ValueError(
            f"weights ({path}) must be of a Wan, as WanTransformer3DModel or WanModel, it is of {shown(class_name)}"
        )
    if "num_attention_heads" in said or "Transformer3DModel" in class_name:
        return {"student": stated_by_diffusers(said, path)["student"], "sampler": _sampler(said)}
    if not (student := _known(said, _STUDENT)):
        raise ValueError(f"config ({path}) must describe a student: it has none of {', '.join(_STUDENT)}")
    model_type, taken = said.get("model_type", "t2v"), said.get("in_dim")
    differs = taken is not None and said.get("out_dim", taken) != taken
    if model_type != "t2v" or differs:
        kind = MODEL_TYPES.get(
            str(model_type), IMAGE_TO_VIDEO if differs else f"a Wan of model_type {shown(model_type)}"
        )
        raise ValueError(f"weights ({path}) must be of a text-to-video Wan 2.1: this is {kind}")
    return {"student": student, "sampler": _sampler(said)}


def stated_beside(folder: Path) -> Stated:
    """What the JSON files in a folder of weights state: all with our sidecar, some with a config, or nothing."""
    for name in (SIDECAR_NAME, CONFIG_NAME):
        if (folder / name).is_file():
            return read_config(folder / name).model_dump() if name == SIDECAR_NAME else read_stated(folder / name)
    return nothing_stated()


def _sampler(said: Mapping[str, Any]) -> dict[str, Any]:
    """How it is sampled; an independent first frame is a first chunk of one: Self-Forcing's and CausVid's word."""
    first = {"first_chunk_frames": 1} if said.get("independent_first_frame") is True else {}
    return first | _known(said, _SAMPLER)


def _known(said: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The fields among them, by our names; a window of -1 frames is none, and needs no sink."""
    found = {ours: said[name] for name, ours in names.items() if said.get(name) is not None}
    if found.get("window_frames") == -1:
        found |= {"window_frames": None, "sink_frames": 0}
    return found
