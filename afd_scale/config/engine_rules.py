"""What raw DeepSpeed keys may not say: policies are averaged, kept whole and saved by working on ZeRO-3's shards."""

import json
from collections.abc import Mapping
from typing import Any

# Keys of zero_optimization: the value that they may have, and why no other (DeepSpeed 0.19).
_REFUSED = {
    "stage": (3, "policies are averaged and saved shard by shard"),
    "zero_hpz_partition_size": (
        1,
        "a run builds several networks, the second of which fails with it, and passes would gather secondary copies "
        "that are older than the shards, which averages and loading edit",
    ),
    "zero_quantized_weights": (
        False,
        "passes would gather weights rounded to 8 bits, and rollouts that keep them whole the exact ones",
    ),
    "zero_quantized_nontrainable_weights": (
        False,
        "shards would be 8-bit integers, which averages and rollouts that keep weights whole cannot read",
    ),
    "zero_quantized_gradients": (False, "gradients would be rounded to 4 bits on their way; float32 adds them up"),
}


def check_raw_keys(raw: Mapping[str, Any]) -> None:
    """Look at `engine.deepspeed`.

    Raises:
        ValueError: names the first key that breaks a rule.
    """
    try:
        json.dumps(raw, allow_nan=False)
    except ValueError:
        raise ValueError("engine.deepspeed must hold finite numbers: DeepSpeed takes them as JSON") from None
    field, zero = "engine.deepspeed.zero_optimization", raw.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"{field} ({zero}) must be a section of keys")
    for key, (value, reason) in _REFUSED.items():
        if zero.get(key, value) != value:
            raise ValueError(f"{field}.{key} ({zero[key]}) must be {str(value).lower()}: {reason}")
    if "stage3_param_persistence_threshold" in zero:
        raise ValueError(f"{field}.stage3_param_persistence_threshold ({zero['stage3_param_persistence_threshold']}) "
                         "must be given as engine.parameter_persistence: networks whose shards are edited need 0"
                         )  # fmt: skip
