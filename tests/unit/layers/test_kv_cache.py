"""The ring of chunk slots against a list that drops its oldest chunk after the sink."""

from itertools import accumulate

import pytest
import torch

from afd_scale.chunks import Chunks
from afd_scale.layers.kv_cache import CleanPast, KVCache

TOKENS, HEADS, WIDTH = 3, 2, 4


def keys_of(frame, length, *, offset=0.0):
    """(B, L, N, D) keys of so many frames from `frame`; each number says which token of the video it belongs to."""
    tokens = torch.arange(frame * TOKENS, (frame + length) * TOKENS) + offset
    return tokens[None, :, None, None].expand(2, -1, HEADS, WIDTH).clone()


def tokens_in(k_BLND):
    """The token numbers, rising; checked to be alike in all rows, heads and channels."""
    assert (k_BLND == k_BLND[:1, :, :1, :1]).all()
    return sorted(k_BLND[0, :, 0, 0].tolist())


@pytest.mark.parametrize(
    ("lengths", "window_frames", "sink_frames"),
    [([2] * 6, None, 0), ([2] * 10, 6, 2), ([2] * 10, 6, 0), ([1] * 14, 4, 3), ([1] * 10, 1, 0), ([3] * 6, 6, 3),
     ([2] * 4, 20, 2), ([6], None, 0), ([1, 3, 3], None, 0), ([1, *[3] * 5], 7, 1), ([1, *[3] * 5], 10, 4),
     ([3, *[2] * 6], 7, 3), ([3, *[1] * 6], 4, 3)],
    ids=str,
)  # fmt: skip
def test_a_rollout_sees_the_sink_and_the_newest_chunks(lengths, window_frames, sink_frames):
    cache = KVCache(2, sum(lengths), Chunks(lengths[-1], lengths[0]), window_frames, sink_frames)
    kept = []
    for first, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        kept += range(first, first + length)
        while window_frames is not None and len(kept) > window_frames:
            del kept[sink_frames]
        assert cache.first_frame == first
        assert cache.visible_frames == len(kept)
        expected = [frame * TOKENS + token for frame in kept for token in range(TOKENS)]
        for noise in (0.25, 0.125, 0.0):  # denoising passes, the clean one last: each replaces the one before
            for sign, layer in zip((1, -1), cache.layers, strict=True):
                current = keys_of(first, length, offset=noise)
                keys, values = layer.extend(sign * current, sign * current + 1000)
                past = [t for t in expected if t < first * TOKENS]
                now = [t + noise for t in expected if t >= first * TOKENS]
                assert tokens_in(sign * keys) == past + now
                assert torch.equal(values, keys + 1000), "keys and values stand in different orders"
        if first + length < sum(lengths):
            cache.advance()


def test_the_ring_is_one_buffer_and_what_is_visible_a_view_of_it():
    cache = KVCache(1, frames=10, chunks=Chunks(2), window_frames=6, sink_frames=2)
    (layer,) = cache.layers
    pointers = set()
    for first in range(0, 10, 2):
        keys, values = layer.extend(keys_of(first, 2), keys_of(first, 2))
        pointers.add((keys.data_ptr(), values.data_ptr()))
        assert layer.k_BLND.shape == layer.v_BLND.shape == (2, 6 * TOKENS, HEADS, WIDTH)
        if first + 2 < 10:
            cache.advance()
    assert len(pointers) == 1


def test_a_short_video_takes_no_more_than_it_has():
    cache = KVCache(1, frames=4, chunks=Chunks(2), window_frames=20)
    cache.layers[0].extend(keys_of(0, 2), keys_of(0, 2))
    assert cache.layers[0].k_BLND.shape[1] == 4 * TOKENS


def test_a_pass_may_begin_the_next_chunk_while_there_is_a_free_slot():
    cache, ring = KVCache(1, frames=10, chunks=Chunks(2), window_frames=6, sink_frames=2), []
    (layer,) = cache.layers
    for first in range(0, 10, 2):
        ring.append(cache.has_room_ahead)
        layout = cache.begin_pass(4 if ring[-1] else 2)
        seen = [segment.keys for segment in layout.segments]
        if ring[-1]:
            assert seen == [((0, first + 2),), ((0, first + 4),)], "each chunk sees what is before it, and itself"
            current = torch.cat([keys_of(first, 2), keys_of(first + 2, 2)], dim=1)
            keys, _ = layer.extend(current, current)
            assert tokens_in(keys) == list(range((first + 4) * TOKENS))
        else:
            assert seen == [((0, min(first + 2, 6)),)]
            layer.extend(keys_of(first, 2), keys_of(first, 2))
        if first + 2 < 10:
            cache.advance()
            keys, _ = layer.extend(keys_of(first + 2, 2), keys_of(first + 2, 2))
            assert tokens_in(keys)[-2 * TOKENS :] == list(range((first + 2) * TOKENS, (first + 4) * TOKENS))
    assert ring == [True, True, False, False, False], "the window is full, or the video ends"


def test_keys_that_were_rotated_into_their_room_are_not_copied():
    cache = KVCache(1, frames=4, chunks=Chunks(2))
    (layer,) = cache.layers
    for first in (0, 2):
        room = layer.room(keys_of(first, 2))
        room.copy_(keys_of(first, 2))
        keys, _ = layer.extend(room, keys_of(first, 2))
        assert keys.data_ptr() == layer.k_BLND.data_ptr()
        assert tokens_in(keys) == list(range((first + 2) * TOKENS))
        if first == 0:
            cache.advance()


def test_the_text_is_projected_once_a_rollout_into_the_same_buffers():
    first, second = (KVCache(2, frames=4, chunks=Chunks(2)) for _ in range(2))
    texts = []

    def project(value):
        texts.append(value)
        return torch.full((1, 5, HEADS, WIDTH), value), torch.full((1, 5, HEADS, WIDTH), -value)

    assert not first.has_text
    for _ in range(3):
        for layer in first.layers:
            k, v = layer.text(lambda: project(1.0))
            assert (k == 1).all()
            assert (v == -1).all()
    assert texts == [1.0, 1.0], "once a layer"
    assert first.has_text
    pointers = [layer.text_kv[0].data_ptr() for layer in first.layers]
    second.adopt(first.layers)
    assert not second.has_text, "it is another rollout's"
    for layer in second.layers:
        k, _ = layer.text(lambda: project(2.0))
        assert (k == 2).all()
    assert [layer.text_kv[0].data_ptr() for layer in second.layers] == pointers
    assert all(layer.ring is second.ring for layer in second.layers)


def test_a_clean_past_stands_before_the_current_tokens_and_is_not_changed():
    k, v = keys_of(0, 4), keys_of(0, 4) + 0.5
    past = CleanPast(k.clone(), v.clone())
    for current in (keys_of(4, 2), keys_of(6, 2)):
        keys, values = past.extend(current, -current)
        assert torch.equal(keys, torch.cat([k, current], dim=1))
        assert torch.equal(values, torch.cat([v, -current], dim=1))
    assert torch.equal(past.k_BLND, k)
    assert torch.equal(past.v_BLND, v)
