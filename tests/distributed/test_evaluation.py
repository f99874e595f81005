"""Clips reach the main rank: in order, from one rank of each sequence, and as one rank alone would make them.

Run as a script on several ranks this file is one of them; as a test it starts them.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import leave, on_ranks

CLIPS = 7  # not as many for each rank


def check_all(folder: Path, sequence: int) -> None:
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from tests.toy_evaluation import make_evaluator, make_policy

    with start_ranks(launched_as(os.environ), timeout_minutes=2) as ranks:
        ranks = ranks.sharing_videos(sequence, timeout_minutes=2)
        rows = torch.tensor([[ranks.rank, 0], [ranks.rank, 1]], dtype=torch.uint8)
        gathered = ranks.gather_to_main(rows)
        if ranks.is_main:
            assert gathered is not None
            assert gathered.tolist() == [[r, row] for r in range(0, ranks.size, sequence) for row in range(2)]
        else:
            assert gathered is None

        counts = [ranks.data_size - rank for rank in range(ranks.data_size)]
        counts[-1] = 0
        some = ranks.gather_to_main(torch.full((ranks.data_size, 1), float(ranks.rank)), counts)
        if ranks.is_main:
            assert some is not None
            assert some.flatten().tolist() == [r * sequence for r, count in enumerate(counts) for _ in range(count)]

        evaluator = make_evaluator(folder, ranks, batch=3)
        policy = make_policy(evaluator.config)
        frames = evaluator.frames(policy, range(CLIPS))
        if ranks.is_main:
            assert frames is not None
            lone = make_evaluator(folder, replace(ranks, rank=0, size=1, sequence=1), batch=CLIPS)
            alone = lone.frames(policy, range(CLIPS))
            assert alone is not None
            assert abs(frames.astype(int) - alone).max() <= 1, "but for rounding"
        else:
            assert frames is None

        longer = make_evaluator(folder, ranks, batch=3, clips=CLIPS, lengths=2, samples=0)
        found = longer.compare(policy).by_length
        if ranks.is_main:
            lone = make_evaluator(folder, lone.ranks, batch=CLIPS, clips=CLIPS, lengths=2, samples=0)
            expected = lone.compare(policy).by_length
            assert list(found) == list(expected) == ["student", "teacher"]
            for span, values in expected["student"].items():
                assert found["student"][span] == pytest.approx(values, rel=0.02, abs=0.01)
        else:
            assert found == {}
        ranks.barrier()


@pytest.mark.parametrize(("ranks", "sequence"), [(2, 1), (4, 2)])
def test_clips_reach_the_main_rank(tmp_path: Path, ranks: int, sequence: int) -> None:
    result = on_ranks(ranks, __file__, tmp_path, str(sequence))
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    check_all(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
