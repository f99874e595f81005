"""How a causal student generates."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from afd_scale.config.presets import FAMILIES, with_preset
from afd_scale.config.section import Section

Timesteps = tuple[int, ...]
Family = Literal["toy", "self-forcing", "krea-realtime", "longlive", "causal-forcing", "causal-forcing-framewise"]


class SamplerConfig(Section):
    """A video chunk by chunk, each in a few denoising steps that see the chunks before it."""

    family: Family = "toy"
    """Preset of the fields below; any of them overrides it."""
    chunk_frames: PositiveInt = 1
    """Latent frames denoised together."""
    timesteps: Timesteps = Field(default=(1000, 750, 500, 250), min_length=1)
    """Denoising steps in (0, 1000], falling, before the warp."""
    first_chunk_timesteps: Timesteps | None = Field(default=None, min_length=1)
    """Those of the first chunk, which has no past to lean on; None takes `timesteps`."""
    timestep_shift: PositiveFloat = 3.0
    """s of the warp sigma' = s sigma / (1 + (s - 1) sigma)."""
    window_frames: PositiveInt | None = None
    """Latent frames a chunk may attend to, itself and the sink included; None is all."""
    sink_frames: int = Field(default=0, ge=0)
    """First latent frames that never leave the window."""

    @property
    def layout(self) -> tuple[int, int | None, int]:
        """Chunk, window and sink: what decides which frames see which."""
        return self.chunk_frames, self.window_frames, self.sink_frames

    def cached_frames(self, frames: int) -> int:
        """Latent frames that a chunk at the end of so many sees, itself included."""
        return min(frames, self.window_frames or frames)

    def timesteps_of(self, chunk: int) -> Timesteps:
        """Denoising steps of a chunk."""
        return self.first_chunk_timesteps or self.timesteps if chunk == 0 else self.timesteps

    def passes(self, frames: int) -> list[int]:
        """Forward passes of each chunk of a rollout: its steps, and one to cache it unless it is the last."""
        chunks = frames // self.chunk_frames
        return [len(self.timesteps_of(chunk)) + (chunk + 1 < chunks) for chunk in range(chunks)]

    def calls(self, frames: int) -> int:
        """Of the network in a rollout."""
        return len(self.order_of_calls(frames))

    def order_of_calls(self, frames: int) -> list[tuple[int, int, int]]:
        """Calls of the network in a rollout: their chunk, the chunks that they run, and those that they see, these
        included.

        A clean pass and the next chunk's first step are one while no slot of the cache is used again.
        """
        slots = self.cached_frames(frames) // self.chunk_frames
        calls = []
        for chunk, passes in enumerate(self.passes(frames)):
            begun, goes_on, seen = 0 < chunk < slots, chunk + 1 < slots, min(chunk + 1, slots)
            calls += [(chunk, 1, seen)] * (passes - begun - goes_on) + [(chunk, 2, seen + 1)] * goes_on
        return calls

    @model_validator(mode="before")
    @classmethod
    def _fill_from_family(cls, values: Any) -> Any:
        return with_preset(values, "family", FAMILIES)

    @model_validator(mode="after")
    def _check(self) -> "SamplerConfig":
        for name in ("timesteps", "first_chunk_timesteps"):
            steps = getattr(self, name) or ()
            if any(not 0 < t <= 1000 for t in steps) or list(steps) != sorted(set(steps), reverse=True):
                raise ValueError(f"{name} ({list(steps)}) must fall strictly within (0, 1000]: denoising steps do")
        if self.window_frames is None:
            if self.sink_frames:
                raise ValueError(
                    f"sink_frames ({self.sink_frames}) needs window_frames: nothing leaves without a window"
                )
            return self
        for name, frames in (("window_frames", self.window_frames), ("sink_frames", self.sink_frames)):
            if frames % self.chunk_frames:
                raise ValueError(f"{name} ({frames}) must be a multiple of chunk_frames ({self.chunk_frames}): "
                                 "the window moves by whole chunks")  # fmt: skip
        if self.window_frames - self.sink_frames < self.chunk_frames:
            raise ValueError(f"window_frames ({self.window_frames}) must hold the sink ({self.sink_frames}) "
                             f"and one chunk ({self.chunk_frames})")  # fmt: skip
        return self
