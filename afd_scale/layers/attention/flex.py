"""torch's FlexAttention: one compiled kernel for the whole layout, told by a BlockMask which tiles to compute.

Tiles have 128 x 128 tokens and know nothing of frames. One of which no pair is visible is skipped, one that is visible
whole needs no mask, and one that straddles the edge of a chunk looks each pair up in the layout's table of frames.

Shape suffixes: B batch, L tokens, N heads, D head width. The operator takes (B, N, L, D).
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.layers.attention.limits import HALF, Attend, Limits
from afd_scale.layers.attention.sdpa import attend_all

LIMITS = {
    "cuda": Limits(
        dtypes=(*HALF, torch.float32), head_multiple=8, min_head_dim=16, max_head_dim=256, capabilities=(8, 99)
    )
}
TILE = 128


def load() -> Attend:
    """Raises ImportError where torch came without Triton."""
    if find_spec("triton") is None:
        raise ImportError("Triton is not installed")
    from torch.nn.attention.flex_attention import flex_attention

    # A layout has its shapes, so nothing is dynamic. Without `fullgraph`, layouts beyond the 8 that torch keeps
    # compiled would silently be computed by materialising all scores.
    return FlexAttention(torch.compile(flex_attention, dynamic=False, fullgraph=True))


class FlexAttention:
    """Attend by FlexAttention; keeps the masks that it made.

    Args:
        flex_attention: torch's function, compiled; as it is on a CPU, where it has no backward.
    """

    def __init__(self, flex_attention: Callable[..., Tensor]):
        self.flex_attention = flex_attention
        self.masks: dict[tuple[AttentionLayout, int, torch.device], object] = {}

    def __call__(self, q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, layout: AttentionLayout) -> Tensor:
        """Softmax attention of a layout; shapes as in `attend`."""
        tokens_per_frame = layout.tokens_per_frame(q_BLND.shape[1], k_BLND.shape[1])
        if layout.is_full:
            # Nothing to mask, and the passes with a cache come in many lengths: each would be compiled.
            return attend_all(q_BLND, k_BLND, v_BLND)
        key = (layout, tokens_per_frame, q_BLND.device)
        if key not in self.masks:
            self.masks[key] = block_mask(*key)
        q, k, v = (x.transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
        return self.flex_attention(q, k, v, block_mask=self.masks[key]).transpose(1, 2)


def block_mask(layout: AttentionLayout, tokens_per_frame: int, device: torch.device) -> object:
    """The BlockMask of a layout.

    From the table of frames and not from all pairs of tokens, which `create_block_mask` would lay out: 1 GB at 32,760.
    """
    from torch.nn.attention.flex_attention import BlockMask

    frames = layout.dense_mask(1)
    # How many of a tile's pairs are visible: (tiles, frames) tokens of each frame in each tile, on both sides.
    in_query_tile, in_key_tile = (_overlaps(n, tokens_per_frame) for n in frames.shape)
    visible = (in_query_tile @ frames.double() @ in_key_tile.T).to(device)
    # The last tile of a ragged sequence is never whole: it has to mask what lies beyond the end.
    whole = visible == TILE * TILE
    straddling = (visible > 0) & ~whole
    table = frames.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[query // tokens_per_frame, key // tokens_per_frame]

    lengths = (layout.query_frames * tokens_per_frame, layout.key_frames * tokens_per_frame)
    return BlockMask.from_kv_blocks(
        *_ordered(straddling), *_ordered(whole), BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=lengths
    )


def _overlaps(frames: int, tokens_per_frame: int) -> Tensor:
    """(tiles, frames) tokens that a tile shares with a frame."""
    tile_starts = torch.arange(0, frames * tokens_per_frame, TILE)[:, None]
    frame_starts = (torch.arange(frames) * tokens_per_frame)[None]
    stops = torch.minimum(tile_starts + TILE, frame_starts + tokens_per_frame)
    return (stops - torch.maximum(tile_starts, frame_starts)).clamp(min=0).double()


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, rows) number of True in each row, and (1, 1, rows, columns) their columns first, in rising order."""
    columns = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return tiles.sum(-1).to(torch.int32)[None, None], columns.to(torch.int32)[None, None]
