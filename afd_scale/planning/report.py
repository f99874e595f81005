"""A plan in words."""

from afd_scale.planning.gpus import GIB
from afd_scale.planning.layouts import Layout, Search
from afd_scale.planning.parameters import NetworkSize
from afd_scale.planning.plan import SEARCH, Plan, Suggestion
from afd_scale.planning.workload import valid_degrees

SHOWN = 6  # layouts of a kind


def report(plan: Plan, remedies: dict[str, Suggestion | None]) -> str:
    """Lines for a terminal.

    Args:
        remedies: of `afd_scale.planning.plan.remedies`, empty where the plan fits.
    """
    assumed = ["Assumed", *(f"  {line}" for line in plan.gpu.assumptions())]
    sections = (_headline(plan, remedies), _networks(plan), _memory(plan), _step(plan), assumed)
    return "\n\n".join("\n".join(lines) for lines in sections)


def report_search(search: Search) -> str:
    """Lines for a terminal: the best layout to paste, and why."""
    plan, best, tried = search.layouts[0].plan, search.best, len(search.layouts)
    fitting = sum(layout.plan.fits for layout in search.layouts)
    where, usable = f"{plan.config.name} on {plan.load.gpus} {plan.gpu.name}", _gib(plan.gpu.usable_bytes)
    lines = [f"{where}: {tried} layouts, of which {fitting} fit into {usable}"]
    if best is None:
        smallest = search.smallest
        lines += [f"  the smallest takes {_gib(smallest.plan.memory.peak)}: {' '.join(smallest.overrides)}",
                  "  engine.offload_optimizer=cpu makes it smaller; without --best, with these overrides, the plan "
                  "says how many GPUs would do"]  # fmt: skip
        return "\n".join(lines)
    lines += [f"  fastest: {best.seconds:.1f} s a step, {_gib(best.plan.memory.peak)} at its peak", "",
              f"  {' '.join(best.overrides)}", "", "Why; seconds of each part as if nothing overlapped"]  # fmt: skip
    lines += [_layout("it", best, best)]
    if search.as_configured is None:
        lines += ["  the config as it is: its parallel.sequence or batch does not divide on these GPUs"]
    else:
        lines += [_layout("the config as it is", search.as_configured, best)]
    lines += _first("Runners-up: the fastest micro-batch with other choices", search.runners_up(), best)
    lines += _first("Faster, but too large with any micro-batch; the smallest of each", search.too_large(), best)
    return "\n".join([*lines, "", "Assumed", *(f"  {line}" for line in plan.gpu.assumptions())])


def _first(title: str, layouts: list[Layout], best: Layout) -> list[str]:
    return ["", title, *(_layout(" ".join(each.overrides), each, best) for each in layouts[:SHOWN])] if layouts else []


def _layout(name: str, layout: Layout, best: Layout) -> str:
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in layout.parts.items() if seconds >= 0.05)
    more = layout.seconds / best.seconds - 1
    fits = "" if layout.plan.fits else ", does not fit"
    return (f"  {name}\n    {layout.seconds:.1f} s ({more:+.1%}), {_gib(layout.plan.memory.peak)}{fits}: {parts}"
            )  # fmt: skip


def _headline(plan: Plan, remedies: dict[str, Suggestion | None]) -> list[str]:
    load, memory = plan.load, plan.memory
    lines = [
        f"{plan.config.name} on {load.gpus} {plan.gpu.name}: {'fits' if plan.fits else 'does not fit'} "
        f"({_gib(memory.peak)} at its peak, {_gib(plan.gpu.usable_bytes)} usable)",
        f"  data {load.data_ranks} x sequence {load.sequence} (sequence may be "
        f"{', '.join(map(str, valid_degrees(plan.config, load.gpus)))}); {load.videos} videos a data rank and step, "
        f"{load.together} at once; rollout weights {'gathered' if memory.gathered_rollout else 'sharded'}",
        *(f"  note: {note}" for note in plan.notes),
    ]
    if plan.fits:
        return lines
    here, as_configured, smallest = (remedies[name] for name in ("here", "as_configured", "smallest"))
    if here is not None:
        lines.append(f"  fits on these GPUs with {' '.join(here.overrides)} ({_gib(here.peak)})")
    if as_configured is not None:
        lines.append(f"  smallest number of GPUs as configured: {as_configured.gpus} ({_gib(as_configured.peak)})")
    if smallest is not None and smallest.overrides:
        lines.append(f"  smallest number of GPUs with {' '.join(smallest.overrides)}: {smallest.gpus} "
                     f"({_gib(smallest.peak)})")  # fmt: skip
    if here is None:
        lines.append("  --best looks for a layout that fits among other micro-batches and recomputation too")
    if as_configured is None and smallest is None:
        lines.append(
            f"  no number of GPUs up to {SEARCH[-1]} fits: a shorter or smaller video, or a smaller network, would"
        )
    return lines


