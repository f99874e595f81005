"""What a GPU may be asked for, by name: the one table of budgets, each with its reason.

A budget is an upper bound. Raise one only with a reason that belongs in the table; lower one when code gets better.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Attributes:
        name: what is counted, where, of what.
        number, unit: how much of it there may be at most.
        reason: why so much and not more.
    """  # fmt: skip

    name: str
    number: float
    unit: str
    reason: str


_LAUNCHES = "a launch from Python costs some 10 us, and the host must stay ahead where chunks or ranks' parts are short"
_BESIDE = "two small products, a scaling and a sum beside each of a block's 10 linears"
_BYTES = "1.5 ms at 3.35 TB/s, beside 6.6 TFLOP of products: norms, gates and RoPE read and write bf16, and once"
_SYNC = "the host runs ahead of the GPU only as long as it asks it nothing"
_MIXED = "a CPU tensor among a GPU's is a copy, or an error that only a GPU shows"

BUDGETS = (
    Budget("kernels/cached_pass/1.3b", 700, "kernels", f"target: {_LAUNCHES}"),
    Budget("kernels/cached_pass/1.3b/lora", 700 + 30 * 40, "kernels", f"target: the base's, and {_BESIDE}"),
    Budget("kernels/cached_pass/14b", 920, "kernels", "target: as many a block as the 1.3B, 40 blocks"),
    Budget("kernels/cached_pass/14b/lora", 920 + 40 * 40, "kernels", f"target: the base's, and {_BESIDE}"),
    Budget("elementwise/block/forward", 5.0, "GB", f"target: {_BYTES}"),
    Budget("elementwise/block/forward_with_gradient", 5.0, "GB", "target: what backward needs is written anyway"),
    Budget("elementwise/block/backward", 30.5, "GB", "what it was when this was written, rounded up: no target yet"),
    Budget("elementwise/block/recompute", 5.0, "GB", "target: a second forward, up to the last tensor that is needed"),
    Budget("syncs/cached_pass", 0, "waits", _SYNC),
    Budget("syncs/rollout", 0, "waits", _SYNC),
    Budget("syncs/teacher_forcing", 0, "waits", _SYNC),
    Budget("mixed_devices/cached_pass", 0, "operators", _MIXED),
    Budget("mixed_devices/rollout", 0, "operators", _MIXED),
    Budget("mixed_devices/teacher_forcing", 0, "operators", _MIXED),
)
