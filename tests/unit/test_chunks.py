"""Where chunks begin and end, against a list of them."""

import pytest

from afd_scale.chunks import Chunks


@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 1, 1, 1], [1, 3, 3, 3], [5, 2, 2], [2, 1, 1, 1], [4, 7]], ids=str)
def test_every_question_is_answered_as_a_list_does(lengths):
    size, first = lengths[-1], lengths[0]
    of_frame = [chunk for chunk, length in enumerate(lengths) for _ in range(length)]
    frames = len(of_frame)
    all_chunks = [Chunks(size, first), Chunks(size)] if first == size else [Chunks(size, first)]
    for chunks in all_chunks:
        assert chunks.are_alike == (first == size)
        assert [chunks.count(frame) for frame in range(frames)] == of_frame
        assert chunks.count(frames) == len(lengths)
        assert [chunks.start(chunk) for chunk in range(len(lengths))] == [
            of_frame.index(c) for c in range(len(lengths))
        ]
        assert [*chunks.frames(1)] == [frame for frame in range(frames) if of_frame[frame] == 1]
        borders = [0, *(frame for frame in range(1, frames) if of_frame[frame] != of_frame[frame - 1]), frames]
        assert [frame for frame in range(frames + 1) if chunks.are_whole(frame)] == borders
        for number, begin in enumerate(borders):
            assert chunks.ranges(frames, begin) == list(zip(borders[number:], borders[number + 1 :], strict=False))
            assert chunks.lengths(frames, begin) == lengths[number:]


def test_what_is_within_a_chunk_is_refused():
    for stop, begin in ((5, 0), (7, 2), (0, 3)):
        with pytest.raises(ValueError, match=r"^frames \([523]\) must be whole chunks of 3 behind a first one of 1$"):
            Chunks(3, 1).ranges(stop, begin)
    with pytest.raises(ValueError, match=r"^frames \(4\) must be whole chunks of 3$"):
        Chunks(3).lengths(4)
