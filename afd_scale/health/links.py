"""How fast ranks compute and exchange, which of them is slowest, and whether their clocks agree."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from afd_scale.health.findings import Finding, State
from afd_scale.parallel.ranks import Ranks
from afd_scale.planning.gpus import GPUS, Gpu

T = TypeVar("T")

TOPIC = "ranks"
REPEATS = 5
CLOCK_ROUNDS = 5

# Beside the median of its like, or beside a figure that is known. Cores of a CPU are shared, so it only warns.
SLOWER, MUCH_SLOWER = 0.8, 0.5
CLOCK_WARNING_SECONDS, CLOCK_WRONG_SECONDS = 1.0, 60.0


@dataclass(frozen=True)
class Sizes:
    """Of what is computed and sent: enough to fill a link, for a second or two in all.

    Attributes:
        width: of square matrices.
        bytes: that a rank puts into a collective, or sends to a neighbour.
    """

    width: int
    bytes: int


ON_GPU, ON_CPU = Sizes(8192, 256 * 2**20), Sizes(512, 8 * 2**20)


@dataclass(frozen=True)
class Measured:
    """Rates of all ranks; the same on each of them.

    Attributes:
        hosts: of the ranks.
        tflops: of a matrix product, by rank alone.
        pairs: bytes a second between neighbours, each way, by (rank, rank).
        all_reduce, all_to_all: bytes a second over each rank's links.
        sequence: ranks of an all-to-all.
        clocks: seconds that each rank's clock is ahead of the first one's.
    """

    hosts: tuple[str, ...]
    tflops: tuple[float, ...]
    pairs: Mapping[tuple[int, int], float]
    all_reduce: float
    all_to_all: float
    sequence: int
    clocks: tuple[float, ...]


def measure(ranks: Ranks, hosts: Sequence[str], sizes: Sizes) -> Measured:
    """Let all ranks compute and exchange; a collective.

    Args:
        ranks: several; the all-to-all is among those of a sequence, or among all where there is no such group.
        hosts: of each rank.
    """
    count = sizes.bytes // 4 // ranks.size * ranks.size
    values = torch.zeros(count, device=ranks.device)
    received = torch.empty_like(values)
    sequence = ranks.sequence if ranks.sequence > 1 else ranks.size
    part = values[: count // sequence * sequence]
    reducing = _seconds(ranks, lambda: dist.all_reduce(values))
    exchanging = _seconds(
        ranks, lambda: dist.all_to_all_single(received[: len(part)], part, group=ranks.sequence_group)
    )  # fmt: skip
    pairs = _pair_rates(ranks, values, received)
    alone = _tflops(ranks.device, sizes.width)
    return Measured(
        tuple(hosts),
        tuple(everyones(ranks, alone)),
        pairs,
        # A ring sends twice all but one part of what is reduced; an all-to-all all but a rank's own part.
        all_reduce=2 * (ranks.size - 1) / ranks.size * 4 * count / statistics.median(everyones(ranks, reducing)),
        all_to_all=(sequence - 1) / sequence * 4 * len(part) / statistics.median(everyones(ranks, exchanging)),
        sequence=sequence,
        clocks=_clock_offsets(ranks),
    )


def judge(measured: Measured, gpu: str | None) -> list[Finding]:
    """What the rates say, with the slowest rank and pair by name.

    Args:
        gpu: name of the ranks' GPU; None on a CPU.
    """
    known = known_gpu(gpu)
    names = [f"rank {rank} ({host})" for rank, host in enumerate(measured.hosts)]
    on_gpu, size = gpu is not None, len(names)
    findings = [
        _beside_median(
            "matrix product", dict(zip(names, measured.tflops)), "TFLOP/s", on_gpu,
            "see its clock and who else computes there: all ranks wait for it in each step",
        ),
        *_judge_pairs(measured, names, on_gpu),
    ]  # fmt: skip
    local = max(measured.hosts.count(host) for host in measured.hosts)
    if known is not None:
        known = replace(known, gpus_per_node=local)
    for what, rate, expected in (
        (f"all-reduce of {size}", measured.all_reduce, None if known is None else known.gather_rate(size)),
        (
            f"all-to-all of {measured.sequence}",
            measured.all_to_all,
            None if known is None else known.exchange_rate(measured.sequence),
        ),
    ):
        findings.append(_beside_figure(what, rate, expected))
    if known is not None:
        slowest = min(measured.tflops)
        if slowest < SLOWER * known.matmul_tflops:
            findings.append(
                Finding(TOPIC, "matrix product, by figure", f"{slowest:.0f} TFLOP/s, a {known.name} reaches "
                        f"{known.matmul_tflops:.0f}", "warning", "see the GPUs' clocks")
            )  # fmt: skip
    return [*findings, _judge_clocks(measured)]


def known_gpu(name: str | None) -> Gpu | None:
    """Figures of a GPU by the name that CUDA gives it; of its form with NVLink alone."""
    if name is None or "PCIe" in name or "NVL" in name:
        return None
    return next((gpu for key, gpu in GPUS.items() if key in name.lower().replace(" ", "-").split("-")), None)


def _judge_pairs(measured: Measured, names: Sequence[str], on_gpu: bool) -> list[Finding]:
    """Neighbours of one machine and of two are held against their like; who is slow to both sides is named alone."""
    findings = []
    hosts = measured.hosts
    for what, same in (("neighbours of a machine", True), ("neighbours of two machines", False)):
        rates = {pair: rate for pair, rate in measured.pairs.items() if (hosts[pair[0]] == hosts[pair[1]]) == same}
        if not rates:
            continue
        by_name = {f"{names[one]} and {names[other]}": rate / 1e9 for (one, other), rate in rates.items()}
        finding = _beside_median(what, by_name, "GB/s each way", on_gpu, _remedy_of_link(same))
        middle = statistics.median(rates.values())
        slow = [pair for pair, rate in rates.items() if rate < SLOWER * middle]
        shared = set.intersection(*map(set, slow)) if len(slow) > 1 else set()
        if len(shared) == 1:
            finding = replace(finding, value=f"{finding.value}; common to all slow pairs: {names[shared.pop()]}")
        findings.append(finding)
    return findings


def _remedy_of_link(same_machine: bool) -> str:
    if same_machine:
        return "`nvidia-smi topo -m` and `nvidia-smi nvlink -s` say how they are joined"
    return "NCCL_DEBUG=INFO says which network is taken (docs/cluster.md, NCCL); see that machine's adapters and cables"


def _beside_median(what: str, rates: Mapping[str, float], unit: str, on_gpu: bool, remedy: str) -> Finding:
    """The slowest of several, and how far it is behind the one in the middle."""
    slowest = min(rates, key=lambda name: rates[name])
    middle, share = statistics.median(rates.values()), rates[slowest] / statistics.median(rates.values())
    words = f"{middle:.3g} {unit} at the median; slowest {slowest}: {rates[slowest]:.3g}"
    if len(rates) == 1:
        return Finding(TOPIC, what, f"{middle:.3g} {unit}, {slowest}")
    state: State = "ok"
    if share < MUCH_SLOWER:
        state = "wrong" if on_gpu else "warning"
    elif share < SLOWER and on_gpu:
        state = "warning"
    return Finding(TOPIC, what, words, state, remedy if state != "ok" else "")


def _beside_figure(what: str, rate: float, expected: float | None) -> Finding:
    words = f"{rate / 1e9:.3g} GB/s"
    if expected is None:
        return Finding(TOPIC, what, f"{words}; no figure is known to hold it against")
    words += f", {expected / 1e9:.3g} are to be expected"
    if rate >= SLOWER * expected:
        return Finding(TOPIC, what, words)
    state: State = "wrong" if rate < MUCH_SLOWER * expected else "warning"
    return Finding(TOPIC, what, words, state, "the slowest pair above says where; NCCL_DEBUG=INFO says whether NVLink "
                   "and InfiniBand are taken at all (docs/cluster.md, NCCL)")  # fmt: skip


def _judge_clocks(measured: Measured) -> Finding:
    off = dict(zip(measured.hosts, measured.clocks))
    far = max(off, key=lambda host: abs(off[host]))
    words = f"{abs(off[far]):.3f} s from the first rank's at most" + (f" ({far})" if len(off) > 1 else "")
    state: State = "ok"
    if abs(off[far]) > CLOCK_WARNING_SECONDS:
        state = "wrong" if abs(off[far]) > CLOCK_WRONG_SECONDS else "warning"
    remedy = f"set the clock of {far} by NTP (`chronyc tracking`)" if state != "ok" else ""
    return Finding(TOPIC, "clocks", words, state, remedy)


def _seconds(ranks: Ranks, work: Callable[[], Any]) -> float:
    """Median time of a collective on this rank; ranks that have nothing to do wait with the others."""
    taken = []
    for number in range(REPEATS + 1):
        ranks.barrier()
        _finished(ranks.device)
        began = time.perf_counter()
        work()
        _finished(ranks.device)
        if number:  # the first one opens connections
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _pair_rates(ranks: Ranks, out: Tensor, into: Tensor) -> dict[tuple[int, int], float]:
    """Neighbours of a ring exchange, two by two at a time."""
    mine = {}
    for pairs in pairs_in_turns(ranks.size):
        pair = next((pair for pair in pairs if ranks.rank in pair), None)
        seconds = _seconds(ranks, lambda pair=pair: _exchange(ranks, pair, out, into))  # type: ignore[misc]
        if pair is not None and pair[0] == ranks.rank:
            mine[pair] = out.numel() * out.element_size() / seconds
    return {pair: rate for each in everyones(ranks, mine) for pair, rate in each.items()}


def pairs_in_turns(size: int) -> list[list[tuple[int, int]]]:
    """The neighbours of a ring in turns, in each of which a rank is in one pair at most."""
    ring = [(rank, (rank + 1) % size) for rank in range(size if size > 2 else 1)]
    odd_one = [ring.pop()] if len(ring) % 2 and size > 2 else []
    return [turn for turn in (ring[::2], ring[1::2], odd_one) if turn]


def _exchange(ranks: Ranks, pair: tuple[int, int] | None, out: Tensor, into: Tensor) -> None:
    if pair is None:
        return
    other = pair[0] if pair[1] == ranks.rank else pair[1]
    # As a batch, or nccl makes a communicator for the pair.
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]):
        work.wait()


def _tflops(device: torch.device, width: int) -> float:
    """Of a matrix product, in bf16 on a GPU and float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    one, other = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for number in range(REPEATS + 1):
        _finished(device)
        began = time.perf_counter()
        for _ in range(4):
            one @ other
        _finished(device)
        if number:
            taken.append(time.perf_counter() - began)
    return 4 * 2 * width**3 / statistics.median(taken) / 1e12


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def everyones(ranks: Ranks, value: T) -> list[T]:
    """Each rank's picklable value, in their order."""
    values: list[T] = [value] * ranks.size
    dist.all_gather_object(values, value)
    return values


def _clock_offsets(ranks: Ranks) -> tuple[float, ...]:
    """Clocks read right after a barrier, in several rounds; each rank's median distance to the first one's."""
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        ranks.barrier()
        _finished(ranks.device)
        rounds.append(everyones(ranks, time.time()))
    return tuple(statistics.median(at[rank] - at[0] for at in rounds) for rank in range(ranks.size))
