"""Convert a student between our folder, diffusers, original Wan and Self-Forcing, or adapters between LoRA dialects;
export it to run elsewhere.

    tools/convert_checkpoint.py runs/my-run exported --to pipeline --models Wan2.1-T2V-1.3B-Diffusers
    tools/convert_checkpoint.py runs/my-run exported --to diffusers --dtype bfloat16
    tools/convert_checkpoint.py self_forcing_dmd.pt student --to afd --family self-forcing
    tools/convert_checkpoint.py runs/my-lora-run lora --to peft

Exit 0: done, the last line says what was written. Exit 2: bad input, one line says which.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import fill_diffusers_folder
from afd_scale.checkpoint.formats.lora import Lora, export_comfyui, export_peft
from afd_scale.checkpoint.formats.pipeline import fill_pipeline_folder
from afd_scale.checkpoint.formats.self_forcing import write_self_forcing_file
from afd_scale.checkpoint.formats.served import STEPS, fill_served_folder
from afd_scale.checkpoint.formats.wan import write_wan
from afd_scale.checkpoint.lazy import LazyState
from afd_scale.checkpoint.load_student import read_lora, read_student
from afd_scale.checkpoint.roles import ROLES
from afd_scale.checkpoint.weights import MAX_SHARD_BYTES, save_weights, written_whole
from afd_scale.config import one_line
from afd_scale.config.command_line import Parser
from afd_scale.config.models import PolicyConfig
from afd_scale.config.presets import ARCHITECTURES, FAMILIES
from afd_scale.evaluation.model_card import find_run, model_card, write_card
from afd_scale.models.wan import CausalWan
from afd_scale.progress import progress

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
NO_MODELS = Path("none")
VERIFIED = 50_000_000  # parameters up to which both sides are run unless told otherwise


@dataclass(frozen=True)
class Job:
    """What a target writes.

    Attributes:
        state: the student's weights by our names, each read when asked for.
        config: what they are of.
        out: file or folder that does not exist yet.
        max_shard_bytes: of a file where a target is several.
        models: folder of VAE and text encoder that go along; None where none do.
    """

    state: LazyState
    config: PolicyConfig
    out: Path
    max_shard_bytes: int
    models: Path | None

    @property
    def arguments(self) -> tuple[Iterator[tuple[str, Tensor]], Path, PolicyConfig]:
        return iter(self.state.items()), self.out, self.config


TARGETS: dict[str, Callable[[Job], None]] = {
    "afd": lambda job: save_weights(*job.arguments, job.max_shard_bytes),
    "diffusers": lambda job: fill_diffusers_folder(*job.arguments, job.max_shard_bytes),
    "pipeline": lambda job: fill_pipeline_folder(*job.arguments, job.models, job.max_shard_bytes),
    "served": lambda job: fill_served_folder(*job.arguments, job.models, job.max_shard_bytes),
    "wan": lambda job: write_wan(*job.arguments, job.max_shard_bytes),
    "self-forcing": lambda job: write_self_forcing_file(*job.arguments[:2]),
}
CARRIES_CARD = ("diffusers", "pipeline", "served")  # folders for others, written into a new one
TAKES_MODELS = ("pipeline", "served")
LORA_TARGETS: dict[str, Callable[[Lora, Path], None]] = {"peft": export_peft, "comfyui-lora": export_comfyui}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        if options.to in LORA_TARGETS:
            convert_lora(options)
        else:
            convert(options)
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="run, checkpoint or student folder; diffusers or Wan folder; "
                        "file, folder or index of weights; LoRA")  # fmt: skip
    parser.add_argument("out", type=Path, help="folder to write; with `--to self-forcing` a .pt file, with "
                        "comfyui-lora a .safetensors file, with wan either a folder or such a file")  # fmt: skip
    parser.add_argument("--to", choices=(*TARGETS, *LORA_TARGETS), required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="keep")
    parser.add_argument("--weights", choices=tuple(ROLES), help="network of a run, or of a training checkpoint; "
                        "default: the one that a run exports, a training checkpoint's EMA")  # fmt: skip
    parser.add_argument("--no-ema", dest="weights", action="store_const", const="student", help="--weights student")
    parser.add_argument("--model-config", type=Path, help="JSON file with what the source does not state: fields of "
                        "original Wan's config.json, of diffusers', or of ours")  # fmt: skip
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), help="of a source that states none")
    parser.add_argument("--family", choices=tuple(FAMILIES), help="of a source that states none; default self-forcing")
    parser.add_argument("--max-shard-size", type=_bytes, default=MAX_SHARD_BYTES, metavar="SIZE",
                        help="of a file of afd, diffusers and wan folders, such as 2GB; default 5GB")  # fmt: skip
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="run what was read and what was "
        "written on one random input, print the largest difference; default for small models",
    )
    parser.add_argument("--models", type=Path, help="pipeline, served: folder in diffusers' layout whose VAE, text "
                        "encoder and tokenizer are copied; `none` leaves them out of a pipeline")  # fmt: skip
    parser.add_argument("--license", default="other", help="id of a licence, for the model card")
    return parser


def _check(options: argparse.Namespace) -> None:
    """What needs no weights."""
    if options.out.exists():
        raise ValueError(f"out ({options.out}) must not exist: nothing is overwritten")
    takes_models = options.to in TAKES_MODELS
    if takes_models != (options.models is not None) or (options.to == "served" and options.models == NO_MODELS):
        needed = "name a folder with VAE and text encoder" if takes_models else "not be given"
        without = "; none leaves them out" if options.to == "pipeline" else ""
        given = "" if options.models is None else f" ({options.models})"
        raise ValueError(f"--models{given} must {needed} with --to {options.to}{without}")
    if not re.fullmatch(r"[\w.-]+", options.license):
        raise ValueError(f"--license ({options.license}) must be an id such as apache-2.0")


def convert(options: argparse.Namespace) -> None:
    """Whole weights: read, check, write; ValueError in one line for bad input."""
    source = read_student(options.source, options.weights, options.model_config)
    config = source.config(options.architecture, options.family)
    with progress("Writing") as on_tensor:
        state = _prepared(source.state, DTYPES[options.dtype], on_tensor)
        models = None if options.models == NO_MODELS else options.models
        job = Job(state, config, options.out, options.max_shard_size, models)
        if options.to in CARRIES_CARD:
            _export(job, options)
        else:
            TARGETS[options.to](job)
    if options.verify or (options.verify is None and source.state.numel <= VERIFIED):
        written = read_student(options.out).state
        _report_difference([_forward(source.state, config)], [_forward(written, config)])
    student, family = config.student, config.sampler.family
    if student.prediction == "x0" and options.to not in ("afd", "pipeline"):
        print("note: this student predicts x0 where diffusers' schedulers and Wan's code expect a velocity: "
              "convert its output, (noisy - x0) / sigma")  # fmt: skip
    if options.to == "served" and config.sampler.timesteps != STEPS:
        steps = ", ".join(map(str, config.sampler.timesteps))
        print(f"note: FastVideo and SGLang take the steps {', '.join(map(str, STEPS))} unless told otherwise "
              f"(dmd_denoising_steps); this student's are {steps}")  # fmt: skip
    if options.to == "self-forcing" and not config.sampler.chunks.are_alike:
        print(f"note: Self-Forcing's code takes chunks of one length, but for a first one of 1 frame with "
              f"independent_first_frame: true; this student's are {config.sampler.chunks}")  # fmt: skip
    sizes = f"{student.num_layers} layers, dim {student.dim}, {student.num_heads} heads, family {family}"
    print(f"wrote {options.out} ({options.to}, {sizes}) from {source.kind} {source.path}")


def _export(job: Job, options: argparse.Namespace) -> None:
    """A folder for others to use, with its model card."""
    run = find_run(options.source)
    with_models = job.models is not None
    card = model_card(options.to, job.config, options.source, options.license, run, with_models=with_models)
    with written_whole(job.out) as partial:
        partial.mkdir()
        TARGETS[options.to](replace(job, out=partial))
        write_card(partial, card, run)


def convert_lora(options: argparse.Namespace) -> None:
    """Adapters alone, of a run or from any dialect."""
    for option in ("model_config", "architecture", "family"):
        if (value := getattr(options, option)) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} ({value}) must not be given with --to {options.to}: adapters state no config")
    lora = read_lora(options.source, options.weights)
    with progress("Writing") as on_tensor:
        tensors = _prepared(lora.tensors, DTYPES[options.dtype], on_tensor)
        LORA_TARGETS[options.to](Lora(tensors, lora.scales), options.out)
    if options.verify is not False:
        _report_difference(_products(lora), _products(read_lora(options.out)))
    print(f"wrote {options.out} ({options.to}, adapters of {len(lora.scales)} linears) from {options.source}")


def _prepared(state: LazyState, dtype: torch.dtype | None, on_tensor: Callable[[int, int], None]) -> LazyState:
    """In another dtype, each tensor counted as it is read."""
    read = 0

    def convert(_: str, tensor: Tensor) -> Tensor:
        nonlocal read
        read += 1
        on_tensor(read, len(state))
        return tensor if dtype is None else tensor.to(dtype)

    return state.converted(convert)


@torch.no_grad()
def _forward(state: LazyState, config: PolicyConfig) -> Tensor:
    """What a student makes of one random input: two chunks of a small size."""
    with torch.device("meta"):
        model = CausalWan(config.student, config.sampler)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    student, generator = config.student, torch.Generator().manual_seed(0)
    frames, (_, rows, columns) = config.sampler.chunks.start(2), student.patch
    noisy = torch.randn(1, frames, student.latent_channels, 4 * rows, 4 * columns, generator=generator)
    text = torch.randn(1, student.text_length, student.text_dim, generator=generator)
    velocity: Tensor = model.eval()(noisy, torch.full((1, frames), 625.0), text)
    return velocity


def _products(lora: Lora) -> list[Tensor]:
    """What each adapter makes of one random row."""
    generator = torch.Generator().manual_seed(0)
    products = []
    for module in sorted(lora.scales):
        down, up = (lora.tensors[f"{module}.{side}"].float() for side in ("down", "up"))
        products.append(lora.scales[module] * up @ (down @ torch.randn(down.shape[1], generator=generator)))
    return products


def _report_difference(before: list[Tensor], after: list[Tensor]) -> None:
    difference = max((one - other).abs().max().item() for one, other in zip(before, after, strict=True))
    size = max(one.abs().max().item() for one in before)
    print(
        f"verified: what is written computes the same, largest difference {difference:.3g} of values up to {size:.3g}"
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.upper())
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text} must be a size such as 2GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


if __name__ == "__main__":
    sys.exit(main())
