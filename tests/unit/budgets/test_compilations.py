"""Breaks, graphs and recompilations of functions whose number is known."""

import pytest
import torch

from tests.unit.budgets.compilations import count_compilations

BACKENDS = ["eager", "aot_eager"]


def smooth(x, times=1):
    return x.sin() * times


def broken(x):
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos()


def asking(x):
    return x.sin() if x.sum().item() > 0 else x.cos()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_for_one_shape(backend):
    function = torch.compile(smooth, backend=backend, dynamic=False)
    with count_compilations() as made:
        for _ in range(3):
            function(torch.ones(4))
    assert (made.graphs, made.num_breaks, made.recompilations) == (1, 0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_other_shape_and_number_is_a_recompilation(backend):
    function = torch.compile(smooth, backend=backend, dynamic=False)
    with count_compilations() as made:
        for size in (4, 5, 6, 5):
            function(torch.ones(size))
        function(torch.ones(5), times=2)
    assert (made.graphs, made.num_breaks, made.recompilations) == (4, 0, 3)
    assert "size mismatch" in made.words()
    assert "times" in made.words()


@pytest.mark.parametrize(("function", "reason"), [(broken, "graph_break"), (asking, "item")])
def test_breaks_are_counted_with_their_reason(function, reason):
    with count_compilations() as made:
        torch.compile(function, backend="eager", dynamic=False)(torch.ones(4))
    assert made.num_breaks >= 1
    assert reason in made.words()


def test_one_count_knows_nothing_of_the_one_before():
    function = torch.compile(smooth, backend="eager", dynamic=False)
    for _ in range(2):
        with count_compilations() as made:
            function(torch.ones(4))
        assert (made.graphs, made.recompilations) == (1, 0)


def test_what_fails_inside_is_counted_and_fails():
    counts = []

    def fail():
        with count_compilations() as made:
            counts.append(made)
            torch.compile(smooth, backend="eager", dynamic=False)(torch.ones(4))
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert counts[0].graphs == 1
