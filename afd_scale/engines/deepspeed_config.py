"""The DeepSpeed configuration of one network, generated from the run's config; an expert's raw keys go over it."""

from typing import Any

from afd_scale.config import RunConfig

# From here on Python's time per gather shows. Gathered together, parameters are cut out of one buffer, a slice for each
# of them and each rank: 8 ms a block of Wan at 64 ranks, 20 at 256, twice that with adapters. Gathered one by one they
# take 4 at any number of ranks, and a collective each; fewer ranks are better off with one collective.
MANY_RANKS = 64
SMALL = 50_000  # elements; of a Wan block all but its matrices, 0.1 % of it, and more than half of its collectives


def deepspeed_config(
    config: RunConfig, *, ranks: int = 1, gradient_norm: float = 0.0, frozen: bool = False, edited: bool = False
) -> dict[str, Any]:
    """ZeRO-3 for a network that is trained, or only sharded.

    Args:
        ranks: of the run.
        gradient_norm: the gradient is clipped to this global norm; 0 does not clip.
        frozen: the network has no optimizer, and its shards may be edited.
        edited: shards are edited in place, so none may live as a whole copy beside its shard.
    """
    generated: dict[str, Any] = {
        # Batches are ours: DeepSpeed only has to find its own accounting consistent.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_norm,
        "steps_per_print": 10**12,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0 if edited or frozen else _persistence(config, ranks),
            "stage3_allgather_sequential": ranks >= MANY_RANKS,
            "reduce_bucket_size": 250_000_000,  # elements: in float32 the bytes that DeepSpeed's own takes in bf16
            "memory_efficient_linear": False,  # replaces torch.nn.functional.linear for the whole process
            **_offload(config, frozen),
        },
        "bf16": {"enabled": config.precision != "fp32", "check_grad_overflow": False},
        # Added up in bf16, gradients of many ranks lose the small ones too: a sum rounds once a rank.
        "communication_data_type": "fp32",
        # The optimizers are torch's own, chosen by us: DeepSpeed would compile one.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.micro_batch is not None and config.precision != "fp32":
        generated["data_types"] = {"grad_accum_dtype": "fp32"}  # a sum of many in bf16 loses the small ones
    return merge(generated, config.engine.deepspeed)


def _persistence(config: RunConfig, ranks: int) -> int:
    """Parameters with fewer elements stay whole between passes, until the optimizer's step."""
    if config.engine.parameter_persistence is not None:
        return config.engine.parameter_persistence
    return SMALL if ranks >= MANY_RANKS else 0


def _offload(config: RunConfig, frozen: bool) -> dict[str, Any]:
    """Sections of what is offloaded.

    Raises:
        ValueError: nvme takes libaio, which is not here.
    """
    engine = config.engine
    if engine.offload_optimizer == "nvme":
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False):
            raise ValueError("engine.offload_optimizer (nvme) needs libaio (Debian: libaio-dev): DeepSpeed reads and "
                             "writes with it; cpu needs nothing")  # fmt: skip
    places: dict[str, str] = {"offload_param": engine.offload_parameters}
    if not frozen:
        places["offload_optimizer"] = engine.offload_optimizer
    path = {"nvme_path": str(engine.nvme_path)} if engine.nvme_path else {}
    return {key: {"device": device, "pin_memory": True, **path} for key, device in places.items() if device != "none"}


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries merged key by key; `over` wins."""
    merged = dict(under)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
