"""What files, tensors and classes are that a student cannot be read from: each refusal names it, from these tables."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

HEAD_BYTES = 512
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")

# Beginnings of files that hold no tensors for us. Upper and lower case are one.
_BEGINNINGS = (
    (rb"\s*$", "an empty file"),
    (rb"version https://git-lfs", "a git-LFS pointer, not the file itself: fetch that with `git lfs pull`"),
    (rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head|<!--)", "a web page (HTML), as a login or a failed download"
     " leaves it: download it again"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "an XML text, as a refused download leaves it: download it again"),
    (rb"GGUF", "a GGUF file, quantised for llama.cpp and ComfyUI: take the file that it was made from"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x93NUMPY", "a numpy array"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!", "a compressed archive: unpack it first"),
    (rb".{257}ustar", "a tar archive: unpack it first"),
)  # fmt: skip

# Files that a folder of another kind of checkpoint has.
_FOLDERS = (
    (r"(bf16_|fp16_)?zero_pp_rank_.*|.*_optim_states\.pt|zero_to_fp32\.py", "a DeepSpeed ZeRO checkpoint, in parts of "
     "each rank: make one file of it with the zero_to_fp32.py in it, and name that"),
    (r".*\.distcp", "a torch.distributed checkpoint, in parts of each rank: make one file of it with "
     "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`, and name that"),
)  # fmt: skip

IMAGE_TO_VIDEO = "an image-to-video Wan"
LORA = re.compile(r"(^|[._])(lora|lokr|loha|hada|oft)_|\.lora\.|\.(diff|diff_b|dora_scale)$")
QUANTISED = re.compile(
    r"scale_weight|weight_scale|scaled_fp8|comfy_quant|\.(scale_input|input_scale|absmax|quant_map|quant_state|qweight|"
    r"qzeros|scales|weight_packed)(\.|$)"
)

# Parts of names that one kind of network alone has, the nearest to ours first.
_NETWORKS = (
    (r"_flat_param", "in shards of FSDP that were not gathered"),
    (r"vace_(blocks|patch)", "a VACE, which edits videos"),
    (r"(face_adapter|motion_encoder|pose_patch_embedding)", "a Wan-Animate"),
    (r"(audio_(encoder|injector|proj)|casual_audio)", "a speech-to-video Wan"),
    (r"(control_adapter|ref_conv|cam_encoder|cam_injector)", "a Wan with control inputs"),
    (r"(img_emb\.|image_embedder\.|k_img|v_img|add_[kv]_proj)", IMAGE_TO_VIDEO),
    (r"double_blocks\.", "a HunyuanVideo or Flux transformer"),
    (r"(^|\.)transformer_blocks\.", "another transformer of diffusers"),
    (r"(^|\.)(input_blocks|mid_block|middle_block)\.", "a U-Net or its VAE"),
    (r"(^|\.)(encoder|decoder)\.(downsamples|upsamples|middle|conv1|conv_in|down_blocks|up_blocks)", "a VAE"),
    (r"(^|\.)(encoder\.block|token_embedding|shared)\.", "a T5 text encoder"),
    (r"(^|\.)layers\.\d+\.(self_attn|mlp)\.", "a language model"),
)

# `model_type` of original Wan's config.json.
MODEL_TYPES = {
    "i2v": IMAGE_TO_VIDEO, "flf2v": "a first-and-last-frame-to-video Wan", "ti2v": "Wan 2.2's text-and-image-to-video",
    "vace": "a VACE, which edits videos", "s2v": "a speech-to-video Wan", "animate": "a Wan-Animate",
}  # fmt: skip


def file_kind(path: Path) -> str | None:
    """What a file is by its beginning, where that can be no weights; None where it may be some. OSError."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    for beginning, what in _BEGINNINGS:
        if re.match(beginning, head, re.IGNORECASE | re.DOTALL):
            return what
    if _TEXT.fullmatch(head):
        first = " ".join(head.decode().split())
        return f"a text that begins {first[:40]!r}"
    return None


def folder_kind(folder: Path) -> str | None:
    """What a folder without weights of ours is, by the names of its files and those one level below."""
    names = {path.name for pattern in ("*", "*/*") for path in folder.glob(pattern)}
    return next((what for mark, what in _FOLDERS if any(re.fullmatch(mark, name) for name in names)), None)


def network_kind(names: Iterable[str]) -> str | None:
    """What tensors of these names are of; None where no table knows."""
    text = "\n".join(names)
    return next((what for mark, what in _NETWORKS if re.search(mark, text, re.MULTILINE)), None)


def quantisation(dtypes: Mapping[str, torch.dtype]) -> tuple[str, list[str]] | None:
    """How weights are quantised, in words, and the tensors that tell; None where they are not.

    Args:
        dtypes: of each tensor.
    """
    scales = [name for name in dtypes if QUANTISED.search(name)]
    small = [name for name, dtype in dtypes.items() if dtype.itemsize == 1]
    if not scales and not small:
        return None
    floating = any(dtypes[name].is_floating_point for name in small) or any("fp8" in name for name in scales)
    kind = "FP8" if floating else "integers"
    return f"{kind} {'with' if scales else 'without their'} scales", small or scales
