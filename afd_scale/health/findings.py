"""What a look at a machine comes to: one line each, and what to do about it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

State = Literal["ok", "absent", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: of several findings.
        what: was looked at.
        value: as it was found, with its unit.
        state: `absent` is not there and need not be; a `warning` may cost time or hurt another run; what is `wrong`
            ends a run, or makes it wait.
        remedy: what to do, of a warning and of what is wrong.
        where: machine or rank, where there are several.
    """

    topic: str
    what: str
    value: str
    state: State = "ok"
    remedy: str = ""
    where: str = ""


def size_words(size: int) -> str:
    """Bytes, as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def located(findings: Sequence[Finding], where: str) -> list[Finding]:
    """The same, of a machine or rank."""
    return [replace(finding, where=finding.where or where) for finding in findings]


def is_wrong(findings: Sequence[Finding]) -> bool:
    """Whether there is something to do before a run is started."""
    return any(finding.state == "wrong" for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings, and how many there are of each state."""
    counts = {state: sum(each.state == state for each in findings) for state in ("ok", "absent", "warning", "wrong")}
    return {"fit": not is_wrong(findings), "counts": counts, "findings": [asdict(finding) for finding in findings]}


def table(findings: Sequence[Finding]) -> str:
    """A line for each, by topic in the order given; below it what to do, and at the end how it stands."""
    topics = list(dict.fromkeys(finding.topic for finding in findings))
    widths = [max((len(getattr(each, name)) for each in findings), default=0) for name in ("state", "where", "what")]
    lines: list[str] = []
    for topic in topics:
        lines += ["", topic]
        for each in (finding for finding in findings if finding.topic == topic):
            cells = [text.ljust(width) for text, width in zip((each.state, each.where, each.what), widths) if width]
            lines.append(("  " + "  ".join([*cells, each.value])).rstrip())
            if each.remedy:
                lines.append(f"{'':{widths[0] + 4}}-> {each.remedy}")
    counts = as_json(findings)["counts"]
    end = f"{counts['wrong']} wrong, {counts['warning']} warnings, {counts['absent']} absent, {counts['ok']} ok"
    return "\n".join([*lines[1:], "", end])
