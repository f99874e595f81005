"""Measure a finished run's student again, as the run did at its end, with another sampler or on other clips.

    tools/measure_again.py runs/toy-sft --out runs/toy-sft-16 "sampler.timesteps=[1000, 750, 500, 250, 125]"

Nothing is trained. DIR gets summary.json with the metrics of student and teacher, samples/ and report.html.
Exit 0: done. Exit 2: bad input, one line says which.
"""

import logging
import sys
from pathlib import Path

from afd_scale.config import one_line
from afd_scale.config.command_line import Parser


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a complete run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="sampler.key=value", help="over the settings of the run")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    from afd_scale.evaluation.report import metric_table  # heavy imports come after the command line is checked
    from afd_scale.training.measure_again import measure_again

    try:
        print(metric_table(measure_again(options.run, options.out, options.overrides)))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
