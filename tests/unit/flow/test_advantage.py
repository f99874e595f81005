"""From logits to weights, on one rank and on two."""

import math
import threading

import pytest
import torch

from afd_scale.flow.advantage import (
    by_chunk,
    centre,
    divide_by_spread,
    over_mean,
    resampled,
    weight_from_advantage,
    window_starts,
)


def alone(x):
    return x


def on_ranks(function, shares):
    """Run `function(share, mean)` for each share, all at once; `mean` averages over them as a collective does."""
    barrier, values, results = threading.Barrier(len(shares), timeout=10), [None] * len(shares), [None] * len(shares)

    def run(rank):
        def mean(x):
            values[rank] = x
            barrier.wait()
            average = torch.stack(values).mean(0)
            barrier.wait()  # nobody writes the next value before all have read this one
            return average

        results[rank] = function(shares[rank], mean)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(results)


def test_group_baseline_centres_each_prompt():
    reward = torch.tensor([[1.0, 3.0], [10.0, 14.0]])
    assert centre(reward, "group", alone).tolist() == [[-1.0, 1.0], [-2.0, 2.0]]


def test_batch_baseline_centres_the_batch():
    reward = torch.tensor([[1.0, 3.0], [10.0, 14.0]])
    assert centre(reward, "batch", alone).tolist() == [[-6.0, -4.0], [3.0, 7.0]]


def test_group_spread_is_the_root_mean_square_of_the_group():
    centred = torch.tensor([[-3.0, 3.0], [-1.0, 1.0]])
    assert divide_by_spread(centred, "group", 0.01, alone).tolist() == [[-1.0, 1.0], [-1.0, 1.0]]


def test_batch_spread_is_the_root_mean_square_of_the_batch():
    centred = torch.tensor([[-7.0, 7.0], [-1.0, 1.0]])  # sqrt((49 + 49 + 1 + 1) / 4) = 5
    torch.testing.assert_close(
        divide_by_spread(centred, "batch", 0.01, alone), torch.tensor([[-1.4, 1.4], [-0.2, 0.2]])
    )


def test_no_spread_divides_by_nothing():
    centred = torch.tensor([[-7.0, 7.0]])
    assert torch.equal(divide_by_spread(centred, "none", 0.01, alone), centred)


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_an_undecided_discriminator_is_not_amplified(spread):
    centred = torch.tensor([[-1e-4, 1e-4]])
    torch.testing.assert_close(divide_by_spread(centred, spread, 0.01, alone), torch.tensor([[-0.01, 0.01]]))
    assert divide_by_spread(torch.zeros(1, 2), spread, 0.01, alone).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("baseline", ["group", "batch"])
@pytest.mark.parametrize("spread", ["none", "group", "batch"])
def test_two_ranks_give_what_one_gives(baseline, spread):
    reward = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1

    def advantage(share, mean):
        return divide_by_spread(centre(share, baseline, mean), spread, 0.01, mean)

    unsharded = advantage(reward, alone)
    torch.testing.assert_close(on_ranks(advantage, [reward[:3], reward[3:]]), unsharded)
    if baseline == "group":
        torch.testing.assert_close(unsharded.mean(dim=1), torch.zeros(6, dtype=torch.float64))
    else:
        assert unsharded.mean(dim=1).abs().max() > 0.1


def test_weights_clip_to_0_and_1():
    advantage = torch.tensor([-50.0, -5.0, -2.5, 0.0, 1.0, 5.0, 50.0])
    assert weight_from_advantage(advantage, clip=5.0).tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.6, 1, 1])
    assert weight_from_advantage(torch.tensor([0.5]), clip=1.0).tolist() == [0.75]


def test_weights_over_their_mean_in_the_batch():
    assert over_mean(torch.tensor([0.2, 0.6, 1.0, 0.2]), alone).tolist() == pytest.approx([0.4, 1.2, 2.0, 0.4])
    assert over_mean(torch.full((3,), 0.3), alone).tolist() == pytest.approx([1, 1, 1])
    assert over_mean(torch.zeros(2), alone).tolist() == [0, 0]
    shares = [torch.tensor([0.2, 0.4]), torch.tensor([0.8, 0.6])]
    torch.testing.assert_close(on_ranks(over_mean, shares), torch.tensor([0.4, 0.8, 1.6, 1.2]))


def test_systematic_resampling_of_one_group():
    # Standardised: 1, -1; softmax at temperature 2 / ln 3: 3/4, 1/4. Four draws at (u + 0, 1, 2, 3) / 4.
    reward, temperature = torch.tensor([[7.0, 5.0], [5.0, 7.0]]), 2 / math.log(3)
    for begin in (0.1, 0.5, 0.9):
        found = resampled(reward, 4, torch.full((2,), begin), temperature, 0.01)
        assert found.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    one_each = resampled(reward, 1, torch.tensor([0.74, 0.26]), temperature, 0.01)
    assert one_each.tolist() == [[0], [1]]
    assert resampled(reward, 1, torch.tensor([0.76, 0.24]), temperature, 0.01).tolist() == [[1], [0]]


def test_each_is_drawn_as_often_as_its_probability_says():
    reward = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    standardised = (reward - 1.5) / math.sqrt(1.25)
    expected = (standardised / 0.5).softmax(dim=1)[0]
    begins = (torch.arange(1000) + 0.5) / 1000
    drawn = resampled(reward.expand(1000, 4), 3, begins, 0.5, 0.01)
    assert (drawn.diff(dim=1) >= 0).all()
    torch.testing.assert_close(drawn.flatten().bincount(minlength=4) / 3000, expected, rtol=0, atol=1e-3)


def test_an_undecided_group_is_drawn_evenly_and_none_is_outside():
    assert resampled(torch.zeros(1, 3), 3, torch.tensor([0.5]), 1.0, 0.01).tolist() == [[0, 1, 2]]
    almost = torch.tensor([0.99999994])  # in float32 its last place is 1
    assert resampled(torch.tensor([[0.0, 0.0, -1e6]]), 2, almost, 1.0, 0.01).max() <= 2


@pytest.mark.parametrize(
    ("chunks", "seen", "windows", "starts"),
    [(6, 4, 3, [0, 1, 2]), (6, 4, 2, [0, 2]), (7, 3, 3, [0, 2, 4]), (7, 3, 1, [0]), (6, 2, 4, [0, 1, 3, 4])],
)
def test_windows_stand_evenly_from_the_first_place_to_the_last(chunks, seen, windows, starts):
    assert window_starts(chunks, seen, windows) == starts


def test_windows_hold_every_chunk_as_soon_as_there_are_enough():
    for chunks in range(1, 12):
        for seen in range(1, chunks + 1):
            for windows in range(math.ceil(chunks / seen), chunks - seen + 2):
                starts = window_starts(chunks, seen, windows)
                assert len(set(starts)) == windows
                assert {start + place for start in starts for place in range(seen)} == set(range(chunks))


def test_a_chunk_has_the_mean_weight_of_the_windows_that_hold_it():
    weight = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.2]] * 2)  # two prompts, three windows, two rollouts
    weight[3:] = 1 - weight[3:]
    found = by_chunk(weight, [0, 1, 2], 2)
    expected = torch.tensor([[0.0, 0.25, 0.75, 1.0], [1.0, 0.75, 0.35, 0.2]])
    torch.testing.assert_close(found, torch.stack([expected, 1 - expected]))
