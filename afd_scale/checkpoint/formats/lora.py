"""LoRA files in the dialects that are about, read to one form and written from it.

    peft        base_model.model.blocks.0.attn1.to_q.lora_A.weight     alpha in adapter_config.json
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight          alpha in the header, or folded in
    ComfyUI     diffusion_model.blocks.0.self_attn.q.lora_A.weight     alpha beside it
    kohya       lora_unet_blocks_0_self_attn_q.lora_down.weight        alpha beside it
    LongLive    {"generator_lora": peft's names of original Wan}       alpha is the rank

A dialect is told by its names, not by those of files. Where no alpha is said it is the rank, as everyone has it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, FiniteFloat, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from afd_scale.checkpoint.formats.diffusers import MODULES
from afd_scale.checkpoint.formats.wan import DTYPES, named
from afd_scale.checkpoint.lazy import (
    SAFETENSORS,
    LazyState,
    Stored,
    Tree,
    finite,
    only_weights,
    open_weights,
    read_metadata,
)
from afd_scale.checkpoint.signatures import LORA
from afd_scale.checkpoint.weights import save_safetensors, written_whole
from afd_scale.config import ConfigError
from afd_scale.config.errors import shown
from afd_scale.config.plain import UnreadableError
from afd_scale.files import checked, checked_json, read_json

LINEARS = (*(f"{kind}.{side}" for kind in ("self_attn", "cross_attn") for side in "qkvo"), "ffn.0", "ffn.2")
DOWN, UP = "down", "up"
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"  # of a header
LONGLIVE = "generator_lora"

_SIDES = {"lora_A": DOWN, "lora_down": DOWN, "lora.down": DOWN, "lora_B": UP, "lora_up": UP, "lora.up": UP}
_KEY = re.compile(r"(.*)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)?\.weight|(.*)\.alpha")
_OURS = {name: ours for ours in LINEARS for name in (ours, MODULES[ours])}  # of a linear under any name
_UNDERSCORED = {name.replace(".", "_"): ours for name, ours in _OURS.items()}


def _harmless(pattern: str) -> str:
    """A regular expression that no name takes it long to try: none with a repeated group."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"a pattern ({shown(pattern)}) must be a regular expression: {error}") from None
    if len(pattern) > 200 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
        raise ValueError(f"a pattern ({shown(pattern)}) must be a name, or repeat at most three things, no groups")
    return pattern


class _Peft(TypedDict, total=False):
    """What is looked at of peft's config."""

    lora_alpha: FiniteFloat | None
    alpha_pattern: dict[Annotated[str, AfterValidator(_harmless)], FiniteFloat] | None
    use_rslora: bool | None


_PEFT, _OBJECT = TypeAdapter(_Peft), TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Lora:
    """Adapters of a student's linears: W becomes W + scale up down.

    Attributes:
        tensors: `MODULE.down` (rank, inputs) and `MODULE.up` (outputs, rank), by our names of the linears.
        scales: by linear, alpha / rank.
    """

    tensors: LazyState
    scales: Mapping[str, float]

    def rank(self, module: str) -> int:
        return self.tensors.stored[f"{module}.{DOWN}"].shape[0]

    def alpha(self, module: str) -> float:
        return self.scales[module] * self.rank(module)


def _lora_in(tree: Tree, path: Path) -> Tree:
    """The only dict in a file's that holds adapters."""
    if any(isinstance(value, Stored) and LORA.search(name) for name, value in tree.items()):
        return tree
    found = [value for name, value in tree.items() if isinstance(value, dict) and _holds_lora(value)]
    if len(found) == 1:
        return _lora_in(found[0], path)
    what = f"adapters {len(found)} times" if found else named(tree)
    raise ValueError(f"lora ({path}) must be a LoRA file: it holds {what}")


def _holds_lora(tree: Tree) -> bool:
    return any(_holds_lora(value) if isinstance(value, dict) else LORA.search(name) for name, value in tree.items())


def open_lora(path: Path) -> Lora:
    """A LoRA file, or a folder with one, in any of the dialects.

    Raises:
        ValueError: it is damaged, no LoRA, or adapts something else than the linears that ours have.
    """
    file = path
    if path.is_dir():  # ours hold a file of each
        file = path / PEFT_WEIGHTS if (path / PEFT_WEIGHTS).is_file() else only_weights(path)
    tree = open_weights(file)
    tree = tree[LONGLIVE] if LONGLIVE in tree else _lora_in(tree, path)
    theirs: dict[str, str] = {}  # our name of a linear -> theirs
    tensors: dict[str, Stored] = {}
    alphas: dict[str, float] = {}
    for key, stored in tree.items():
        module, side = _parse(key, path)
        ours = _our_linear(module, path)
        theirs[ours] = module[module.index("blocks") :]
        if side is None:
            alphas[ours] = float(stored.read())
        elif f"{ours}.{side}" in tensors:
            raise ValueError(f"lora ({path}) must be of one network: two adapters are of {ours}")
        else:
            tensors[f"{ours}.{side}"] = stored
    _check_pairs(tensors, theirs, path)
    lora = Lora(LazyState(tensors), dict.fromkeys(theirs, 1.0))
    said = _peft_config(file, tree)
    scales = {
        ours: (alphas[ours] / lora.rank(ours) if ours in alphas else _scale(said, name, lora.rank(ours)))
        for ours, name in theirs.items()
    }
    return Lora(finite(lora.tensors, path), scales)


