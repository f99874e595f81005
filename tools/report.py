"""Write the report of a run again: `tools/report.py RUN`."""

import argparse
import sys
from pathlib import Path

from afd_scale.evaluation.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description="Write report.html into the folder of a run.")
    parser.add_argument("run", type=Path, help="folder of the run, holds config.yaml")
    try:
        print(write_report(parser.parse_args().run))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
