"""No pass of a student asks more of a GPU than budgets.py allows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.budgets.budgets import BUDGETS, Budget
from tests.unit.budgets.counting import Tally
from tests.unit.budgets.workloads import (
    block_backward,
    block_forward,
    cached_pass,
    compiled_rollout,
    compiled_update,
    count_cached_pass,
    rollout,
    teacher_forcing,
    window_pass,
)

HOST_COST = Path(__file__).with_name("host_cost.py")
TRAINING = tuple(lambda gradient=gradient: teacher_forcing(clean_gradient=gradient) for gradient in (False, True))
SERVING = (*(lambda lora=lora: cached_pass("wan-1.3b", lora=lora) for lora in (False, True)), window_pass)


def kernels(tally: Tally) -> float:
    return tally.num_kernels


def elementwise(tally: Tally) -> float:
    return tally.elementwise_gb


def syncs(tally: Tally) -> float:
    return len(tally.syncs)


def mixed_devices(tally: Tally) -> float:
    return len(tally.mixed)


# By a budget's name: what is counted, and the passes of which each must stay within it.
MEASURES: dict[str, tuple[Callable[[Tally], float], tuple[Callable[[], Tally], ...]]] = {
    "kernels/cached_pass/1.3b": (kernels, (lambda: cached_pass("wan-1.3b", lora=False),)),
    "kernels/cached_pass/1.3b/first": (kernels, (lambda: cached_pass("wan-1.3b", first=True),)),
    "kernels/cached_pass/1.3b/lora": (kernels, (lambda: cached_pass("wan-1.3b", lora=True),)),
    "kernels/cached_pass/1.3b/window": (kernels, (window_pass,)),
    "elementwise/cached_pass/1.3b/window": (elementwise, (window_pass,)),
    "kernels/cached_pass/14b": (kernels, (lambda: cached_pass("wan-14b", lora=False),)),
    "kernels/cached_pass/14b/lora": (kernels, (lambda: cached_pass("wan-14b", lora=True),)),
    "elementwise/block/forward": (elementwise, (lambda: block_forward(gradient=False),)),
    "elementwise/block/forward_with_gradient": (elementwise, (lambda: block_forward(gradient=True),)),
    "elementwise/block/backward": (elementwise, (lambda: block_backward(recompute=False),)),
    "elementwise/block/recompute": (
        elementwise,
        (lambda: block_backward(recompute=True) - block_backward(recompute=False),),
    ),
    "syncs/cached_pass": (syncs, SERVING),
    "syncs/rollout": (syncs, (rollout,)),
    "syncs/teacher_forcing": (syncs, TRAINING),
    "mixed_devices/cached_pass": (mixed_devices, SERVING),
    "mixed_devices/rollout": (mixed_devices, (rollout,)),
    "mixed_devices/teacher_forcing": (mixed_devices, TRAINING),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks, not we
def test_compiled_parts_of_blocks() -> None:
    """Breaks and recompilations, on small tensors of a CPU."""
    allowed = {budget.name: budget.number for budget in BUDGETS if budget.name in COMPILED}
    rollout, update = compiled_rollout(), compiled_update()
    for made in (rollout, update):
        assert made.graphs >= 2
        assert made.num_breaks <= allowed["compile/breaks"], made.words()
    assert rollout.recompilations <= allowed["compile/recompilations/rollout"], rollout.words()
    assert update.recompilations <= allowed["compile/recompilations/update"], update.words()


MEASURED_AS = {"forward": "sharded_forward", "training": "sharded_training", "resident": "resident_forward"}


@pytest.mark.parametrize("ranks", [64, 256])
def test_pythons_calls_behind_zero3(ranks: int) -> None:
    """Of a process by itself, which has one process group. Times are printed, too: they vary by half on a busy CPU."""
    command = [sys.executable, str(HOST_COST), "--ranks", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(HOST_COST.parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    for budget in BUDGETS:
        if budget.name.startswith(f"python/{ranks}_ranks/"):
            ratio = measured["ratios_of_calls"][MEASURED_AS[budget.name.rpartition("/")[2]]]
            assert ratio <= budget.number, f"{budget.name}: {ratio:.2f} {budget.unit}; {budget.reason}\n{measured}"


HOOKS = tuple(f"python/{ranks}_ranks/{what}" for ranks in (64, 256) for what in MEASURED_AS)
COMPILED = ("compile/breaks", "compile/recompilations/rollout", "compile/recompilations/update")


@pytest.mark.parametrize("budget", [b for b in BUDGETS if b.name in MEASURES], ids=lambda budget: budget.name)
def test_budget(budget: Budget) -> None:
    measure, passes = MEASURES[budget.name]
    for each in passes:
        tally = each()
        assert tally.num_kernels > 0
        measured = measure(tally)
        assert measured <= budget.number, f"{measured:g} {budget.unit}; {budget.reason}\n{tally.words()}"


def test_all_that_is_measured_has_a_budget() -> None:
    names = [budget.name for budget in BUDGETS]
    assert sorted(names) == sorted([*MEASURES, *COMPILED, *HOOKS])


def test_more_layers_are_what_two_say() -> None:
    one, two, three = (count_cached_pass("wan-1.3b", layers, lora=False) for layers in (1, 2, 3))
    assert one.more(two - one, times=2).kernels == three.kernels
    assert one.more(two - one, times=2).moved == three.moved
