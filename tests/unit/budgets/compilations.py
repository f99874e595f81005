"""What torch.compile makes of a piece of code: graphs, breaks between them, and compilations of what was compiled."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch._dynamo
from torch._dynamo import convert_frame
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics


@dataclass
class Compilations:
    """Complete when its `with` has ended.

    Attributes:
        graphs: that were compiled.
        breaks: places where a graph ends before its function does, by reason, and how often each was met.
        recompilations: of code that was compiled already, for values or shapes that it did not fit; the first is none.
        reasons: of the last recompilations, a line each.
    """

    graphs: int = 0
    breaks: Counter[str] = field(default_factory=Counter)
    recompilations: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def num_breaks(self) -> int:
        return self.breaks.total()

    def words(self) -> str:
        """For the message of a test that fails."""
        breaks = [f"{times} x {reason}" for reason, times in self.breaks.most_common()]
        return "\n".join([f"{self.graphs} graphs; breaks: {self.num_breaks}", *breaks,
                          f"recompilations: {self.recompilations}", *self.reasons])  # fmt: skip


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Counts what runs inside; all that was compiled before is forgotten, and what is compiled here afterwards.

    Call what torch.compile made inside: nothing is compiled before it is called. "eager" and "aot_eager" are backends
    that need no compiler, and break and recompile as any other does.
    """
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()
    made = Compilations()
    try:
        yield made
    finally:
        made.graphs = counters["stats"]["unique_graphs"]
        made.breaks = Counter({_first_line(reason): times for reason, times in counters["graph_break"].items()})
        made.recompilations = sum(times - 1 for times in convert_frame.FRAME_COMPILE_COUNTER.values())
        again = [each for each in get_compilation_metrics() if each.recompile_reason]
        made.reasons = [f"{each.co_name} at {each.co_filename}:{each.co_firstlineno}: "
                        f"{_first_line(each.recompile_reason)}" for each in again]  # fmt: skip
        torch._dynamo.reset()
        counters.clear()


def _first_line(reason: str) -> str:
    return " ".join(reason.splitlines()[0].split())
