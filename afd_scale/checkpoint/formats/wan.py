"""Original Wan, Self-Forcing and Causal-Forcing checkpoints, and the layout that every other format maps to.

`CausalWan` keeps original Wan's parameter names, so reading means finding the tensors and stripping what wrappers
left in the names. `weight_shapes` is the layout itself.
"""

import json
import logging
import pickle
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afd_scale.checkpoint.weights import read_safetensors, read_shards, save_safetensors, written_whole
from afd_scale.config.models import PolicyConfig
from afd_scale.config.presets import ARCHITECTURES

log = logging.getLogger(__name__)

Stated = dict[str, dict[str, Any]]  # fields that a source says, of the sections `student` and `sampler`

METADATA_KEY = "afd_scale"  # of a .safetensors header: the PolicyConfig as JSON
WAN_HEAD_WIDTH = 128
STEM = "diffusion_pytorch_model"  # original Wan's folders use diffusers' file names
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


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
    def of_state(cls, state: dict[str, Tensor], path: Path) -> "WanSizes":
        """Read the sizes off a state dict with our keys; ValueError where the telling tensors are absent."""
        telling = [
            f"{name}.weight" for name in ("patch_embedding", "blocks.0.ffn.0", "time_embedding.0", "text_embedding.0")
        ]
        shapes = [state[key].shape for key in telling if key in state]
        if [len(shape) for shape in shapes] != [5, 2, 2, 2]:
            raise ValueError(
                f"weights ({path}) must be of a Wan 2.1 transformer: {_names(set(telling) - state.keys())} not found "
                f"or misshapen, it holds {_names(state)}"
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


def check_state(state: dict[str, Tensor], path: Path) -> WanSizes:
    """Hold a state dict with our keys against its own sizes: no key missing or unknown, every shape consistent."""
    sizes = WanSizes.of_state(state, path)
    shapes = weight_shapes(sizes)
    for verb, keys in (("lack", shapes.keys() - state.keys()), ("have", state.keys() - shapes.keys())):
        if keys:
            what = "it is incomplete" if verb == "lack" else "only text-to-video Wan 2.1 is supported"
            raise ValueError(f"weights ({path}) must not {verb} {_names(keys)}: {what}")
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(f"weights ({path}) must have {key} of shape {shape}, it has {tuple(state[key].shape)}")
    return sizes


def complete_config(
    stated: Stated, sizes: WanSizes, path: Path, architecture: str | None = None, family: str | None = None
) -> PolicyConfig:
    """The PolicyConfig of weights that state only part of it; the rest is as published for Wan 2.1.

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
        return PolicyConfig.model_validate({"student": {**seen, **stated["student"]}, "sampler": sampler})
    except ValidationError as error:
        raise ValueError(f"weights ({path}) must describe a student: {error.errors()[0]['msg']}") from error


def read_wan_file(path: Path, prefer_ema: bool = True) -> tuple[Stated, dict[str, Tensor]]:
    """Read a `.safetensors`, `.pt` or `.pth` file.

    Args:
        prefer_ema: of a training checkpoint take `generator_ema` where there is one, else `generator`.
    Returns:
        The fields it states (all or none), and the state dict with wrappers' prefixes stripped.
    Raises:
        ValueError: the file is missing, damaged, holds more than tensors, or two names become one.
    """
    if path.suffix == ".safetensors":
        tree: dict[str, Any] = dict(read_safetensors(path))
        stated = _read_metadata(path)
    else:
        tree, stated = _read_torch_file(path), nothing_stated()
    choice = ("generator_ema", "generator") if prefer_ema else ("generator", "generator_ema")
    if name := next((name for name in choice if isinstance(tree.get(name), dict)), None):
        log.info("%s: reading its %s", path, name)
        tree = tree[name]
    if stray := {str(key) for key, value in tree.items() if not isinstance(value, Tensor)}:
        raise ValueError(f"weights ({path}) must hold tensors, or `generator`: {_names(stray)} is neither")
    return stated, strip_wrappers(tree, path)


def read_wan_folder(folder: Path) -> tuple[Stated, dict[str, Tensor]]:
    """Read a folder of original Wan (`config.json` of class WanModel): the fields it states, and its state dict."""
    said = json.loads((folder / "config.json").read_text())
    ours = {"num_heads": "num_heads", "eps": "eps", "text_len": "text_length"}
    student = {ours[key]: said[key] for key in ours if key in said}
    return {"student": student, "sampler": {}}, read_shards(folder, STEM)


def write_wan_file(state: Iterable[tuple[str, Tensor]], path: Path, config: PolicyConfig) -> None:
    """Write one `.safetensors` in Self-Forcing's layout (`model.` before each key), the config in its header.

    Raises:
        ValueError: the path exists or has another suffix.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"output ({path}) must end in .safetensors: the Wan layout is one file")
    with written_whole(path) as partial:
        tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state}
        save_safetensors(tensors, partial, {METADATA_KEY: config.model_dump_json()})


def nothing_stated() -> Stated:
    return {"student": {}, "sampler": {}}


def strip_wrappers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what FSDP, compile, checkpointing and outer modules put into them."""
    stripped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        while parts[0] in ("model", "module"):
            del parts[0]
        name = ".".join(parts)
        if name in stripped:
            raise ValueError(f"weights ({path}) must hold one network: two tensors are named {name} without prefixes")
        stripped[name] = tensor
    return stripped


def _read_torch_file(path: Path) -> dict[str, Any]:
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = "it is damaged, or holds other objects, which could run code"  # torch's text advises to allow them
        raise ValueError(f"weights ({path}) must be a torch file of tensors alone: {reason}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"weights ({path}) must hold a dict of tensors, it holds {type(tree).__name__}")
    return tree


def _read_metadata(path: Path) -> Stated:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        return PolicyConfig.model_validate_json(text).model_dump() if text else nothing_stated()
    except (SafetensorError, ValidationError) as error:
        raise ValueError(f"weights ({path}) must have a PolicyConfig as {METADATA_KEY} in its header") from error


def _disagreement(seen: dict[str, Any], preset: dict[str, Any]) -> str | None:
    """The first field on which they differ."""
    return next((field for field in seen if seen[field] != preset.get(field, seen[field])), None)


def _names(keys: Iterable[str], at_most: int = 3) -> str:
    ordered = sorted(keys)
    more = f" and {len(ordered) - at_most} more" if len(ordered) > at_most else ""
    return ", ".join(ordered[:at_most]) + more
