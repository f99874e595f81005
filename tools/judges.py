"""Measure judges and students of toy runs under other prompts and lengths, and what the one predicts of the other.

    tools/judges.py RUN... --out DIR

Each kept checkpoint of each run (train.keep_every) is looked at: rollouts of fixed prompts with fixed noise, as they
were trained on, paraphrased, in combinations that a run with data.source.prompts=seen never saw, and two and four times
as long as the teacher's videos. docs/judges.md says what is measured.

DIR gets judges.json (everything), table.md, plots/ and measured/, a file a checkpoint: the same command goes on where
it was cut short, and one with more runs measures these alone.

Exit 0: done. Exit 2: bad input, one line says which; what is measured stays.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from afd_scale.config import one_line
from afd_scale.config.command_line import Parser
from afd_scale.files import write_text
from afd_scale.study.judge_tables import judge_tables
from afd_scale.study.judged_runs import measure_runs, metrics_of
from afd_scale.study.prediction import correlations
from afd_scale.study.scatter import write_scatter_plots


def parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write, or to go on with")
    add("--clips", type=int, default=144, help="of each side in a regime, shared by its prompts (%(default)s)")
    add("--weights", choices=("student", "old_policy", "ema"), help="whose rollouts (those that the run exports)")
    add("--json", action="store_true", help="print judges.json, not the table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    try:
        print(judge(options), end="")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def judge(options: argparse.Namespace) -> str:
    """What is printed."""
    world, runs = measure_runs(options.runs, options.out, options.clips, options.weights)
    metrics = metrics_of(world)
    found = correlations(runs, metrics)
    result = {
        "world": world, "clips": options.clips, "weights": options.weights, "runs": [asdict(run) for run in runs],
        "correlations": [asdict(one) for one in found],
    }  # fmt: skip
    as_json, table = json.dumps(result, indent=1) + "\n", judge_tables(runs, found, metrics)
    write_text(options.out / "judges.json", as_json)
    write_text(options.out / "table.md", table)
    write_scatter_plots(runs, found, metrics, options.out / "plots")
    return as_json if options.json else table


if __name__ == "__main__":
    sys.exit(main())
