"""The same run on this machine before the cluster is paid: every width and length shrunk, every choice kept.

    tools/rehearse.py --config configs/wan_1_3b/self_forcing.yaml
    tools/rehearse.py --config configs/wan_14b/afd.yaml --gpus 64 --keep runs/rehearsal

First what needs no device is looked at as it will run: the config, its plan on --gpus of --gpu, how the batch divides,
and of the files that it names those that are here, by their headers. Then tiny models with random weights are written
in the formats of those files, and the run is done with them by the commands of a real one: launch/train.py under
torchrun until it has saved, SIGTERM, the same command again to its end, tools/convert_checkpoint.py, tools/generate.py.
Shards that are here give a few of their own samples, cut to size.

The table says what was done and how long it took; below it stands what could not be rehearsed. Exit 0: all went well.
Exit 1: a check or a stage failed; its log stays, and the table names it. Exit 2: bad input, one line says which.
"""

import contextlib
import json
import logging
import signal
import sys
import tempfile
from pathlib import Path

from afd_scale.config import ConfigError, load_config
from afd_scale.config.command_line import Parser
from afd_scale.planning.gpus import GPUS

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a run")
    parser.add_argument("--gpus", type=int, help="all GPUs of the run (default: the fewest that hold it)")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="kind of GPU (default %(default)s)")
    parser.add_argument("--ranks", type=int, help="processes here, at most (default: a GPU or a core each, at least 2)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the small run there; it must not exist yet")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as of launch/train.py")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    logging.getLogger("afd_scale.rehearsal").setLevel(logging.INFO)
    try:
        config = load_config(options.config, options.overrides)
        for name in ("gpus", "ranks"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise ConfigError(f"{name} ({getattr(options, name)}) must be at least 1")
        if options.keep is not None and options.keep.exists():
            raise ConfigError(f"keep ({options.keep}) must not exist yet: nothing is overwritten")
        # Heavy imports come after the config has been checked; some of them print.
        with contextlib.redirect_stdout(sys.stderr):
            from afd_scale.rehearsal.rehearse import rehearse, table

        folder = options.keep or Path(tempfile.mkdtemp(prefix="rehearsal-"))
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):  # what is imported on the way prints
            done = rehearse(config, root=ROOT, folder=folder.resolve(), gpus=options.gpus, gpu=GPUS[options.gpu],
                            ranks=options.ranks)  # fmt: skip
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.keep is None and done.went_well:
        done.remove(folder)
    print(json.dumps(done.as_dict()) if options.json else table(done))
    return 0 if done.went_well else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what it has started ends with it
    sys.exit(main())
