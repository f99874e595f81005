"""Prompts, videos and batches: rows keep what belongs to them, keys are numbered once, pixels are decoded once."""

from dataclasses import replace

import pytest
import torch

from afd_scale.types import Batch, Videos, pieces, repeat_keys
from tests.networks import make_prompts, make_videos


def prompts(*keys: int):
    return make_prompts(torch.tensor(keys)[:, None, None].expand(-1, 2, 3).float(), keys)


def videos(*keys: int) -> Videos:
    own = torch.tensor(keys).float()
    return make_videos(own[:, None, None, None, None].expand(-1, 2, 1, 1, 1), own[:, None, None].expand(-1, 2, 3), keys)


def test_pieces() -> None:
    assert pieces(5, None) == [slice(0, 5)]
    assert pieces(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert pieces(4, 8) == [slice(0, 4)]


def test_rows_go_down_a_level_side_by_side_and_under_keys_of_their_own() -> None:
    repeated = prompts(4, 9).repeat(3)
    assert repeated.texts == repeated.ids == ("prompt 4",) * 3 + ("prompt 9",) * 3
    assert repeated.keys == (12, 13, 14, 27, 28, 29)
    assert repeated.embeddings[:, 0, 0].tolist() == [4, 4, 4, 9, 9, 9]
    assert repeat_keys(repeated.keys, 2)[:3] == (24, 25, 26)
    # The same prompt in another batch: the same keys.
    assert prompts(9).repeat(3).keys == repeated.keys[3:]


def test_rows_of_videos_keep_their_prompts() -> None:
    some = videos(1, 2, 3)[1:]
    assert some.prompts.keys == (2, 3)
    assert some.latents.flatten(1)[:, 0].tolist() == some.prompts.embeddings[:, 0, 0].tolist() == [2, 3]
    both = some + videos(7)
    assert len(both) == 3
    assert both.prompts.texts == ("prompt 2", "prompt 3", "prompt 7")
    assert both.latents.flatten(1)[:, 0].tolist() == [2, 3, 7]
    other = both.of(both.latents + 1)
    assert other.prompts is both.prompts
    assert (other.latents - both.latents == 1).all()


def test_what_comes_behind_a_start_keeps_it_as_context() -> None:
    latents = torch.arange(12.0).reshape(2, 3, 2, 1, 1)
    both = make_videos(latents, torch.zeros(2, 2, 3), (1, 2))
    assert both.after(0) is both
    assert both.begun is None
    assert both.in_context.keys() == {"clean"}
    rest = both.after(1)
    assert torch.equal(rest.latents, latents[:, 1:])
    assert rest.begun == [True, True]
    assert torch.equal(rest.in_context["clean"], latents)
    assert rest.in_context["first_frame"] == 1
    second = rest.take([1, 1])
    assert torch.equal(second.in_context["clean"], latents[[1, 1]])
    start = both.start(2, 3, slice(2, 4))
    assert start is not None
    assert torch.equal(start, latents[:, :2])
    assert both.start(0, 3, slice(2, 4)) is None


def test_pixels_are_decoded_once_and_without_gradient() -> None:
    calls = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        calls.append(latents)
        return 2 * latents

    latents = torch.ones(1, 2, 1, 1, 1, requires_grad=True)
    shown = Videos(prompts(5), latents, fps=8, decode=decode)
    assert torch.equal(shown.pixels(), 2 * latents)
    assert not shown.pixels().requires_grad
    assert len(calls) == 1
    assert torch.equal(shown.of(3 * latents).pixels(), 6 * latents), "other latents have other pixels"
    more = Videos(prompts(6, 7), torch.ones(2, 2, 1, 1, 1), fps=8, decode=decode)
    first = more[:1].pixels()
    assert len(calls) == 3
    cut = (shown + more)[1:]
    assert torch.equal(cut.pixels(), 2 * more.latents)
    assert torch.equal(more.pixels()[:1], first)
    assert len(calls) == 4, "what is cut out or added shares what was decoded, before and afterwards"
    assert all(len(latents) == 1 for latents in calls), "one at a time: memory is that of one"
    assert (shown + replace(more))[:1].pixels().shape[0] == 1
    assert len(calls) == 4, "of two, the one that is asked for was decoded"
    with pytest.raises(AssertionError, match="codec"):
        videos(1).pixels()


def test_a_batch_is_teacher_videos_and_then_prompts_alone() -> None:
    batch = Batch(videos(1, 2), prompts(8))
    assert batch.prompts.keys == (1, 2, 8)
    assert Batch(videos(1, 2), prompts(8)[:0]).prompts.keys == (1, 2)
    moved = batch.map(lambda x: -x)
    assert moved.prompts.embeddings[:, 0, 0].tolist() == [-1, -2, -8]
    assert moved.teacher.latents.flatten(1)[:, 0].tolist() == [-1, -2]
    assert moved.prompts.texts == batch.prompts.texts
