"""Both SLURM templates on a cluster of two machines: to the end, past a time limit, preempted, failed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT
from tests.launchers.machines import lacking
from tests.launchers.runs import shortest_run
from tests.launchers.slurm import NEEDED, Cluster, slurm

TEMPLATES = ROOT / "launch" / "slurm"
REASON = lacking(*NEEDED)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm(tmp_path_factory.mktemp("slurm"), ["node-a", "node-b"]) as running:
        yield running
