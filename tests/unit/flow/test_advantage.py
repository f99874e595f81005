"""From logits to weights, on one rank and on two."""

import threading

import pytest
import torch

from afd_scale.flow.advantage import centre, divide_by_spread, weight_from_advantage


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
