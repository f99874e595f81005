"""A judge of motion: what moves in a video, and how, by a small network over time with the prompt.

It sees nothing else of the pixels, so it passes no gradient to them; AFD needs none.

Shape suffixes: B batch, T frames, E width of the text, K numbers a frame.
"""

from torch import Tensor, nn

from afd_scale.config.judges import MotionDiscriminatorConfig
from afd_scale.layers.network import Network
from afd_scale.models.discriminators import modulated, pooled_text
from afd_scale.models.motion_features import make_features
from afd_scale.models.vlm import Float32Linear
from afd_scale.types import Videos


class MotionDiscriminator(Network):
    """Three convolutions over time, each modulated by the prompt (FiLM), and a score of their mean.

    The score has no bias, for the reason that models/discriminators.py gives.

    Args:
        text_dim: width of a text embedding row.
    """

    def __init__(self, config: MotionDiscriminatorConfig, text_dim: int):
        super().__init__()
        self.features, numbers = make_features(config)
        self.numbers = numbers
        width = config.channels
        convolutions = [
            nn.Conv1d(numbers, width, 3, padding=1),
            nn.Conv1d(width, 2 * width, 3, padding=1),
            nn.Conv1d(2 * width, 2 * width, 3, padding=1),
        ]
        self.convolutions = nn.ModuleList(convolutions)
        self.film = nn.ModuleList(nn.Linear(2 * width, 2 * c.out_channels) for c in convolutions)
        self.text = nn.Sequential(nn.Linear(text_dim, 2 * width), nn.SiLU())
        self.score = Float32Linear(2 * width, 1, bias=False)

    def forward(self, videos: Videos) -> Tensor:
        """(B,) logits; text rows of zeros (padding) do not count."""
        if videos.latents.is_meta:  # of a plan: what is seen is no work of this network
            features = videos.latents.new_empty(len(videos), videos.pixels().shape[1], self.numbers)
        else:
            features = self.features(videos)
        x = features.transpose(1, 2).to(self.score.weight.dtype)
        prompt = self.text(pooled_text(videos.prompts.embeddings).to(x.dtype))
        for convolution, film in zip(self.convolutions, self.film, strict=True):
            x = modulated(convolution(x), film(prompt))
        return self.score(x.mean(2)).squeeze(1)
