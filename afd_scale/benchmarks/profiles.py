"""Where the time of something goes, by torch's profiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LARGEST = 10


def largest(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """The ten largest kernels of a GPU, or operators of a CPU without what they call, over a run after a first one.

    Returns:
        Name, calls, seconds, and share of all kernels' or operators' time together; falling.
    """
    run()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = "CUDA" if on_gpu else "CPU"
    events = [e for e in profiler.key_averages() if e.device_type.name == kind and not e.is_user_annotation]
    seconds = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6 for e in events}
    together = sum(seconds.values())
    calls = {e.key: e.count for e in events}
    ranked = sorted(seconds, key=lambda name: -seconds[name])[:LARGEST]
    return [
        {"name": name, "share": seconds[name] / together, "seconds": seconds[name], "calls": calls[name]}
        for name in ranked
    ]
