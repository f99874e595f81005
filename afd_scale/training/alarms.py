"""Tells of alarms while a run goes: in the log when one begins and when it is over, in the metrics at each logged step.

The rules are in evaluation/alarms.py; all they go by is in metrics.jsonl, so a resumed run knows what an earlier start
saw.
"""

import logging
from typing import Any

from afd_scale.evaluation.alarms import PREFIX, REMEDIES, Record, SuiteMetrics, check

log = logging.getLogger(__name__)


class Watch:
    """Of one run, on the main rank.

    Args:
        name: of the run, for the log.
        records: that were logged before.
        metrics: of the run's suite.

    Attributes:
        standing: alarms that are on, each with what was found and what helps.
    """

    def __init__(self, name: str, records: list[dict[str, Any]], metrics: SuiteMetrics):
        self.name, self.records, self.metrics = name, [*records], metrics
        found = check(records, metrics) if records else {}
        on = [alarm for alarm in found if records[-1].get(PREFIX + alarm)]
        self.standing = {alarm: _told(alarm, found[alarm].sentence) for alarm in on}

    def see(self, record: Record) -> dict[str, float]:
        """What a newly logged step says: `alarm/NAME`, 0 or 1, of each rule that has something to go by."""
        self.records.append(dict(record))
        found = check(self.records, self.metrics)
        flags = {PREFIX + alarm: float(verdict.on) for alarm, verdict in found.items()}
        self.records[-1] |= flags
        standing = {alarm: _told(alarm, verdict.sentence) for alarm, verdict in found.items() if verdict.on}
        for alarm in standing.keys() - self.standing.keys():
            log.warning("%s, step %d: alarm %s: %s", self.name, record["step"], alarm, standing[alarm])
        for alarm in self.standing.keys() - standing.keys():
            log.info("%s, step %d: alarm %s is over", self.name, record["step"], alarm)
        self.standing = standing
        return flags


def _told(alarm: str, sentence: str) -> str:
    return f"{sentence}; {REMEDIES[alarm]}"
