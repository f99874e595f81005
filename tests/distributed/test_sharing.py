"""Ranks that hold the same videos share them: logits, and the gradient by weights averaged over ranks and by latents.

Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import leave, on_ranks

# Numbers of five videos; with three ranks: alike, all on one, none on the last.
NUMBERS = {"none": None, "alike": (0, 1, 2, 3, 4), "all on one": (0, 3, 6, 9, 12), "none on the last": (0, 1, 3, 4, 6)}


def check(sequence: int) -> None:
    """Every rank: what it finds is what one process finds."""
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.parallel.sharing import share_videos

    with start_ranks(launched_as(os.environ), timeout_minutes=1) as processes:
        ranks = processes.sharing_videos(sequence, timeout_minutes=1)
        for name, numbers in NUMBERS.items():
            weight, latents = start(ranks.data_rank)
            seen: list[int] = []
            group = ranks.sequence_group
            judging = partial(judge, weight=weight, seen=seen)
            logits = share_videos(videos_of(latents, numbers), judging, group)
            loss_of(logits).backward()
            dist.all_reduce(weight.grad)
            weight.grad /= ranks.size
            dist.all_reduce(latents.grad, group=group)
            latents.grad /= sequence

            expected = torch.zeros(())
            for rank in range(ranks.data_size):
                plain_weight, plain_latents = start(rank)
                plain = judge(videos_of(plain_latents, None), plain_weight, [])
                loss_of(plain).backward()
                expected = expected + plain_weight.grad / ranks.data_size
                if rank == ranks.data_rank:
                    torch.testing.assert_close(logits, plain, msg=lambda m, n=name: f"{n}: {m}")
                    torch.testing.assert_close(latents.grad, plain_latents.grad, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(weight.grad, expected, msg=lambda m, n=name: f"{n}: {m}")
            if name == "alike":
                assert len(seen) == len(range(ranks.rank % sequence, 5, sequence)), "the work is shared"


def start(data_rank: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(data_rank)
    weight = torch.arange(1.0, 4.0).requires_grad_()
    return weight, torch.randn(5, 1, 3, 1, 1, generator=generator).requires_grad_()


def videos_of(latents: Any, numbers: tuple[int, ...] | None) -> Any:
    from tests.networks import make_videos

    videos = make_videos(latents, torch.zeros(5, 1, 1))
    return videos if numbers is None else videos.numbered(numbers)


def judge(videos: Any, weight: Any, seen: list[int]) -> Any:
    seen += videos.prompts.keys
    return (videos.latents.flatten(1) @ weight).sin()


def loss_of(logits: Any) -> Any:
    return (logits * torch.arange(1.0, 6.0)).square().mean()


@pytest.mark.parametrize(("data", "sequence"), [(1, 3), (2, 2)])
def test_shared_videos_are_judged_as_by_one_process(data: int, sequence: int, tmp_path: Path) -> None:
    result = on_ranks(data * sequence, __file__, tmp_path, str(sequence), timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    check(int(sys.argv[2]))
    leave()
