"""Start weights of a video-language judge: a model's folder, and over it a checkpoint of VideoAlign's kind or PEFT's.

Ours are transformers' names of today, the adapters of `layers/lora.py` beside them, and `score.weight`:

    visual.*, model.layers.*           the names of before transformers 4.52, which the hub's files still have
    lm_head.weight                     the head of words: two of its rows make the score of head `yes_no`
    rm_head.weight                     the score, of Qwen2VLRewardModelBT
    base_model.model.NAME              PEFT's, with NAME any of the above
    X.base_layer.weight                of a linear with an adapter
    X.lora_A[.default].weight          the adapter, `down`; `up` is lora_B

VideoAlign's folder holds `model_config.json` and checkpoint-N/, with all in `model.pth` or with adapters and the rest
in two files; PEFT's holds `adapter_config.json` and `adapter_model.safetensors`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import FiniteFloat, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from afd_scale.checkpoint.lazy import LazyState, Stored, open_weights
from afd_scale.config import one_line
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.config.section import Size
from afd_scale.files import read_json

State = dict[str, Tensor]

_EMBEDDING, _SCORE = "model.language_model.embed_tokens.weight", "score.weight"
_WORDS = "lm_head.weight"
_ADAPTER = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_FILES = ("model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth")


class _Peft(TypedDict):
    """What is looked at of peft's config."""

    r: Size
    lora_alpha: FiniteFloat
    use_rslora: NotRequired[bool | None]


class _VideoAlignLora(TypedDict):
    lora_r: Size
    lora_alpha: FiniteFloat
    use_rslora: NotRequired[bool | None]


class _VideoAlign(TypedDict):
    """What is looked at of VideoAlign's."""

    peft_lora_config: _VideoAlignLora


# Where a folder says its adapters' rank and alpha.
_PEFT_FILE, _VIDEO_ALIGN_FILE = "adapter_config.json", "model_config.json"
_PEFT, _VIDEO_ALIGN = TypeAdapter(_Peft), TypeAdapter(_VideoAlign)


@dataclass(frozen=True)
class Answers:
    """What a score in words is made of.

    Attributes:
        yes, no: rows of the head of words.
        tied: that head is the table of tokens.
    """

    yes: int
    no: int
    tied: bool


def load_vlm_state(
    config: VlmDiscriminatorConfig, section: str, adapter: str | None, shapes: Mapping[str, Sequence[int]],
    answers: Answers | None = None,
) -> State:  # fmt: skip
    """Weights for a judge's parameters.

    Args:
        section: of the config, for errors.
        adapter: that those in `weights` become, where they are kept.
        shapes: of the judge's parameters.
        answers: that the score starts as the log-odds of; None takes a score from the files.
    Returns:
        All that the files have of them. What they may lack is adapters and the score of a judge that is trained.
    Raises:
        ValueError: a file is absent or damaged, or of another network.
    """
    folder = _local_folder(config.model, section)
    state = _ours(_read(folder), f"{section}.model ({folder})")
    if config.weights is not None:
        kept = adapter if config.weights_adapters == "keep" else None
        _lay_over(state, _Checkpoint(config.weights, f"{section}.weights ({config.weights})"), config, kept, shapes)
    if answers is not None:
        if _SCORE in state:
            raise ValueError(f"{section}.head (yes_no) must be of a model that answers in words: {config.weights} has "
                             "a score")  # fmt: skip
        words = _EMBEDDING if answers.tied else _WORDS
        if words not in state:
            raise ValueError(f"{section}.model ({folder}) must hold {words} for head yes_no: it does not")
        yes, no = state[words][answers.yes], state[words][answers.no]
        state[_SCORE] = (yes.float() - no.float())[None]
    if config.optimizer is None and _SCORE not in state:
        raise ValueError(f"{section}.weights ({config.weights}) must hold a score, for a fixed judge: they do not")
    for name, shape in shapes.items():
        optional = ".adapters." in name or name == _SCORE
        if name not in state and not optional:
            raise ValueError(f"{section}.model ({folder}) must hold {name}: it does not")
        if name in state and tuple(state[name].shape) != tuple(shape):
            raise ValueError(f"{section}.model and weights must have {name} of {tuple(shape)}: it is of "
                             f"{tuple(state[name].shape)}")  # fmt: skip
    return {name: state[name] for name in shapes if name in state}


def _step(folder: Path) -> int:
    """Of `checkpoint-100`; names of another kind come first."""
    number = folder.name.rpartition("-")[2]
    return int(number) if re.fullmatch(r"\d{1,18}", number) else -1


