"""The video APIs that a teacher may speak, by name."""

from afd_scale.data.teachers.protocols.ark import Ark
from afd_scale.data.teachers.protocols.fal import Fal
from afd_scale.data.teachers.protocols.google import Google
from afd_scale.data.teachers.protocols.openai import OpenAI
from afd_scale.data.teachers.protocols.protocol import VideoProtocol
from afd_scale.data.teachers.protocols.replicate import Replicate

PROTOCOLS: dict[str, VideoProtocol] = {
    "openai": OpenAI(), "ark": Ark(), "fal": Fal(), "replicate": Replicate(), "google": Google()
}  # fmt: skip
