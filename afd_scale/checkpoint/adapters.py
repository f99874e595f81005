"""What a checkpoint of a LoRA run keeps of its student: the adapters, and where the base under them is.

`student/` is then a peft folder with two more files: `student.json`, as of any student, its `lora` set, and
`base.json`. The base is merged with them when they are read. A base that was moved is found again when its path in
`base.json` is corrected.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from afd_scale.checkpoint.formats.lora import DOWN, UP, Lora, write_peft_folder
from afd_scale.checkpoint.lazy import LazyState, in_memory
from afd_scale.checkpoint.weights import CONFIG_NAME
from afd_scale.config.models import PolicyConfig
from afd_scale.config.section import Section
from afd_scale.files import read_json
from afd_scale.layers.lora import merged_weight

BASE_NAME = "base.json"
_COMPARED = 1024  # first numbers of every tensor


class Base(Section):
    """The weights under adapters."""

    path: Path
    """The file or folder that holds them."""
    dtype: Literal["float32", "bfloat16"]
    """What the run rounded them to."""
    fingerprint: str
    """Of their names, shapes and first numbers: whatever format they are brought into, it stays."""


_BASE = TypeAdapter(Base)


def describe_base(path: Path, state: LazyState, dtype: torch.dtype) -> Base:
    """What a checkpoint says of its base.

    Args:
        state: by our names.
        dtype: of the frozen weights in the run.
    """
    name: Literal["float32", "bfloat16"] = "float32" if dtype == torch.float32 else "bfloat16"
    return Base(path=path.resolve(), dtype=name, fingerprint=_fingerprint(state))


def write_adapters(adapters: Mapping[str, Tensor], folder: Path, config: PolicyConfig, base: Base) -> None:
    """Write the student's folder of a LoRA run.

    Args:
        adapters: `MODULE.down` and `MODULE.up`, in host memory.
        folder: made.
        config: of the student, its `lora` set.
    Raises:
        OSError: the disk is full or fails.
    """
    lora = config.student.lora
    assert lora is not None
    scales = {name.rpartition(".")[0]: lora.alpha / lora.rank for name in adapters}
    write_peft_folder(Lora(in_memory(dict(adapters)), scales), folder, str(base.path))
    (folder / CONFIG_NAME).write_text(config.model_dump_json(indent=2))
    (folder / BASE_NAME).write_text(base.model_dump_json(indent=2))


def read_base(folder: Path) -> Base:
    """What a student folder of a LoRA run says of its base.

    Raises:
        ValueError: in one line.
    """
    return read_json(folder / BASE_NAME, "weights", "describe the base of adapters", _BASE)


def open_base(folder: Path, read: Callable[[Path], LazyState]) -> LazyState:
    """The weights under the adapters of a student folder, rounded as the run did it, in float32.

    Args:
        read: the weights of a path.
    Raises:
        ValueError: they are no longer there, or are others.
    """
    base, advice = read_base(folder), f"bring it back, or correct its path in {folder / BASE_NAME}"
    try:
        state = read(base.path)
    except ValueError as error:
        raise ValueError(f"weights ({folder}) must find the base of their adapters ({base.path}): {error}; {advice}"
                         ) from error  # fmt: skip
    if _fingerprint(state) != base.fingerprint:
        raise ValueError(f"weights ({folder}) must find the base of their adapters unchanged: {base.path} holds other "
                         f"weights than when the run started; {advice}")  # fmt: skip
    rounded = getattr(torch, base.dtype)
    return state.converted(lambda _, tensor: tensor.to(rounded).float())


def check_base(folder: Path, base: Base) -> None:
    """A run goes on over the base that it began with; ValueError where a checkpoint's student folder names another."""
    if (folder / BASE_NAME).is_file() and read_base(folder).fingerprint != base.fingerprint:
        raise ValueError(f"student.weights ({base.path}) must hold what they did when {folder} was written: its "
                         "adapters are of that base")  # fmt: skip


def merged(base: LazyState, lora: Lora) -> LazyState:
    """Whole weights, each with its adapter's product in float32, made when it is read."""
    if unknown := sorted(module for module in lora.scales if f"{module}.weight" not in base):
        raise ValueError(f"lora must adapt linears of its base: {unknown[0]} is none")

    def merge(name: str, weight: Tensor) -> Tensor:
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in lora.scales:
            return weight
        down, up = (lora.tensors[f"{module}.{side}"] for side in (DOWN, UP))
        return merged_weight(weight, down, up, lora.scales[module])

    return base.converted(merge)


def _fingerprint(state: LazyState) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:_COMPARED].double().numpy().tobytes())
    return digest.hexdigest()
