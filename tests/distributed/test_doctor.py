"""tools/doctor.py among ranks: what is measured, and what is said where they do not meet."""

import json
import re

import pytest

from tests.distributed.processes import environment, free_port, on_ranks, side_by_side


def test_ranks_are_measured_and_the_slowest_is_named() -> None:
    done = on_ranks(2, "tools/doctor.py", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = {each["what"]: each for each in json.loads(line)["findings"] if each["topic"] == "ranks"}
    assert list(found) == ["layout", "matrix product", "neighbours of a machine", "all-reduce of 2",
                           "all-to-all of 2", "clocks"]  # fmt: skip
    assert found["layout"]["value"] == "2 ranks on 1 machine"
    assert re.search(r"slowest rank [01] \(.+\): [\d.e-]+$", found["matrix product"]["value"])
    assert re.search(r"^[\d.e+-]+ GB/s", found["all-reduce of 2"]["value"])


@pytest.mark.parametrize("absent", [1])
def test_a_rank_that_does_not_come_is_named(absent: int) -> None:
    code = ("import sys; sys.path.insert(0, 'tools'); import doctor; doctor.MEETING_SECONDS = 3; "
            "sys.exit(doctor.main([]))")  # fmt: skip
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = side_by_side([["-c", code]], [environment(**world, RANK="0", LOCAL_RANK="0")], 60)
    assert done.returncode == 1, done.stderr
    assert f"where 2 ranks meet within 3 s: rank {absent} did not come" in done.stdout
    assert "shared memory" in done.stdout, "what it found by itself is told"
