"""Bytes of tensors that live while a Wan trunk runs, one rank, derived line by line from models/wan_block.py.

What autograd saves in a block, T tokens of width E, feed-forward H:

    self-attention   norm1's input, q and k before their norms                        3 E
                     modulated input of q k v, rotated q, attended                    3 E
                     keys and values that attention sees, K of them                   2 E (of K)
    cross-attention  norm3's input, q before its norm                                 2 E
                     norm3's output, q, what was read                                 3 E
    feed-forward     norm2's input                                                    1 E
                     modulated input, hidden before and after the GELU                1 E + 2 H
    weights trained  norm1, norm2 before modulation, three normed q and k before      7 E
                     their weight, the two outputs before their gate
    adapters         the bottlenecks of q k v o, q o, two of the feed-forward         8 rank

Modelled: tensors. Not modelled: workspaces of kernels, what an allocator wastes, and the send and receive buffers of
Ulysses, which come and go outside the feed-forward, where the peaks are (for ffn_dim >= 2.5 dim).
"""

from dataclasses import dataclass

from afd_scale.config.models import WanConfig

FLOAT32 = 4


@dataclass(frozen=True)
class Trunk:
    """A trunk as memory sees it.

    Attributes:
        network: its architecture, and whether blocks are recomputed and adapters trained.
        itemsize: bytes of an activation.
        sequence: ranks that share a video.
    """

    network: WanConfig
    itemsize: int
    sequence: int = 1

    @property
    def weights_trained(self) -> bool:
        return self.network.lora is None


@dataclass(frozen=True)
class Tokens:
    """What one pass works on, all videos of it together.

    Attributes:
        own: this rank's tokens.
        past: tokens whose keys and values come from elsewhere, counted as a rank's share.
        frames: latent frames, of all videos.
        texts: prompts.
    """

    own: int
    past: int
    frames: int
    texts: int


def key_value_bytes(trunk: Trunk, tokens: int) -> int:
    """Keys and values of so many tokens (a rank's share) in all layers: a KV cache, or the clean past."""
    return 2 * trunk.network.layers_run * tokens * trunk.network.dim * trunk.itemsize


def text_key_value_bytes(trunk: Trunk, texts: int) -> int:
    """Keys and values of so many texts in all layers, which a rollout keeps; ranks do not share them."""
    network = trunk.network
    return 2 * network.layers_run * texts * network.text_length * network.dim * trunk.itemsize


def saved_by_block(trunk: Trunk, tokens: Tokens) -> int:
    """What the backward pass of one block needs, its input included."""
    network, size = trunk.network, trunk.itemsize
    dim, own = network.dim, tokens.own
    text = tokens.texts * network.text_length
    per_token = (13 * dim + 2 * network.ffn_dim) * size
    per_token += FLOAT32 * (3 * 2 + 3 + 2 * network.num_heads)  # statistics of norms, of softmax in both attentions
    per_text_row = 3 * dim * size
    if network.lora is None:
        per_token += 7 * dim * size
        per_text_row += dim * size
    else:
        per_token += 8 * network.lora.rank * size
        per_text_row += 2 * network.lora.rank * size
    keys_and_values = 2 * (own + tokens.past) * dim * size
    if trunk.sequence > 1 and not tokens.past:
        keys_and_values += 2 * own * dim * size  # q, k and v arrive as one tensor, which v keeps
    modulation = 8 * tokens.frames * dim * size
    return own * per_token + text * per_text_row + keys_and_values + modulation


def saved_outside_blocks(trunk: Trunk, tokens: Tokens) -> int:
    """Embeddings of text and time, and the angles of RoPE, which all blocks share."""
    network, size = trunk.network, trunk.itemsize
    text = tokens.texts * network.text_length * (network.text_dim + 3 * network.dim)
    time = tokens.frames * (network.freq_dim + 10 * network.dim)
    videos = max(tokens.texts, 1)
    angles = tokens.own // videos * trunk.sequence * (network.dim // network.num_heads) * FLOAT32
    return (text + time) * size + angles


def forward_working(trunk: Trunk, tokens: Tokens, cached: bool = False) -> int:
    """Most that a pass without gradient of a plain twin holds besides cached keys and values: inside the feed-forward.

    Alive there: a block's input, the product that has q, k and v, normed q, attended, read, the residual, the
    feed-forward's input, the layer before's product; k once more in both layers where it is not in a cache; the hidden
    layer before and after its GELU. An adapter is merged in rollouts; where it is apart it makes q, k and v anew, of
    which q and k go.
    """
    network = trunk.network
    wide = 12 if cached else (14 if trunk.weights_trained else 10)
    return tokens.own * (wide * network.dim + 2 * network.ffn_dim) * trunk.itemsize


def backward_working(trunk: Trunk, tokens: Tokens) -> int:
    """Most that the backward pass adds to what is saved: in the last layer of the feed-forward.

    There are the gradients of the residual and of the output (whose own saved value has gone where weights are
    trained), and of the hidden layer (twice where it comes through a weight and through an adapter), and the gradient
    of one weight.
    """
    network = trunk.network
    if trunk.weights_trained:
        per_token, weight = network.dim + network.ffn_dim, network.dim * network.ffn_dim
    else:
        per_token, weight = 2 * (network.dim + network.ffn_dim), 0
    return (tokens.own * per_token + weight) * trunk.itemsize


def training_activations(trunk: Trunk, tokens: Tokens) -> int:
    """Peak of forward and backward of one pass with gradient, parameters and their gradients aside."""
    network, size = trunk.network, trunk.itemsize
    block = saved_by_block(trunk, tokens)
    outside = saved_outside_blocks(trunk, tokens)
    if network.activation_checkpointing != "none":
        # Every block's input, and the clean past, which recomputation reads again.
        kept = network.layers_run * tokens.own * network.dim * size + key_value_bytes(trunk, tokens.past)
        if network.activation_checkpointing == "keep_attention":
            kept += network.layers_run * 2 * tokens.own * (network.dim * size + FLOAT32 * network.num_heads)
        return outside + kept + block + backward_working(trunk, tokens)
    kept = network.layers_run * block
    # At the end of the forward pass: the clean past, which each block has copied next to its own keys and values, so
    # that the last two layers' own are still there as well; and q before its rotation.
    copies = 5 if tokens.past else 1
    forward = key_value_bytes(trunk, tokens.past) + copies * tokens.own * network.dim * size
    return outside + kept + max(backward_working(trunk, tokens), forward)