def _networks(plan: Plan) -> list[str]:
    def line(name: str, size: NetworkSize) -> str:
        adapters = f" + {size.num_adapters} adapters of {size.adapter / 1e9:.3f}" if size.adapter else ""
        return f"  {name:24} {size.base / 1e9:.3f}{adapters}; trained {size.trained / 1e9:.3f}"

    return ["Parameters, 1e9", *(line(role, size) for role, size in plan.networks.items())]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    lines = ["Memory of a rank, GiB", *_parts("all the time", memory.shards)]
    for name, phase in memory.all_phases.items():
        lines.append(f"  {name:24} peak {phase.peak / GIB:.1f}")
        lines += [f"    {part:32} {held / GIB:.2f}" for part, held in phase.parts.items()]
        if phase.step:
            lines.append(f"    {'or, at the step':32} {phase.step / GIB:.2f}")
    lines += _parts("offloaded", memory.host) if memory.host else []
    lines.append(f"  {'on the CPU, a checkpoint that is written':42} {memory.snapshot / GIB:.2f}")
    return [*lines, f"  {'on the CPU, judges as they were before a step':42} {memory.kept / GIB:.2f}"]


def _parts(name: str, parts: dict[str, int]) -> list[str]:
    return [
        f"  {name:24} {sum(parts.values()) / GIB:.1f}",
        *(f"    {part:32} {held / GIB:.2f}" for part, held in parts.items()),
    ]


def _step(plan: Plan) -> list[str]:
    columns = (
        "PFLOP", "gathered GB", "reduced GB", "exchanged GB",
        "compute s", "reading s", "host s", "ZeRO s", "Ulysses s", "total s",
    )  # fmt: skip
    lines = ["A step of a rank      " + "".join(f"{column:>13}" for column in columns)]
    for name, seconds in plan.seconds.items():
        traffic = plan.traffic[name]
        values = (
            plan.flops[name].total / 1e15, traffic.gather / 1e9, traffic.reduce / 1e9, traffic.exchange / 1e9,
            seconds.compute, seconds.reading, seconds.host, seconds.zero, seconds.ulysses, seconds.total,
        )  # fmt: skip
        lines.append(f"  {name:20}" + "".join(f"{value:13.2f}" for value in values))
    decoding = sum(seconds.decoding for seconds in plan.seconds.values())
    lines += [f"  decoding for who judges pixels: {decoding:.1f} s of it"] if decoding else []
    return [*lines, f"  predicted: {plan.step_seconds:.1f} s a step", *_samples(plan), _stopping(plan)]


def _samples(plan: Plan) -> list[str]:
    samples, every = plan.samples, plan.config.train.sample_every
    if samples is None:
        return []
    often = "at the end only" if samples.share is None else f"every {every} steps, {samples.share:.1%} of the time"
    return [f"  sample videos: {samples.seconds:.0f} s ({samples.generating:.0f} generating, {samples.decoding:.0f} "
            f"decoding, {samples.writing:.0f} writing), {often}"]  # fmt: skip


def _stopping(plan: Plan) -> str:
    stop = plan.stopping
    return (f"  told to stop: saved after {stop.seconds:.0f} s (two micro-batches of {stop.stretch:.1f}, writing "
            f"{stop.writing:.1f}): SLURM's --signal=TERM@{stop.lead}")  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
