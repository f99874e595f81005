"""Rollouts in training that are longer than the teacher's videos."""

from pydantic import Field, PositiveInt, model_validator

from afd_scale.config.section import Section


class LongRolloutsConfig(Section):
    """Rollouts of which judges and the student see a window. The sampler's window bounds what they take in memory."""

    frames: PositiveInt
    """Latent frames of a rollout, whole chunks, more than data.latent_frames; where they grow, of the longest."""
    from_frames: PositiveInt | None = None
    """They grow: each step draws a length, uniformly among whole chunks, between this (as judges see it, if that is
    more) and the most so far, which goes from this to `frames` in `growth_steps` steps. None is `frames` always."""
    growth_steps: PositiveInt | None = None
    """Steps after which `frames` may be drawn."""
    early_share: float = Field(default=0.25, ge=0, le=1)
    """Probability that a prompt's window is the first one; otherwise all places, the first among them, are equally
    likely."""
    context_frames: PositiveInt | None = None
    """Clean latent frames before a window, beside the sink, that the student's passes are given, whole chunks. None is
    those that its first chunk sees. These were generated given still earlier ones, which are cut off; with as many
    times more as the student has layers nothing is."""

    @model_validator(mode="after")
    def _check(self) -> "LongRolloutsConfig":
        if (self.from_frames is None) != (self.growth_steps is None):
            raise ValueError(f"growth_steps ({self.growth_steps}) must be given with from_frames, and not without")
        if self.from_frames is not None and self.from_frames > self.frames:
            raise ValueError(f"from_frames ({self.from_frames}) must be at most frames ({self.frames}): rollouts grow")
        return self

    def lengths(self, step: int, chunk_frames: int, least: int) -> range:
        """Latent frames that a step's rollouts may have, all equally likely: whole chunks, at least so many."""
        low = high = self.frames
        if self.from_frames is not None and self.growth_steps is not None:
            low, grown = self.from_frames, min(max(step, 0), self.growth_steps)
            high = low + (self.frames - low) * grown // self.growth_steps
        low, high = (max(limit, least) // chunk_frames for limit in (low, high))
        return range(low * chunk_frames, high * chunk_frames + 1, chunk_frames)
