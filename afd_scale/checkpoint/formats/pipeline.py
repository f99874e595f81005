"""A whole pipeline that diffusers loads and runs: weights, sampler settings, and the code that samples with them."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import fill_diffusers_folder
from afd_scale.checkpoint.formats.models_folder import PARTS, VERSION, check_models, copy_models, write_json
from afd_scale.checkpoint.weights import MAX_SHARD_BYTES
from afd_scale.config.models import PolicyConfig

CODE = Path(__file__).with_name("causal_wan_pipeline.py")
CODE_NAME = "pipeline"  # the module that model_index.json names
CLASS = "CausalWanPipeline"


def fill_pipeline_folder(
    state: Iterable[tuple[str, Tensor]],
    folder: Path,
    config: PolicyConfig,
    models: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write what `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` reads into an empty folder.

    Args:
        state: our names and tensors, one by one.
        models: a folder in diffusers' layout whose VAE, text encoder and tokenizer are copied; None leaves them out,
            and the pipeline takes embeddings and gives latents.
    Raises:
        ValueError: the models are not the student's.
    """
    if models is not None:
        check_models(models, config.student)
        copy_models(models, folder)
    (folder / "transformer").mkdir()
    fill_diffusers_folder(state, folder / "transformer", config, max_shard_bytes)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(config))
    shutil.copyfile(CODE, folder / f"{CODE_NAME}.py")
    write_json(folder / "model_index.json", pipeline_index(config, with_models=models is not None))


def pipeline_index(config: PolicyConfig, with_models: bool) -> dict[str, Any]:
    """`model_index.json`: the parts, and the arguments of the pipeline's constructor."""
    sampler, student = config.sampler, config.student
    return {
        "_class_name": [CODE_NAME, CLASS],
        "_diffusers_version": VERSION,
        **{part: list(found) if with_models else [None, None] for part, found in PARTS.items()},
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        # A pipeline's video has one prompt.
        **sampler.model_dump(mode="json", exclude={"family", "timestep_shift", "at_prompt_change"}),
        "prediction": student.prediction,
        "text_length": student.text_length,
    }


def scheduler_config(config: PolicyConfig) -> dict[str, Any]:
    """diffusers' own scheduler that steps the same way: predict x0, then noise it to the next warped level."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "shift": config.sampler.timestep_shift,
        "stochastic_sampling": True,
    }
