"""Kill a run again and again and see whether it comes to the same bits as one that is left alone.

    tools/chaos.py --config configs/toy/smoke/afd.yaml --kills 10 --json train.save_every=5

The run is trained twice, with torchrun on this machine: once in peace, and once killed with SIGKILL: a rank, all
processes at once or the launcher alone; while it starts, at the beginning of a step (where a method rolls out),
anywhere in one, or while a checkpoint is written. After each kill the same command starts it again. Compared are the
metrics of each step, the evaluation and every tensor of the last checkpoint, bit for bit.

Exit 0: identical. Exit 1: they differ, and it is said where first. Exit 2: bad input, one line says which.
"""

import json
import logging
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from afd_scale.config import ConfigError, load_config
from afd_scale.config.command_line import Parser


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a run that this machine trains")
    parser.add_argument("--kills", type=int, default=10, help="(default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for both runs and their logs (default: none is kept)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as of launch/train.py")
    options = parser.parse_intermixed_args(arguments)
    level = logging.WARNING if options.json else logging.INFO
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, level=level)
    try:
        if options.kills < 1:
            raise ConfigError(f"--kills ({options.kills}) must be at least 1")
        config = load_config(options.config, options.overrides)
        if options.keep is not None and options.keep.exists():
            raise ConfigError(f"--keep ({options.keep}) must not exist: the runs begin anew")
        from afd_scale.rehearsal.chaos import plan_kills, run_chaos

        kills = plan_kills(options.kills, config.train.steps, options.seed)
        with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as folder:
            outcome = run_chaos(config, kills, options.ranks, Path(folder), options.seed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    identical = outcome.different is None
    if options.json:
        seconds = dict(zip(("alone", "killed"), (round(s, 1) for s in outcome.seconds), strict=True))
        print(json.dumps({"kills": len(outcome.kills), "identical": identical, "different": outcome.different,
                          "seconds": seconds, "each": [asdict(kill) for kill in outcome.kills]}))  # fmt: skip
    else:
        orphans = sum(kill.orphans for kill in outcome.kills)
        print(f"{len(outcome.kills)} kills, {outcome.seconds[1]:.0f} s against {outcome.seconds[0]:.0f} s left alone, "
              f"{orphans} processes left over: {'identical' if identical else outcome.different}")  # fmt: skip
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
