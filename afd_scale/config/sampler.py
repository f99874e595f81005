"""How a causal student generates."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from afd_scale.chunks import Chunks
from afd_scale.config.errors import ConfigError
from afd_scale.config.presets import FAMILIES, with_preset
from afd_scale.config.section import Section, first_problem

Timesteps = tuple[int, ...]
Family = Literal["toy", "self-forcing", "krea-realtime", "longlive", "causal-forcing", "causal-forcing-framewise"]


class SamplerConfig(Section):
    """A video chunk by chunk, each in a few denoising steps that see the chunks before it."""

    family: Family = "toy"
    """Preset of the fields below; any of them overrides it."""
    chunk_frames: PositiveInt = 1
    """Latent frames denoised together."""
    first_chunk_frames: PositiveInt | None = None
    """Those of the first chunk: 1 lets a video begin with an image. None is `chunk_frames`."""
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
    positions: Literal["absolute", "window"] = "absolute"
    """Where RoPE counts latent frames from in a rollout: the video's beginning, or that of the window, in which the
    sink stands first and the newest chunk last, however long the video. Scores depend on differences alone: without a
    sink both are the same up to rounding, and with one as long as all chunks are in the window."""
    at_prompt_change: Literal["recompute", "keep"] = "recompute"
    """What becomes of the cache when a video's prompt changes: the clean chunks that the next one sees are encoded
    again, under the new prompt, or stay as they are. The prompt's own keys and values are the new one's either way."""

    @property
    def chunks(self) -> Chunks:
        """Where they begin and end."""
        return Chunks(self.chunk_frames, self.first_chunk_frames)

    @property
    def layout(self) -> tuple[Chunks, int | None, int]:
        """Chunks, window and sink: what decides which frames see which."""
        return self.chunks, self.window_frames, self.sink_frames

    def with_fields(self, fields: Mapping[str, Any]) -> "SamplerConfig":
        """The same with other fields.

        Raises:
            ConfigError: a value breaks a rule.
        """
        try:
            return SamplerConfig.model_validate(self.model_dump() | dict(fields))
        except ValidationError as error:
            raise ConfigError(first_problem(error)) from error

    def cached_frames(self, frames: int) -> int:
        """Latent frames that a chunk at the end of so many sees, itself included."""
        return min(frames, self.window_frames or frames)

    def context(self, first_frame: int, recent: int | None = None) -> tuple[range, range]:
        """Latent frames that the chunk that begins there sees before it: of the sink, and the newest.

        Args:
            recent: at least so many of the newest.
        """
        if self.window_frames is None:
            return range(0), range(first_frame)
        sink = min(self.sink_frames, first_frame)
        newest = max(recent or 0, self.window_frames - self.sink_frames - self.chunk_frames)
        return range(sink), range(max(sink, first_frame - newest), first_frame)

    def past_of(self, chunk: int) -> list[int]:
        """The same by chunks, the first is 0."""
        count = self.chunks.count
        return [
            past for run in self.context(self.chunks.start(chunk)) for past in range(count(run.start), count(run.stop))
        ]

    def timesteps_of(self, chunk: int) -> Timesteps:
        """Denoising steps of a chunk."""
        return self.first_chunk_timesteps or self.timesteps if chunk == 0 else self.timesteps

    def passes(self, frames: int, given: int = 0) -> list[int]:
        """Forward passes of each chunk of a rollout: its steps unless it is given, and one to cache it unless it is the
        last.

        Args:
            given: first latent frames that are not generated; so below.
        """
        chunks, first = self.chunks.count(frames), self.chunks.count(given)
        steps = [0 if chunk < first else len(self.timesteps_of(chunk)) for chunk in range(chunks)]
        return [count + (chunk + 1 < chunks) for chunk, count in enumerate(steps)]

    def calls(self, frames: int, given: int = 0) -> int:
        """Of the network in a rollout."""
        return len(self.order_of_calls(frames, given))

    def order_of_calls(self, frames: int, given: int = 0) -> list[tuple[int, int, int]]:
        """Calls of the network in a rollout: their chunk, the chunks that they run, and those that they see, these
        included.

        A clean pass and the next chunk's first step are one while no slot of the cache is used again.
        """
        slots, first = self.chunks.count(self.cached_frames(frames)), self.chunks.count(given)
        calls = []
        for chunk, passes in enumerate(self.passes(frames, given)):
            begun, goes_on, seen = max(first, 1) <= chunk < slots, first <= chunk + 1 < slots, min(chunk + 1, slots)
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
            if self.positions == "window":
                raise ValueError("positions (window) needs window_frames: a window's places are counted")
            return self
        for name, frames in (("window_frames", self.window_frames), ("sink_frames", self.sink_frames)):
            if not self.chunks.are_whole(frames):
                raise ValueError(f"{name} ({frames}) must be whole chunks of chunk_frames ({self.chunks}): the window "
                                 "moves by these")  # fmt: skip
        if self.window_frames - self.sink_frames < self.chunk_frames:
            raise ValueError(f"window_frames ({self.window_frames}) must hold the sink ({self.sink_frames}) "
                             f"and one chunk ({self.chunk_frames})")  # fmt: skip
        if not self.chunks.are_alike and not self.sink_frames:
            raise ValueError(f"sink_frames (0) must hold the first chunk with first_chunk_frames "
                             f"({self.first_chunk_frames}), so be as many or more: in a window others take the place "
                             "of one that leaves, and are longer or shorter")  # fmt: skip
        return self
