"""Wan transformers as diffusers keeps them: `WanTransformer3DModel` folders, read and written without diffusers.

diffusers names the norm before cross-attention norm2 and the one before the feed-forward norm3; original Wan, and we,
the other way round. Source: WanTransformer3DModel of diffusers 0.39.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from afd_scale.checkpoint.formats.models_folder import VERSION
from afd_scale.checkpoint.formats.wan import ONLY, SIDECAR_NAME, STEM, Stated
from afd_scale.checkpoint.signatures import IMAGE_TO_VIDEO
from afd_scale.checkpoint.weights import MAX_SHARD_BYTES, write_shards
from afd_scale.config import ConfigError
from afd_scale.config.errors import shown
from afd_scale.config.models import PolicyConfig, WanConfig
from afd_scale.config.plain import UnreadableError
from afd_scale.config.section import Size
from afd_scale.files import checked

CONFIG_NAME = "config.json"
Weight = TypeVar("Weight")


class _Transformer(TypedDict):
    """What is looked at of a transformer's `config.json`."""

    num_attention_heads: Size
    attention_head_dim: Size
    ffn_dim: Size
    num_layers: Size
    freq_dim: Size
    text_dim: Size
    in_channels: Size
    patch_size: tuple[Size, Size, Size]
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]


_TRANSFORMER = TypeAdapter(_Transformer)

MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    # Of a block.
    **{f"self_attn.{side}": f"attn1.to_{side}" for side in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    **{f"cross_attn.{side}": f"attn2.to_{side}" for side in "qkv"},
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_OUR_MODULES = {theirs: ours for ours, theirs in MODULES.items()}


def _parts(key: str) -> tuple[str, str, str]:
    """The block, the module in it, and the parameter that a key names."""
    block = re.match(r"blocks\.\d+\.", key)
    prefix = block[0] if block else ""
    module, _, parameter = key.removeprefix(prefix).rpartition(".")
    return prefix, module, parameter


def diffusers_key(key: str) -> str:
    """diffusers' name of one of our keys."""
    block, module, parameter = _parts(key)
    return f"{block}scale_shift_table" if parameter == "modulation" else f"{block}{MODULES[module]}.{parameter}"


def diffusers_config(config: WanConfig) -> dict[str, Any]:
    """`config.json` of the WanTransformer3DModel with these weights."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": VERSION,
        "added_kv_proj_dim": None,
        "attention_head_dim": config.dim // config.num_heads,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.latent_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.latent_channels,
        "patch_size": list(config.patch),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def from_diffusers(state: Mapping[str, Weight]) -> dict[str, Weight]:
    """Rename diffusers' tensors to ours; a name we have none for stays, for `check_state` to report."""

    def our_key(key: str) -> str:
        block, module, parameter = _parts(key)
        if parameter == "scale_shift_table" and not module:
            return f"{block or 'head.'}modulation"
        return f"{block}{_OUR_MODULES[module]}.{parameter}" if module in _OUR_MODULES else key

    return {our_key(key): tensor for key, tensor in state.items()}


def fill_diffusers_folder(
    state: Iterable[tuple[str, Tensor]], folder: Path, config: PolicyConfig, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write what `WanTransformer3DModel.from_pretrained` reads, and the sidecar with the rest, into an empty folder.

    Args:
        state: our names and tensors, one by one.
    """
    write_shards(((diffusers_key(key), tensor) for key, tensor in state), folder, STEM, max_shard_bytes)
    (folder / CONFIG_NAME).write_text(json.dumps(diffusers_config(config.student), indent=2) + "\n")
    (folder / SIDECAR_NAME).write_text(config.model_dump_json(indent=2))


def stated_by_diffusers(said: Mapping[str, Any], path: Path) -> Stated:
    """The fields that a transformer's `config.json` states.

    Raises:
        ValueError: one is missing or of another type, or the network is no text-to-video Wan 2.1.
    """
    try:
        sizes = checked(said, _TRANSFORMER)
    except UnreadableError as error:
        raise ConfigError(f"weights ({path}) must be a transformer's config: {error}") from error
    rules = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": None, "added_kv_proj_dim": None,
             "out_channels": sizes["in_channels"]}  # fmt: skip
    for field, needed in rules.items():
        if said.get(field, needed) != needed:
            kind = "another Wan" if field in ("cross_attn_norm", "qk_norm") else IMAGE_TO_VIDEO
            raise ValueError(
                f"weights ({path}) must have {field} {needed}, it has {shown(said[field])}: this is {kind}; {ONLY}"
            )
    student = {
        "dim": sizes["num_attention_heads"] * sizes["attention_head_dim"], "num_heads": sizes["num_attention_heads"],
        "ffn_dim": sizes["ffn_dim"], "num_layers": sizes["num_layers"], "freq_dim": sizes["freq_dim"],
        "text_dim": sizes["text_dim"], "latent_channels": sizes["in_channels"], "patch": sizes["patch_size"],
        "eps": sizes["eps"], "prediction": "velocity",
    }  # fmt: skip
    return {"student": student, "sampler": {}}
