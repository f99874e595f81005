"""What is measured of generated clips: one file a suite, which `evaluation.metrics` names."""

from collections.abc import Mapping

from afd_scale.config import RunConfig
from afd_scale.evaluation.suites.kick import KickSuite
from afd_scale.evaluation.suites.suite import Metric, Suite, Timing, parts_of
from afd_scale.evaluation.suites.toy import ToySuite
from afd_scale.evaluation.suites.video import VideoSuite

SUITES: Mapping[str, type[Suite]] = {"toy": ToySuite, "kick": KickSuite, "video": VideoSuite}

__all__ = ["SUITES", "Metric", "Suite", "Timing", "make_suite", "parts_of"]


def make_suite(config: RunConfig) -> Suite | None:
    """The suite of a run; None where nothing is evaluated."""
    name = config.evaluation.metrics
    return None if name == "none" else SUITES[name](config)
