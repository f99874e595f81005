"""Original Wan's layout, which every other format maps to: `CausalWan` keeps its parameter names."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from afd_scale.checkpoint.lazy import read_metadata
from afd_scale.checkpoint.signatures import IMAGE_TO_VIDEO, network_kind, quantisation
from afd_scale.checkpoint.weights import MAX_SHARD_BYTES, POLICY, save_safetensors, write_shards, written_whole
from afd_scale.config import ConfigError
from afd_scale.config.errors import shown
from afd_scale.config.models import PolicyConfig, WanConfig
from afd_scale.config.plain import UnreadableError
from afd_scale.config.presets import ARCHITECTURES
from afd_scale.config.section import first_problem
from afd_scale.files import checked_json

Stated = dict[str, dict[str, Any]]  # fields that a source says, of the sections `student` and `sampler`

METADATA_KEY = "afd_scale"  # of a .safetensors header: the PolicyConfig as JSON
WAN_HEAD_WIDTH = 128
SIDECAR_NAME = "afd_scale.json"  # the PolicyConfig: no other config has a field for steps, warp, prediction
STEM = "diffusion_pytorch_model"  # original Wan's folders use diffusers' file names
ONLY = "only text-to-video Wan 2.1 is supported"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Weight(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class WanSizes:
    """What the shapes of the weights tell of an architecture; the head count is not among it."""

    dim: int
    ffn_dim: int
    num_layers: int
    freq_dim: int
    text_dim: int
    latent_channels: int
    patch: tuple[int, int, int]

    @classmethod
    def of_state(cls, state: Mapping[str, Weight], path: Path) -> "WanSizes":
        """Read the sizes off a state dict with our keys; ValueError where the telling tensors are absent."""
        telling = [
            f"{name}.weight" for name in ("patch_embedding", "blocks.0.ffn.0", "time_embedding.0", "text_embedding.0")
        ]
        shapes = [state[key].shape for key in telling if key in state]
        if [len(shape) for shape in shapes] != [5, 2, 2, 2]:
            raise ValueError(
                f"weights ({path}) must be of a Wan 2.1 transformer: {named(set(telling) - state.keys())} not found "
                f"or misshapen, it holds {named(state)}"
            )
        (dim, latent_channels, *patch), (ffn_dim, _), (_, freq_dim), (_, text_dim) = shapes
        layers = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
        frames, rows, columns = patch
        return cls(dim, ffn_dim, max(layers) + 1, freq_dim, text_dim, latent_channels, (frames, rows, columns))


def weight_shapes(sizes: WanSizes) -> dict[str, tuple[int, ...]]:
    """Every key of `CausalWan.state_dict()` with its shape."""
    dim, (_, rows, columns) = sizes.dim, sizes.patch

    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        norms = {f"{name}.norm_{side}.weight": (dim,) for side in "qk"}
        return {key: shape for side in "qkvo" for key, shape in linear(f"{name}.{side}", dim, dim).items()} | norms

    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, sizes.latent_channels, *sizes.patch), "patch_embedding.bias": (dim,),
        **linear("text_embedding.0", dim, sizes.text_dim), **linear("text_embedding.2", dim, dim),
        **linear("time_embedding.0", dim, sizes.freq_dim), **linear("time_embedding.2", dim, dim),
        **linear("time_projection.1", 6 * dim, dim),
        **linear("head.head", rows * columns * sizes.latent_channels, dim), "head.modulation": (1, 2, dim),
    }  # fmt: skip
    for layer in range(sizes.num_layers):
        block = {
            "modulation": (1, 6, dim), **attention("self_attn"), **attention("cross_attn"),
            "norm3.weight": (dim,), "norm3.bias": (dim,),
            **linear("ffn.0", sizes.ffn_dim, dim), **linear("ffn.2", dim, sizes.ffn_dim),
        }  # fmt: skip
        shapes |= {f"blocks.{layer}.{key}": shape for key, shape in block.items()}
    return shapes


def check_state(state: Mapping[str, Weight], path: Path) -> WanSizes:
    """Hold a state dict with our keys against its own sizes: no key missing or unknown, every shape consistent."""
    if quantised := quantisation({key: weight.dtype for key, weight in state.items()}):
        how, telling = quantised
        raise ValueError(f"weights ({path}) must not be quantised: the weights are {how} ({named(telling, 1)}); take "
                         "the file that they were made from")  # fmt: skip
    if empty := [key for key, weight in state.items() if 0 in weight.shape]:
        raise ValueError(f"weights ({path}) must be whole: {named(empty, 1)} is empty, as ZeRO-3 leaves what is not "
                         "gathered")  # fmt: skip
    sizes = WanSizes.of_state(state, path)
    shapes = weight_shapes(sizes)
    for verb, keys in (("lack", shapes.keys() - state.keys()), ("have", state.keys() - shapes.keys())):
        if keys:
            kind = network_kind(keys) or "another network" if verb == "have" else "incomplete"
            raise ValueError(f"weights ({path}) must not {verb} {named(keys)}: this is {kind}; {ONLY}")
    given = state["head.head.weight"].shape[0] // (sizes.patch[1] * sizes.patch[2])
    if given < sizes.latent_channels:
        raise ValueError(f"weights ({path}) must give as many channels as they take: they take {sizes.latent_channels} "
                         f"and give {given}, this is {IMAGE_TO_VIDEO}; {ONLY}")  # fmt: skip
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(f"weights ({path}) must have {key} of shape {shape}, it has {tuple(state[key].shape)}")
        if state[key].dtype not in DTYPES:
            raise ValueError(f"weights ({path}) must be floating-point numbers: {key} is of {state[key].dtype}")
    return sizes


def complete_config(
    stated: Stated, sizes: WanSizes, path: Path, architecture: str | None = None, family: str | None = None
) -> PolicyConfig:
    """The PolicyConfig of weights that state only part of it; the rest is as published for Wan 2.1.

    Its `student.weights` is None: these weights are themselves what a student starts from.

    Args:
        stated: what the source says.
        architecture: preset for the fields neither said nor seen in the shapes; its sizes must be the ones seen. None
            takes the preset with these sizes, or else Wan's own text length and head width.
        family: preset of the sampler; None is `self-forcing`.
    Raises:
        ValueError: the head count cannot be told, or the fields contradict each other.
    """
    seen = asdict(sizes)
    if architecture is not None:
        if field := _disagreement(seen, ARCHITECTURES[architecture]):
            raise ValueError(f"weights ({path}) must have {field} {ARCHITECTURES[architecture][field]} as architecture "
                             f"{architecture} says, it has {seen[field]}")  # fmt: skip
    else:
        architecture = next((name for name in ARCHITECTURES if not _disagreement(seen, ARCHITECTURES[name])), None)
    if architecture is None:
        if "num_heads" not in stated["student"] and sizes.dim % WAN_HEAD_WIDTH:
            raise ValueError(f"weights ({path}) must come with an architecture: the head count of dim {sizes.dim} "
                             "cannot be told from the shapes")  # fmt: skip
        seen |= {"architecture": "wan-1.3b", "num_heads": sizes.dim // WAN_HEAD_WIDTH}
    else:
        seen["architecture"] = architecture
    try:
        sampler = {"family": family or "self-forcing", **stated["sampler"]}
        return PolicyConfig.model_validate({
            "student": {**seen, **stated["student"], "weights": None}, "sampler": sampler
        })  # fmt: skip
    except ValidationError as error:
        raise ConfigError(f"weights ({path}) must describe a student: {first_problem(error, '')}") from error


def wan_config(config: WanConfig) -> dict[str, Any]:
    """`config.json` of the WanModel with these weights."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.latent_channels,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.latent_channels,
        "text_len": config.text_length,
    }


