"""The noise levels a method trains at."""

from afd_scale.config.methods import SigmaConfig
from afd_scale.config.models import StudentConfig
from afd_scale.flow.schedule import SigmaDraw, denoising_sigmas


def sigma_draw(config: SigmaConfig, student: StudentConfig) -> SigmaDraw:
    """The draw that a config describes, for a student's chunks and denoising steps."""
    return SigmaDraw(
        name=config.name,
        steps=denoising_sigmas(student.timesteps, student.timestep_shift),
        shift=student.timestep_shift,
        mean=config.mean,
        deviation=config.deviation,
        chunk_frames=student.chunk_frames,
    )
