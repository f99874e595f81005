"""Write the report of a run again: `tools/report.py RUN [--x compute/pflop]`."""

import sys
from pathlib import Path

from afd_scale.config import one_line
from afd_scale.config.command_line import Parser
from afd_scale.evaluation.report import write_report


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, holds config.yaml")
    parser.add_argument("--x", metavar="METRIC", help="what curves are drawn over at first; default: step")
    options = parser.parse_args()
    try:
        print(write_report(options.run, options.x))
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