def write_wan(
    state: Iterable[tuple[str, Tensor]], out: Path, config: PolicyConfig, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the folder that original Wan's `WanModel.from_pretrained` reads, or one `.safetensors` with the same keys.

    Args:
        out: one file, our config in its header, where it ends in .safetensors; else a folder, our config beside it.
    Raises:
        ValueError: the path exists or cannot be written.
    """
    with written_whole(out) as partial:
        if out.suffix == ".safetensors":
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state}
            save_safetensors(tensors, partial, {METADATA_KEY: config.model_dump_json()})
            return
        partial.mkdir()
        write_shards(state, partial, STEM, max_shard_bytes)
        (partial / "config.json").write_text(json.dumps(wan_config(config.student), indent=2) + "\n")
        (partial / SIDECAR_NAME).write_text(config.model_dump_json(indent=2))


def stated_in_header(path: Path) -> Stated:
    """The PolicyConfig in a safetensors file's header; nothing where there is none."""
    text = read_metadata(path).get(METADATA_KEY)
    try:
        return checked_json(text, POLICY).model_dump() if text else nothing_stated()
    except UnreadableError as error:
        raise ConfigError(f"weights ({path}) must have a PolicyConfig as {METADATA_KEY} in its header: {error}"
                          ) from error  # fmt: skip


def nothing_stated() -> Stated:
    return {"student": {}, "sampler": {}}


def _disagreement(seen: dict[str, Any], preset: dict[str, Any]) -> str | None:
    """The first field on which they differ."""
    return next((field for field in seen if seen[field] != preset.get(field, seen[field])), None)


def named(keys: Iterable[str], at_most: int = 3) -> str:
    """The first few names, for an error."""
    ordered = sorted(map(shown, keys))
    more = f" and {len(ordered) - at_most} more" if len(ordered) > at_most else ""
    return ", ".join(ordered[:at_most]) + more
