"""Micro-batches: a step in pieces is the step as a whole."""

import pytest
import torch

from afd_scale.methods.updates import steered
from tests.unit.methods.engines import make_batch
from tests.unit.methods.test_afd import make_afd
from tests.unit.methods.test_sft import make_sft


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize(
    "fields",
    [
        {"prior_weight": 0.1, "states_per_rollout": 2},
        {"r1_weight": 1.0, "r2_weight": 1.0, "discriminator_objective": "softplus"},
        {"advantage": {"baseline": "batch"}, "context_gradient": True},
        {"credit": "regression", "states_per_rollout": 2},
        {"taught": "resampled", "step_target": 0.1},
    ],
    ids=str,
)
def test_a_step_of_afd_in_pieces_is_the_whole_step(fields: dict[str, object], micro_batch: int) -> None:
    whole, parts = make_afd(**fields), make_afd(micro_batch=micro_batch, **fields)
    for afd in (whole, parts):
        for trained in (afd.student, afd.engines["discriminator"]):
            trained.engine.optimizer = torch.optim.SGD(
                trained.network.parameters(), lr=1.0
            )  # keeps the gradient's size
    for step in (1, 2):
        expected, found = whole.train_step(make_batch((4, 9, 2)), step), parts.train_step(make_batch((4, 9, 2)), step)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(parts.student.weights(), whole.student.weights(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        parts.engines["discriminator"].weights(), whole.engines["discriminator"].weights(), rtol=0, atol=1e-5
    )
    assert len(parts.student.calls) > len(whole.student.calls)
    largest = max(len(arguments[2]) for arguments, _, _ in parts.student.calls)
    assert largest <= micro_batch


def test_a_step_of_sft_in_pieces_is_the_whole_step() -> None:
    weights = []
    for micro_batch in (None, 2):
        sft = make_sft(micro_batch=micro_batch)
        before = sft.student.weights()
        sft.student.engine.optimizer = torch.optim.SGD(sft.student.network.parameters(), lr=1.0)
        sft.train_step(make_batch((4, 9, 2)), 1)
        weights.append(sft.student.weights())
        assert len(sft.student.calls) == (1 if micro_batch is None else 2)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
    assert not torch.equal(weights[0], before)


@pytest.mark.parametrize(
    ("factor", "measured", "expected"),
    [
        (2.0, 0.1, 2.0),
        (2.0, 0.121, 2 / 1.1),
        (2.0, 0.081, 2 / 0.9),
        (2.0, 0.4, 1.6),  # a half, but no faster than that
        (2.0, 0.01, 2.5),
        (2.0, 0.0, 2.5),
        (9.0, 0.01, 10.0),
        (0.11, 9.0, 0.1),
    ],
)
def test_a_rate_is_steered_by_the_root_and_within_bounds(factor: float, measured: float, expected: float) -> None:
    found = steered(torch.tensor(factor), 0.1, torch.tensor(measured))
    assert found.item() == pytest.approx(expected)
