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
_FIRST = "once a chunk: the angles of its RoPE"
_BESIDE = "an adapter that is apart: two kernels beside each linear, q, k and v sharing the first of theirs"
_BYTES = "1.5 ms at 3.35 TB/s, beside 6.6 TFLOP of products: norms, gates and RoPE read and write bf16, and once"
_SYNC = "the host runs ahead of the GPU only as long as it asks it nothing"
_MIXED = "a CPU tensor among a GPU's is a copy, or an error that only a GPU shows"
_GATHERS = "DeepSpeed's hooks, and no slicing of parameters x ranks: small ones stay whole, others come one by one"
_BREAKS = "a break ends the kernel that was being fused, and costs Python on both sides"

BUDGETS = (
    Budget("kernels/cached_pass/1.3b", 700, "kernels", _LAUNCHES),
    Budget("kernels/cached_pass/1.3b/first", 725, "kernels", _FIRST),
    Budget("kernels/cached_pass/1.3b/lora", 1150, "kernels", _BESIDE),
    Budget("kernels/cached_pass/1.3b/window", 730, "kernels", "keys are copied into their slot: one more a block"),
    Budget("elementwise/cached_pass/1.3b/window", 22.5, "GB", "18.5, and a window's 18,720 keys turned in each layer"),
    Budget("kernels/cached_pass/14b", 920, "kernels", "as many a block as the 1.3B, 40 blocks"),
    Budget("kernels/cached_pass/14b/lora", 1520, "kernels", _BESIDE),
    Budget("elementwise/block/forward", 4.5, "GB", _BYTES),
    Budget("elementwise/block/forward_with_gradient", 4.5, "GB", "what backward needs is written anyway"),
    Budget("elementwise/block/backward", 19.5, "GB", "uncompiled: sums over frames, and keys' gradients in float32"),
    Budget("elementwise/block/recompute", 4.5, "GB", "a second forward, up to the last tensor that is needed"),
    Budget("syncs/cached_pass", 0, "waits", _SYNC),
    Budget("syncs/rollout", 0, "waits", _SYNC),
    Budget("syncs/teacher_forcing", 0, "waits", _SYNC),
    Budget("mixed_devices/cached_pass", 0, "operators", _MIXED),
    Budget("mixed_devices/rollout", 0, "operators", _MIXED),
    Budget("mixed_devices/teacher_forcing", 0, "operators", _MIXED),
    Budget("python/64_ranks/forward", 31.0, "x calls of plain modules", _GATHERS),
    Budget("python/64_ranks/training", 7.2, "x calls of plain modules", _GATHERS),
    Budget("python/64_ranks/resident", 1.02, "x calls of plain modules", "a twin has no hooks"),
    Budget("python/256_ranks/forward", 31.0, "x calls of plain modules", _GATHERS),
    Budget("python/256_ranks/training", 10.0, "x calls of plain modules", f"{_GATHERS}; a reduce-scatter slices still"),
    Budget("python/256_ranks/resident", 1.02, "x calls of plain modules", "a twin has no hooks"),
    Budget("compile/breaks", 0, "graph breaks", _BREAKS),
    Budget("compile/recompilations/rollout", 2, "graphs", "the two parts of a block, of one chunk and of two at once"),
    Budget("compile/recompilations/update", 2, "graphs", "the two parts of a block, without gradient and with"),
)
