"""How many parameters the networks of a config have: equal to building them, without building them."""

from dataclasses import dataclass

from afd_scale.config import RunConfig
from afd_scale.config.methods import AfdConfig
from afd_scale.config.models import ConvDiscriminatorConfig, LatentDiscriminatorConfig, WanArchitecture


@dataclass(frozen=True)
class NetworkSize:
    """Parameters of one network, in elements.

    Attributes:
        base: weights of the architecture.
        adapter: of one adapter; 0 without LoRA.
        num_adapters: held beside the base.
        trained: with an optimizer.
        unit: the largest set that is gathered in one collective, a block with its adapters.
        unit_trained: those of it that get gradients.
    """

    base: int
    adapter: int
    num_adapters: int
    trained: int
    unit: int
    unit_trained: int

    @property
    def total(self) -> int:
        return self.base + self.num_adapters * self.adapter


def student_size(config: RunConfig) -> NetworkSize:
    """The engine that holds the student; with LoRA it holds the old policy (or the average) too."""
    student, method = config.student, config.method
    followed = isinstance(method, AfdConfig) or method.ema_decay > 0
    head = _linear(student.dim, _patch_values(student)) + 2 * student.dim
    rank = None if student.lora is None else student.lora.rank
    return _wan_size(student, head, rank, num_adapters=1 + followed, head_is_trained=False)


def discriminator_size(config: RunConfig) -> NetworkSize | None:
    """None where the method has no discriminator."""
    if not isinstance(config.method, AfdConfig):
        return None
    discriminator = config.method.discriminator
    if isinstance(discriminator, LatentDiscriminatorConfig):
        rank = None if discriminator.lora is None else discriminator.lora.rank
        return _wan_size(discriminator, discriminator.dim, rank, num_adapters=1, head_is_trained=True)
    return _conv_size(config, discriminator)


def block_parameters(network: WanArchitecture) -> int:
    """Of one transformer block."""
    dim = network.dim
    attention = 4 * _linear(dim, dim) + 2 * dim  # q, k, v, o and the two norms
    feed_forward = _linear(dim, network.ffn_dim) + _linear(network.ffn_dim, dim)
    return 2 * attention + feed_forward + 2 * dim + 6 * dim  # norm3 and the modulation


def adapter_parameters_of_block(network: WanArchitecture, rank: int) -> int:
    """Of one adapter on the ten linears of a block."""
    return rank * (8 * 2 * network.dim + 2 * (network.dim + network.ffn_dim))


def _wan_size(
    network: WanArchitecture, head: int, rank: int | None, num_adapters: int, head_is_trained: bool
) -> NetworkSize:
    dim, layers, block = network.dim, network.num_layers, block_parameters(network)
    embeddings = (
        _linear(_patch_values(network), dim)
        + _linear(network.text_dim, dim) + _linear(dim, dim)
        + _linear(network.freq_dim, dim) + _linear(dim, dim) + _linear(dim, 6 * dim)
    )  # fmt: skip
    base = embeddings + layers * block + head
    if rank is None:
        return NetworkSize(base, 0, 0, base, block, block)
    of_block = adapter_parameters_of_block(network, rank)
    adapter = layers * of_block
    trained = adapter + (head if head_is_trained else 0)
    return NetworkSize(base, adapter, num_adapters, trained, block + num_adapters * of_block, of_block)


def _conv_size(config: RunConfig, network: ConvDiscriminatorConfig) -> NetworkSize:
    data, width, (_, pixels) = config.data, network.channels, network.unpack
    images = data.latent_frames * config.student.latent_channels // pixels**2
    outputs = (width, 2 * width, 2 * width)
    # Kernels 4 x 4, 4 x 4 and 3 x 3: as many weights as a linear on the patch.
    convolutions = _linear(16 * images, width) + _linear(16 * width, 2 * width) + _linear(9 * 2 * width, 2 * width)
    film = sum(_linear(2 * width, 2 * channels) for channels in outputs)
    positions = (data.latent_height * pixels // 4) * (data.latent_width * pixels // 4)
    total = convolutions + film + _linear(config.student.text_dim, 2 * width) + 2 * width * positions
    return NetworkSize(total, 0, 0, total, total, total)  # gathered piece by piece; too small to matter


def _patch_values(network: WanArchitecture) -> int:
    """Numbers in one token's patch of latents."""
    return network.latent_channels * network.patch[1] * network.patch[2]


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
