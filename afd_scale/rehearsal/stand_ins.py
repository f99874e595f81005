"""What a rehearsal reads in place of the files that a config names: tiny random ones of the same formats.

Each stands in a folder of its role under the name of the real one, so that whoever reads it finds the format as there.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import fill_diffusers_folder
from afd_scale.checkpoint.formats.lora import LINEARS, LONGLIVE, Lora, export_comfyui, export_peft
from afd_scale.checkpoint.formats.self_forcing import write_self_forcing_file
from afd_scale.checkpoint.formats.wan import WanSizes, weight_shapes, write_wan
from afd_scale.checkpoint.lazy import SAFETENSORS, TORCH, in_memory
from afd_scale.checkpoint.load_student import read_student
from afd_scale.checkpoint.weights import save_safetensors, save_weights, written_whole
from afd_scale.config import RunConfig
from afd_scale.config.judges import HttpJudgeConfig, MotionDiscriminatorConfig, VlmDiscriminatorConfig
from afd_scale.config.models import LoraConfig, PolicyConfig, StudentConfig, WanConfig
from afd_scale.config.run import WORLD_OF
from afd_scale.config.sampler import SamplerConfig
from afd_scale.rehearsal.shards import make_shards_small
from afd_scale.rehearsal.tiny_models import VLM_WIDTH, save_vlm, save_wan_models, vae_fields

log = logging.getLogger(__name__)

SPREAD = 0.5  # of weights, over the root of what goes into a linear: networks stay far from overflow


@dataclass(frozen=True)
class StandIn:
    """A file or folder that a rehearsal reads instead.

    Attributes:
        field: of the config that names the real one.
        wanted: what it names.
        form: of both, in words.
        is_here: the real one is; it is of the real size, which is not rehearsed.
    """

    field: str
    wanted: str
    form: str
    is_here: bool

    def __str__(self) -> str:
        where = "is here, at its real size" if self.is_here else "is not here"
        return f"{self.field} ({self.wanted}) {where}: in its place {self.form}"


def make_stand_ins(
    small: RunConfig, config: RunConfig, folder: Path, scorer_url: str
) -> tuple[RunConfig, list[StandIn]]:
    """Write what the small run reads.

    Args:
        small: the shrunk config, with the paths of the real files.
        config: as it runs on the cluster.
        folder: gets them.
        scorer_url: of a server that answers as a judge does.
    Returns:
        The small config with their paths, and what they stand for.
    """
    tree = small.model_dump(mode="json")
    made: list[StandIn] = []
    for role in small.cast:
        if role.of is None:
            section, place = _at(tree, role.section), folder / role.name
            made += _network(role.section, role.network, section, small.sampler, place)
            if isinstance(role.network, HttpJudgeConfig):
                section["url"] = scorer_url
                made.append(StandIn(f"{role.section}.url", role.network.url, "a server of noise", is_here=False))
    made += _negative(tree["method"], small, folder / "negative")
    if small.codec.models is not None:
        tree["codec"]["models"] = str(folder / "models" / Path(small.codec.models).name)
        save_wan_models(
            Path(tree["codec"]["models"]), vae_fields(small.student.latent_channels), small.student.text_dim
        )
        made.append(_stand_in("codec.models", small.codec.models, "a folder with VAE, text encoder and tokenizer"))
    for field, wanted, form, path, is_here in make_shards_small(small, config, folder):
        _at(tree, field.rpartition(".")[0])[field.rpartition(".")[2]] = path
        made.append(StandIn(field, wanted, form, is_here))
        if not is_here and small.evaluation.metrics in WORLD_OF:  # which reads a prompt's words
            tree["evaluation"] |= {"metrics": "none", "lengths": 1}
    tree["data"]["cache"] = None
    tree["out"] = str(folder.parent / "runs")
    return RunConfig.model_validate(tree), made


def _network(
    field: str, network: Any, section: dict[str, Any], sampler: SamplerConfig, folder: Path
) -> Iterator[StandIn]:
    """Stand-ins for what one network starts from; their paths go into its section."""
    if isinstance(network, WanConfig) and network.weights is not None:
        section["weights"], form = _wan(network, sampler, network.weights, folder / "weights")
        yield _stand_in(f"{field}.weights", network.weights, form)
        if network.lora is not None and network.lora.weights is not None:
            section["lora"]["weights"], form = _lora(network, network.lora, network.lora.weights, folder / "lora")
            yield _stand_in(f"{field}.lora.weights", network.lora.weights, form)
    elif isinstance(network, VlmDiscriminatorConfig):
        kind = "qwen2_5_vl" if "2.5" in Path(network.model).name or "2_5" in Path(network.model).name else "qwen2_vl"
        section["model"] = str(save_vlm(folder / "model" / Path(network.model).name, words=network.answers, kind=kind))
        yield _stand_in(f"{field}.model", network.model, f"a folder of {kind}")
        if network.weights is not None:
            section["weights"] = str(_vlm_weights(network, folder / "weights" / network.weights.name))
            yield _stand_in(f"{field}.weights", network.weights, "a file of a reward model")
    elif isinstance(network, MotionDiscriminatorConfig) and network.raft_weights is not None:
        if network.raft_weights.is_file():  # of one size, and small
            section["raft_weights"] = str(network.raft_weights.resolve())
        else:
            section |= {"raft_weights": None, "features": "flow"}
            yield StandIn(f"{field}.raft_weights", str(network.raft_weights), "features flow", is_here=False)
    elif isinstance(network, HttpJudgeConfig) and network.key_file is not None:
        key = folder / network.key_file.name
        key.parent.mkdir(parents=True)
        key.write_text("key-of-a-rehearsal\n")
        section["key_file"] = str(key)
        yield _stand_in(f"{field}.key_file", network.key_file, "another key")


def _wan(network: WanConfig, sampler: SamplerConfig, wanted: Path, folder: Path) -> tuple[str, str]:
    """Weights of a Wan in the format of a path, by what is there or by its name; where, and the format in words."""
    fields = {name: getattr(network, name) for name in WanConfig.model_fields if name not in ("weights", "lora")}
    student = StudentConfig.model_validate(fields)
    policy, path = PolicyConfig(student=student, sampler=sampler), folder / (wanted.name or "weights")
    state = random_wan(student).items()
    path.parent.mkdir(parents=True)
    form = _format(wanted)
    if form == "diffusers":
        with written_whole(path) as partial:
            partial.mkdir()
            fill_diffusers_folder(state, partial, policy)
        return str(path), "a folder of diffusers"
    if form == "torch":
        write_self_forcing_file(state, path)
        return str(path), "a file of Self-Forcing's form"
    if form == "safetensors":
        save_safetensors(dict(state), path)
        return str(path), "a file with original Wan's names"
    if form == "wan":
        write_wan(state, path, policy)
        return str(path), "a folder of original Wan"
    save_weights(state, path, policy)
    return str(path), "a student folder"


def _format(path: Path) -> str:
    if path.suffix in TORCH:
        return "torch"
    if path.suffix == SAFETENSORS:
        return "safetensors"
    if path.is_dir():
        try:
            kind = read_student(path).kind
        except ValueError:  # the checks at full size say why
            kind = ""
        return "diffusers" if kind.startswith("diffusers") else "wan" if kind.startswith("Wan") else "student"
    return "diffusers" if path.name == "transformer" or path.name.endswith("-Diffusers") else "student"


def random_wan(network: WanConfig, seed: int = 0) -> dict[str, Tensor]:
    """A Wan's state dict of random float32 numbers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = WanSizes(**{field: getattr(network, field) for field in WanSizes.__dataclass_fields__})
    return {
        name: torch.randn(shape, generator=generator) * (SPREAD / math.sqrt(math.prod(shape[1:]) or 1))
        for name, shape in weight_shapes(sizes).items()
    }