def write_peft_folder(lora: Lora, folder: Path, base: str | None = None) -> None:
    """Write what `PeftModel.from_pretrained` reads around a WanTransformer3DModel.

    Args:
        folder: made where it is not there.
        base: where the weights under the adapters are.
    """
    folder.mkdir(exist_ok=True)
    save_safetensors(dict(_in_diffusers_names(lora, PEFT_PREFIX)), folder / PEFT_WEIGHTS)
    config = {"base_model_name_or_path": base, "peft_type": "LORA", "task_type": None, **_as_peft_config(lora)}
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def export_peft(lora: Lora, folder: Path) -> None:
    """Write one folder that both peft and diffusers' `load_lora_weights` read, each its own file in it.

    Raises:
        ValueError: the folder exists or cannot be written.
    """
    with written_whole(folder) as partial:
        write_peft_folder(lora, partial)
        said = {f"transformer.{field}": value for field, value in _as_peft_config(lora).items()}
        tensors = dict(_in_diffusers_names(lora, "transformer."))
        save_safetensors(tensors, partial / DIFFUSERS_WEIGHTS, {DIFFUSERS_METADATA: json.dumps(said)})


def export_comfyui(lora: Lora, path: Path) -> None:
    """Write the file that ComfyUI and Wan's trainers read.

    Raises:
        ValueError: the path exists, has another suffix, or cannot be written.
    """
    if path.suffix != SAFETENSORS:
        raise ValueError(f"output ({path}) must end in {SAFETENSORS}: ComfyUI's dialect is one file")
    with written_whole(path) as partial:
        tensors = {f"diffusion_model.{key}": tensor for key, tensor in _in_peft_sides(lora)}
        for module in lora.scales:
            tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(lora.alpha(module))
        save_safetensors(tensors, partial)


def _parse(key: str, path: Path) -> tuple[str, str | None]:
    """A key's linear, under their name, and its side; None is alpha's."""
    match = _KEY.fullmatch(key)
    module = match and (match[1] or match[3])
    if match is None or not module:
        raise ValueError(f"lora ({path}) must hold low-rank adapters alone: {key} is something else")
    return module, _SIDES.get(match[2])


def _our_linear(module: str, path: Path) -> str:
    match = re.search(r"blocks([._])(\d+)\1(.+)$", module)
    linear = match and (_OURS if match[1] == "." else _UNDERSCORED).get(match[3])
    if match is None or linear is None:
        raise ValueError(f"lora ({path}) must adapt q, k, v, o and feed-forward of blocks alone: it adapts {module}")
    return f"blocks.{match[2]}.{linear}"


def _check_pairs(tensors: Mapping[str, Stored], modules: Mapping[str, str], path: Path) -> None:
    for module in modules:
        down, up = tensors.get(f"{module}.{DOWN}"), tensors.get(f"{module}.{UP}")
        if down is None or up is None or len(down.shape) != 2 or down.shape[:1] != up.shape[1:]:
            raise ValueError(
                f"lora ({path}) must hold two matrices of one rank for {module}: one is absent or misshapen"
            )
        if not (down.dtype in DTYPES and up.dtype in DTYPES) or 0 in (*down.shape, *up.shape):
            raise ValueError(f"lora ({path}) must hold numbers of 16 bits or more: {module} has {down.dtype} of shape "
                             f"{down.shape} and {up.dtype} of {up.shape}")  # fmt: skip


def _peft_config(file: Path, tree: Tree) -> _Peft:
    """What peft's config beside a file, or diffusers' in its header, says; empty where neither is there."""
    beside = file.with_name(PEFT_CONFIG)
    if beside.is_file() and any(name.startswith(PEFT_PREFIX) for name in tree):
        return read_json(beside, "lora", "be peft's config", _PEFT)
    text = read_metadata(file).get(DIFFUSERS_METADATA) if file.suffix == SAFETENSORS else None
    try:
        said = checked_json(text or "{}", _OBJECT)
        return checked({name.removeprefix("transformer."): value for name, value in said.items()}, _PEFT)
    except UnreadableError as error:
        raise ConfigError(f"lora ({file}) must have peft's config as {DIFFUSERS_METADATA} in its header: {error}"
                          ) from error  # fmt: skip


def _scale(said: _Peft, module: str, rank: int) -> float:
    """peft's rule: a pattern that a module's name ends in goes before the alpha of all."""
    patterns = said.get("alpha_pattern") or {}
    fitting = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(fitting, said.get("lora_alpha"))
    return (rank if alpha is None else alpha) / (rank**0.5 if said.get("use_rslora") else rank)


def _as_peft_config(lora: Lora) -> dict[str, Any]:
    modules = sorted(lora.scales)
    ranks = {_diffusers_module(module): lora.rank(module) for module in modules}
    alphas = {_diffusers_module(module): lora.alpha(module) for module in modules}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": list(ranks),
        "rank_pattern": {module: other for module, other in ranks.items() if other != rank},
        "alpha_pattern": {module: other for module, other in alphas.items() if other != alpha},
    }  # fmt: skip


def _diffusers_module(module: str) -> str:
    blocks, number, linear = module.split(".", 2)
    return f"{blocks}.{number}.{MODULES[linear]}"


def _in_peft_sides(lora: Lora) -> Iterator[tuple[str, Tensor]]:
    for module in lora.scales:
        for side, theirs in ((DOWN, "lora_A"), (UP, "lora_B")):
            yield f"{module}.{theirs}.weight", lora.tensors[f"{module}.{side}"].contiguous()


def _in_diffusers_names(lora: Lora, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in _in_peft_sides(lora):
        module, side, weight = key.rsplit(".", 2)
        yield f"{prefix}{_diffusers_module(module)}.{side}.{weight}", tensor
