"""The folder that FastVideo and SGLang serve as a Self-Forcing student.

`model_index.json` names WanCausalDMDPipeline; the transformer is a CausalWanTransformer3DModel with the keys that
diffusers gives Wan. The two share these classes, SGLang has them from FastVideo. What they read was looked up in their
sources; tests/unit/checkpoint/served_sources.json records it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import CONFIG_NAME, diffusers_config, fill_diffusers_folder
from afd_scale.checkpoint.formats.models_folder import PARTS, VERSION, check_models, copy_models, write_json
from afd_scale.checkpoint.weights import MAX_SHARD_BYTES
from afd_scale.config.models import PolicyConfig

TRANSFORMER = "CausalWanTransformer3DModel"
SCHEDULER = "SelfForcingFlowMatchScheduler"
STEPS = (1000, 750, 500, 250)  # that they take unless told otherwise; a folder cannot say any
UNWINDOWED_FRAMES = 21  # latent frames that they keep where no window is said
MAX_CHUNK_FRAMES = 3


def fill_served_folder(
    state: Iterable[tuple[str, Tensor]],
    folder: Path,
    config: PolicyConfig,
    models: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a whole folder into an empty one; arguments as of `fill_pipeline_folder`.

    Raises:
        ValueError: the models are not the student's, or the servers cannot run such a student.
    """
    check_served(config)
    assert models is not None, "a server decodes"
    check_models(models, config.student)
    copy_models(models, folder)
    (folder / "transformer").mkdir()
    fill_diffusers_folder(state, folder / "transformer", config, max_shard_bytes)
    write_json(folder / "transformer" / CONFIG_NAME, served_config(config))
    write_json(folder / "scheduler" / "scheduler_config.json", served_scheduler(config))
    write_json(folder / "model_index.json", served_index())


def check_served(config: PolicyConfig) -> None:
    """Hold a student against what the servers take for granted; ValueError for what their folder cannot say."""
    sampler, student = config.sampler, config.student
    rules = (
        ("prediction", student.prediction, student.prediction == "velocity", "velocity"),
        ("text_length", student.text_length, student.text_length == 512, "512"),
        ("chunk_frames", sampler.chunk_frames, sampler.chunk_frames <= MAX_CHUNK_FRAMES, f"{MAX_CHUNK_FRAMES} or less"),
        ("first_chunk_frames", sampler.first_chunk_frames, sampler.chunks.are_alike, "None"),
        ("positions", sampler.positions, sampler.positions == "absolute", "absolute"),
        ("first_chunk_timesteps", sampler.first_chunk_timesteps, sampler.first_chunk_timesteps is None, "None"),
    )
    for field, value, fits, needed in rules:
        if not fits:
            raise ValueError(f"{field} ({value}) must be {needed}: FastVideo and SGLang serve no other student")


def served_index() -> dict[str, Any]:
    """`model_index.json`."""
    return {
        "_class_name": "WanCausalDMDPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", SCHEDULER],
        **{part: list(found) for part, found in PARTS.items()},
        "transformer": ["diffusers", TRANSFORMER],
    }


def served_config(config: PolicyConfig) -> dict[str, Any]:
    """`config.json` of the transformer: diffusers' fields, and the servers' for chunk, window and sink."""
    sampler = config.sampler
    return {
        **diffusers_config(config.student),
        "_class_name": TRANSFORMER,
        "num_frames_per_block": sampler.chunk_frames,
        "local_attn_size": sampler.window_frames or -1,
        "sink_size": sampler.sink_frames,
        "sliding_window_num_frames": sampler.window_frames or UNWINDOWED_FRAMES,  # SGLang's size of the cache
    }


def served_scheduler(config: PolicyConfig) -> dict[str, Any]:
    """`scheduler_config.json`: a table of 1000 warped levels from 1 down, in which the servers look their steps up."""
    return {
        "_class_name": SCHEDULER,
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "num_inference_steps": 1000,
        "shift": config.sampler.timestep_shift,
        "sigma_max": 1.0,
        "sigma_min": 0.0,
        "extra_one_step": True,
        "inverse_timesteps": False,
        "reverse_sigmas": False,
    }
