"""Compare methods: many ordinary runs, learning rates chosen on seeds of their own, tables with ranges, plots, a page.

    tools/compare.py configs/studies/smoke.yaml
    tools/compare.py STUDY.yaml --out DIR --jobs 4
    tools/compare.py STUDY.yaml --out DIR --table
    tools/compare.py STUDY.yaml --known results.json --known OTHER/results.json
    tools/compare.py STUDY.yaml --from DIR/results.json --out ELSEWHERE

A study is a YAML file: docs/studies.md. Each of its runs is launch/train.py in one process, `--jobs` at a time.
Complete runs are not done again and others go on, so a study may be stopped and started again; started several times on
a folder that machines share, the starts share the runs. DIR gets the runs, results.json (all figures), table.md,
table.csv, plots/, samples/ and index.html. `--table` runs nothing and writes these of what is there; runs that a
`--known` results.json holds were done elsewhere and are not done again; `--from` makes tables and plots of a
results.json alone.

Exit 0: done. Exit 1: some runs failed, a line each; the rest is there. Exit 2: bad input, one line says which.
Exit 3: told to stop (SIGTERM, SIGINT); its runs have saved, the same command goes on.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from afd_scale.config import ConfigError
from afd_scale.config.command_line import Parser, count

if TYPE_CHECKING:
    from afd_scale.study.plan import Plan
    from afd_scale.study.runs import Place

ROOT = Path(__file__).resolve().parent.parent


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY", help="YAML file of a study")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of its runs (runs/studies/<name of the file>)")
    parser.add_argument("--jobs", type=count, help="runs at a time (the cores of this machine)")
    parser.add_argument("--table", action="store_true", help="run nothing, write tables and page of what is there")
    parser.add_argument("--known", type=Path, action="append", default=[], metavar="FILE",
                        help="results.json of runs done elsewhere; may be given several times")  # fmt: skip
    parser.add_argument("--from", dest="results", type=Path, metavar="FILE", help="results.json to make tables of")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    # Heavy imports come after the command line is checked.
    from afd_scale.study.plan import Plan
    from afd_scale.study.runs import Place
    from afd_scale.study.sections import read_study
    from afd_scale.study.work import STOPPED, StoppedError

    try:
        if options.results is not None and options.out is None:
            raise ConfigError("out (None) must be given with --from: the folder to write")
        if options.results is not None and options.known:
            raise ConfigError(f"known ({options.known[0]}) must not come with --from, which shows one file as it is")
        plan = Plan(read_study(options.study), ROOT)
        out = options.out or ROOT / "runs" / "studies" / options.study.stem
        return compare(plan, Place(ROOT, out.resolve()), options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError as stop:
        print(stop, file=sys.stderr)
        return STOPPED


def compare(plan: "Plan", place: "Place", options: argparse.Namespace) -> int:
    """Run what is to be run, and write what follows from it; the exit code."""
    from afd_scale.files import system_errors
    from afd_scale.study.page import PAGE, write_outputs
    from afd_scale.study.results import RESULTS, read_results, write_results
    from afd_scale.study.work import Outcomes, work

    if options.results is not None:
        results = read_results(options.results)
        records, failed = {record.name: record for record in results.runs}, results.failed
    else:
        known = {record.name: record for path in options.known for record in read_results(path).runs}
        if options.table:
            outcomes = Outcomes(plan, place, known)
            outcomes.look()
        else:
            jobs = options.jobs or len(os.sched_getaffinity(0))
            print(f"{plan.study.title}: {jobs} runs at a time, each with a log in {place.out}", file=sys.stderr)
            outcomes = work(plan, place, jobs, known=known)
        records, failed = outcomes.records, outcomes.failed
    with system_errors(f"out ({place.out}) must be a folder that can be written to"):
        place.out.mkdir(parents=True, exist_ok=True)
    write_results(plan.study.title, records.values(), failed, place.out / RESULTS)
    print(write_outputs(plan, place, records, failed))
    print(f"Page: {place.out / PAGE}", file=sys.stderr)
    for name, line in failed.items():
        print(f"failed: {name}: {line}", file=sys.stderr)
    return 1 if failed and not options.table and options.results is None else 0


if __name__ == "__main__":
    sys.exit(main())
