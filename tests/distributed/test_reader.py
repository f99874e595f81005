"""The stream over real gloo processes: the samples of a step and the position do not depend on the number of ranks."""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.run import ProceduralSource
from afd_scale.data.check import check_dataset
from afd_scale.data.reader import TeacherStream
from tests.distributed.processes import environment, side_by_side
from tests.toy_datasets import make_procedural_shards

STEPS = 16
RESUME_AT = (3, 9)  # within the first epoch and within the second


def run_config(shards: str, global_batch: int = 12, canonical_nodes: int = 1, sequence: int = 1) -> RunConfig:
    data = {
        "shards": shards,
        "cache": f"{shards}.cache",
        "global_batch": global_batch,
        "canonical_nodes": canonical_nodes,
    }
    return RunConfig.model_validate({"method": "sft", "data": data, "parallel": {"sequence": sequence}})


def work(jobs: list[dict[str, Any]], out: Path) -> None:
    """What each rank does: draw the steps of each job; the first rank writes every rank's samples and the position."""
    results: list[Any] = []
    for job in jobs:
        try:
            stream = TeacherStream(run_config(job["shards"], **job["data"]))
            if isinstance(job["state"], list):
                earlier, step = job["state"]
                stream.load_state_dict(results[earlier][dist.get_rank()]["states"][step])
            elif job["state"] is not None:
                stream.load_state_dict(job["state"])
            states, mine = [], []
            for _ in range(job["steps"]):
                states.append(stream.state_dict())
                mine.append(next(stream).prompts.keys)
            result: Any = {"states": states, "samples": mine}
        except ConfigError as error:
            result = {"error": str(error)}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, result)
        results.append(gathered)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))


def run_ranks(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Results by job and rank. Without LOCAL_WORLD_SIZE, as under deepspeed and srun, and with a RANK that misleads."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "store").unlink(missing_ok=True)
    misled = {k: v for k, v in environment().items() if k not in ("LOCAL_WORLD_SIZE", "RANK")} | {"WORLD_SIZE": "7"}
    commands = [[__file__, str(rank), str(ranks), str(folder)] for rank in range(ranks)]
    done = side_by_side(commands, [misled] * ranks, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


def job(shards: Path, steps: int = STEPS, state: Any = None, **data: int) -> dict[str, Any]:
    """One stream; `state` is where it starts: a state, or [job, step] of an earlier job of the same ranks."""
    return {"shards": str(shards), "steps": steps, "state": state, "data": data}


def global_batches(by_rank: list[dict[str, Any]]) -> list[list[int]]:
    """Sorted samples of each step, of all ranks."""
    return [sorted(chain(*shares)) for shares in zip(*(rank["samples"] for rank in by_rank), strict=True)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """83 clips: 6 batches of 12 an epoch, and 11 clips that 2 ranks would pad to a seventh batch."""
    folder = tmp_path_factory.mktemp("data") / "teacher"
    make_procedural_shards(ProceduralSource(clips=83), folder)
    check_dataset(run_config(str(folder)))
    return folder


@pytest.fixture(scope="module")
def pair(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What two ranks drew: whole, whole with two canonical nodes, resumed, a batch that they cannot share, and as one
    sequence, whole and resumed."""
    jobs = [job(shards), job(shards, canonical_nodes=2)]
    jobs += [job(shards, STEPS - at, [0, at]) for at in RESUME_AT]
    jobs += [job(shards, global_batch=13), job(shards, sequence=2), job(shards, STEPS - 9, [5, 9], sequence=2)]
    return run_ranks(2, jobs, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone(
    shards: Path, pair: list[list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, Any]]]:
    """The same of one rank, resumed from the positions of the two."""
    jobs = [job(shards), job(shards, canonical_nodes=2)]
    jobs += [job(shards, STEPS - at, pair[0][1]["states"][at]) for at in RESUME_AT]
    return run_ranks(1, jobs, tmp_path_factory.mktemp("alone"))


def test_steps_and_positions_do_not_depend_on_the_number_of_ranks(
    alone: list[list[dict[str, Any]]], pair: list[list[dict[str, Any]]]
) -> None:
    for one, two in zip(alone[:2], pair[:2], strict=True):
        assert [len(share) for rank in two for share in rank["samples"]] == [6] * (2 * STEPS), "equal shares"
        assert global_batches(one) == global_batches(two)
        assert global_batches(one)[:6] != global_batches(one)[6:12], "each epoch has its own order"
        # Equal positions: what follows from resuming two ranks' own is what follows from resuming the lone rank's.
        assert two[0]["states"] == two[1]["states"] == one[0]["states"]
    assert len(set(chain(*global_batches(alone[0])[:6]))) == 72, "no sample twice in an epoch"
    assert global_batches(alone[0]) != global_batches(alone[1]), "canonical nodes order samples"


def test_resumed_equals_uninterrupted_also_on_fewer_ranks(
    alone: list[list[dict[str, Any]]], pair: list[list[dict[str, Any]]]
) -> None:
    uninterrupted = global_batches(pair[0])
    for ranks in (alone, pair):
        for at, resumed in zip(RESUME_AT, ranks[2:4], strict=True):
            assert global_batches(resumed) == uninterrupted[at:]


def test_ranks_of_a_sequence_draw_the_same_samples(
    alone: list[list[dict[str, Any]]], pair: list[list[dict[str, Any]]]
) -> None:
    whole, resumed = pair[5], pair[6]
    assert whole[0] == whole[1]
    assert [sorted(step) for step in whole[0]["samples"]] == global_batches(alone[0])
    for rank in resumed:
        assert rank["samples"] == whole[0]["samples"][9:]


def test_global_batch_that_ranks_cannot_share(pair: list[list[dict[str, Any]]]) -> None:
    first, second = pair[4]
    assert first == second
    assert first["error"].startswith("data.global_batch (13) must be a multiple of the number of data ranks (2)")


if __name__ == "__main__":
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    work(json.loads((folder / "jobs.json").read_text()), folder / "out.json")
    dist.destroy_process_group()