class _Checkpoint:
    """What goes over a model: weights by our names, and adapters' two sides by the linear they belong to.

    Args:
        said: how errors name it.
    """

    def __init__(self, path: Path, said: str):
        self.said = said
        if not path.exists():
            raise ValueError(f"{said} must exist: there is no such file or folder")
        newest = max(path.glob("checkpoint-*"), key=_step, default=path)
        files = [path] if path.is_file() else [newest / name for name in _FILES if (newest / name).is_file()]
        if not files:
            raise ValueError(f"{said} must hold one of {', '.join(_FILES)}")
        self.folders = (newest, newest.parent) if path.is_dir() else (path.parent, path.parent.parent)
        read: State = {}
        for file in files:
            read |= _read(file)
        self.weights = _ours({name: tensor for name, tensor in read.items() if not _ADAPTER.fullmatch(name)}, said)
        self.adapters: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read.items():
            if found := _ADAPTER.fullmatch(name):
                self.adapters.setdefault(_renamed(found[1]), {})[found[2]] = tensor

    def scale(self) -> tuple[int, float]:
        """Rank and alpha of the adapters."""
        for folder in self.folders:
            if (path := folder / _PEFT_FILE).is_file():
                peft = read_json(path, "adapters", "be peft's config", _PEFT)
                return self._unscaled(peft.get("use_rslora"), peft["r"], peft["lora_alpha"])
            if (path := folder / _VIDEO_ALIGN_FILE).is_file():
                lora = read_json(path, "adapters", "be VideoAlign's config", _VIDEO_ALIGN)["peft_lora_config"]
                return self._unscaled(lora.get("use_rslora"), lora["lora_r"], lora["lora_alpha"])
        raise ValueError(f"{self.said} must say the rank and alpha of its adapters in {_PEFT_FILE} or "
                         f"{_VIDEO_ALIGN_FILE}: neither is there")  # fmt: skip

    def _unscaled(self, rslora: bool | None, rank: int, alpha: float) -> tuple[int, float]:
        if rslora:
            raise ValueError(f"{self.said} must have adapters scaled by alpha / rank: use_rslora is set")
        return rank, alpha


def _lay_over(
    state: State, checkpoint: _Checkpoint, config: VlmDiscriminatorConfig, kept: str | None, shapes: Mapping[str, Any]
) -> None:
    """Its weights instead of the model's; adapters are kept where the judge has one, and merged elsewhere."""
    for name, tensor in checkpoint.weights.items():
        if name not in shapes and name != _WORDS:
            raise ValueError(f"{checkpoint.said} must be of this model: {name} is not")
        if name == _EMBEDDING and len(tensor) < len(state[name]):  # cut to the tokenizer, and its reward tokens
            tensor = torch.cat([tensor, state[name][len(tensor) :].to(tensor)])
        state[name] = tensor
    if not checkpoint.adapters:
        return
    rank, alpha = checkpoint.scale()
    if kept is not None and config.lora is not None and (config.lora.rank, config.lora.alpha) != (rank, alpha):
        raise ValueError(f"{checkpoint.said} must have adapters of lora.rank {config.lora.rank} and lora.alpha "
                         f"{config.lora.alpha} to be kept: theirs are {rank} and {alpha}")  # fmt: skip
    for linear, sides in checkpoint.adapters.items():
        weight, ours = f"{linear}.weight", f"{linear}.adapters.{kept}"
        if weight not in state or sides.keys() != {"A", "B"}:
            raise ValueError(f"{checkpoint.said} must be of this model: its adapter of {linear} does not fit")
        if f"{ours}.down" in shapes:
            state[f"{ours}.down"], state[f"{ours}.up"] = sides["A"], sides["B"]
        else:
            product = sides["B"].float() @ sides["A"].float()
            state[weight] = (state[weight].float() + alpha / rank * product).to(state[weight].dtype)


def _read(path: Path) -> State:
    """All tensors of a file or a folder."""
    tree = open_weights(path)
    if stray := [name for name, stored in tree.items() if not isinstance(stored, Stored)]:
        raise ValueError(f"weights ({path}) must hold tensors alone: {stray[0]} is none")
    return dict(LazyState(tree))


def _ours(state: State, said: str) -> State:
    """Weights under our names."""
    found = {_renamed(name): tensor for name, tensor in state.items() if ".original_module." not in name}
    if _SCORE in found and len(found[_SCORE]) != 1:
        raise ValueError(f"{said} must score with one number a token: rm_head has {len(found[_SCORE])}")
    return found


def _renamed(name: str) -> str:
    name = re.sub(r"^base_model\.model\.", "", name)
    name = re.sub(r"\.(base_layer|modules_to_save\.\w+)(?=\.)", "", name)
    name = re.sub(r"^rm_head\.", "score.", name)
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", name)


def _local_folder(model: str, section: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"{section}.model ({model}) must be a folder, or a hub id in the local cache: "
                         f"{one_line(error)}") from error  # fmt: skip
