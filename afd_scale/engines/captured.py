"""Cached passes captured once and replayed: on a GPU as CUDA graphs, which cost no launches.

A pass of a few thousand tokens has seven hundred kernels, and a CPU needs longer to launch them than a GPU to run them.
What differs between passes of the same length is in buffers that a captured pass reads: latents, timesteps, the angles
of RoPE and the places in the cache. The number of keys that are seen is part of the graph, so each visible length has
one of its own; in a full window all chunks share it.

A kind of pass is captured when a second chunk meets it: of another rollout, or of the same one where the window is
full. Buffers and graphs last as long as the object.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from afd_scale.layers.kv_cache import KVCache, LayerCache
from afd_scale.layers.rope import Rotation, WindowRotation

log = logging.getLogger(__name__)

Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Tensor, Callable[[], object]]]  # to the output's buffer, and what fills it anew
NewCapture = Callable[[], Capture]


@dataclass
class CapturedPass:
    """One kind of pass.

    Attributes:
        noisy, timestep, places: buffers of its inputs; `places` are the tokens' in the cache.
        rotation: its angles are a buffer too.
        output, replay: what `Capture` gave.
    """

    noisy: Tensor
    timestep: Tensor
    places: Tensor
    rotation: Rotation | WindowRotation
    output: Tensor
    replay: Callable[[], object]


class CapturedPasses:
    """A network whose cached passes are captured; others, and those that read a text, run as they are.

    Args:
        network: whole, without hooks; its weights stay where they are.
        new_capture: makes what makes a function of no arguments one that is replayed.
    """

    def __init__(self, network: Any, new_capture: NewCapture):
        self.network, self.capture = network, new_capture()
        self.rollouts = 0
        self.met: dict[Any, tuple[int, int]] = {}  # the rollout and chunk that met a kind of pass first
        self.passes: dict[Any, CapturedPass] = {}
        self.buffers: dict[Any, list[LayerCache]] = {}
        self.works = True

    def new_cache(self, frames: int | None) -> KVCache:
        cache: KVCache = self.network.new_cache(frames)
        return cache

    @torch.no_grad()
    def __call__(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, *, cache: KVCache | None = None, **options: Any
    ) -> Tensor:  # fmt: skip
        """As `CausalWan.forward`; rollouts of videos of one shape share their buffers, one at a time."""
        if cache is None or not self.works:
            return self._run(noisy, timestep, text, cache=cache, **options)
        if not cache.has_text:
            if cache.is_new:
                videos = (len(noisy), *noisy.shape[2:], noisy.dtype, cache.ring.capacity)
                cache.adopt(self.buffers.setdefault(videos, cache.layers))
                self.rollouts += 1
            return self._run(noisy, timestep, text, cache=cache, **options)
        frames = noisy.shape[1]
        cache.begin_pass(frames)
        kind = (tuple(noisy.shape), noisy.dtype, cache.ring.capacity, cache.visible_frames, *options.items())
        here = (self.rollouts, cache.chunk)
        if kind not in self.passes and self.met.setdefault(kind, here) != here:
            self._try_to_capture(kind, noisy, timestep, cache, options)
        captured = self.passes.get(kind)
        if captured is None:
            return self._run(noisy, timestep, text, cache=cache, **options)
        rotation = self.network.cached_rotation(noisy, cache)
        captured.noisy.copy_(noisy)
        captured.timestep.copy_(timestep)
        for buffer, angles in zip(captured.rotation.angles, rotation.angles, strict=True):
            buffer.copy_(angles)
        captured.places.copy_(self._places(captured.places, cache))
        captured.replay()
        return captured.output.clone()

    def _run(self, *arguments: Any, **options: Any) -> Tensor:
        prediction: Tensor = self.network(*arguments, **options)
        return prediction

    def _try_to_capture(self, kind: Any, noisy: Tensor, timestep: Tensor, cache: KVCache, options: Any) -> None:
        rotation = self.network.cached_rotation(noisy, cache).copied()
        tokens = rotation.angles[0].shape[0]
        places = self._places(torch.arange(tokens, device=noisy.device), cache)
        noisy, timestep, still = noisy.clone(), timestep.clone(), cache.still(places, rotation)
        run = partial(self._run, noisy, timestep, None, cache=still, **options)
        try:
            self.passes[kind] = CapturedPass(noisy, timestep, places, rotation, *self.capture(run))
        except RuntimeError as error:  # of CUDA, of a kernel, of memory: passes run without
            self.works, self.passes = False, {}
            log.warning("rollout.graphs: passes run one kernel at a time: %s", " ".join(str(error).split())[:300])

    def _places(self, like: Tensor, cache: KVCache) -> Tensor:
        own = cache.ring.own
        start = own.start * len(like) // len(own)
        return torch.arange(start, start + len(like), device=like.device)


def choose_capture(choice: Literal["auto"] | bool, device: torch.device, shares_tokens: bool) -> NewCapture | None:
    """CUDA graphs, or None; says why not.

    Args:
        choice: `auto` captures on a GPU.
        shares_tokens: ranks exchange tokens inside of a pass.
    Raises:
        ValueError: graphs are asked for where there can be none.
    """
    if choice is False or (choice == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise ValueError(f"rollout.graphs (true) must be auto or false on a {device.type}: CUDA graphs need a GPU")
    if shares_tokens:
        log.info("rollout.graphs: none, ranks of a sequence exchange tokens inside of a pass")
        return None
    return CudaGraphs


class CudaGraphs:
    """Makes graphs that never run at the same time, and share their memory and the stream that they are captured on."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Run) -> tuple[Tensor, Callable[[], object]]:
        """A CUDA graph of what a function launches."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()  # kernels are chosen and compiled, workspaces allocated
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails half-way leaves its stream on; other threads may go on, the one that pins batches does.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            output = run()
        return output, graph.replay


def run_again(run: Run) -> tuple[Tensor, Callable[[], object]]:
    """Where there are no graphs: the same function on the same buffers."""
    output = run()
    return output, lambda: output.copy_(run())