def _lora(network: WanConfig, lora: LoraConfig, wanted: Path, folder: Path) -> tuple[str, str]:
    """Adapters of a Wan, in a dialect of a path."""
    generator, path = torch.Generator().manual_seed(1), folder / (wanted.name or "lora")
    widths = {"ffn.0": (network.dim, network.ffn_dim), "ffn.2": (network.ffn_dim, network.dim)}
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for layer in range(network.num_layers):
        for linear in LINEARS:
            inputs, outputs = widths.get(linear, (network.dim, network.dim))
            module = f"blocks.{layer}.{linear}"
            tensors[f"{module}.down"] = torch.randn(lora.rank, inputs, generator=generator) / 10
            tensors[f"{module}.up"] = torch.randn(outputs, lora.rank, generator=generator) / 10
            scales[module] = lora.alpha / lora.rank
    adapters = Lora(in_memory(tensors), scales)
    path.parent.mkdir(parents=True)
    if wanted.suffix == SAFETENSORS:
        export_comfyui(adapters, path)
        return str(path), "a LoRA file of ComfyUI's dialect"
    if wanted.suffix in TORCH:
        sides = {"down": "lora_A", "up": "lora_B"}
        named = {f"{module}.{sides[side]}.weight": tensor for (module, _, side), tensor in
                 ((name.rpartition("."), tensor) for name, tensor in tensors.items())}  # fmt: skip
        torch.save({LONGLIVE: {f"base_model.model.{name}": tensor for name, tensor in named.items()}}, path)
        return str(path), "a LoRA file of LongLive's form"
    export_peft(adapters, path)
    return str(path), "a LoRA folder of PEFT's"


def _vlm_weights(network: VlmDiscriminatorConfig, path: Path) -> Path:
    """What goes over a tiny video-language model: a score, and where adapters are trained on, some."""
    tensors = {"rm_head.weight": torch.randn(1, VLM_WIDTH) / 10}
    if network.head == "yes_no":  # whose score is made of words
        tensors = {"model.norm.weight": torch.ones(VLM_WIDTH)}
    is_file = bool(path.suffix)
    folder = path.parent if is_file else path
    folder.mkdir(parents=True)
    if network.weights_adapters == "keep" and network.lora is not None:
        name, rank = "base_model.model.model.layers.0.self_attn.q_proj", network.lora.rank
        tensors |= {f"{name}.lora_A.weight": torch.randn(rank, VLM_WIDTH) / 10,
                    f"{name}.lora_B.weight": torch.randn(VLM_WIDTH, rank) / 10}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": network.lora.alpha}))
    if path.suffix in TORCH:
        torch.save(tensors, path)
    else:
        save_safetensors(tensors, path if is_file else path / "adapter_model.safetensors")
    return path


def _negative(method: dict[str, Any], config: RunConfig, folder: Path) -> Iterator[StandIn]:
    """The text that a score is guided away from."""
    wanted = method.get("negative")
    if wanted is None:
        return
    folder.mkdir(parents=True)
    method["negative"] = str(folder / Path(wanted).name)
    save_safetensors({"embedding": torch.randn(2, config.student.text_dim)}, Path(method["negative"]))
    yield _stand_in("method.negative", wanted, "an embedding of noise")


def _stand_in(field: str, wanted: Path | str, form: str) -> StandIn:
    return StandIn(field, str(wanted), form, Path(wanted).exists())


def _at(tree: dict[str, Any], section: str) -> dict[str, Any]:
    for key in section.split("."):
        tree = tree[key]
    return tree
