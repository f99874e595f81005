"""What a run costs and whether it fits, from its config alone: networks are built without memory, no GPU is needed.

    tools/plan.py --config configs/wan_14b/afd.yaml --gpus 64 --gpu h100
    tools/plan.py --config configs/wan_14b/afd.yaml --gpus 8 --gpu h200 train.micro_batch=1 --json

    tools/plan.py --config configs/wan_1_3b/self_forcing.yaml --gpus 8 --gpu h100 --best

With --best it tries every valid choice of parallel.sequence, train.micro_batch, rollout.weights and recomputation, and
prints the fastest layout that fits as overrides to paste, what the runners-up cost, and which faster ones do not fit.
None of these choices changes what is computed, and the batch stays as the config says.

All figures are of one rank and one step. They are computed; what is assumed is printed with them. Exit 0: planned, and
where it does not fit, what would is printed. Exit 2: bad input, one line says which.
"""

import json
import sys
from pathlib import Path

from afd_scale.config import ConfigError, load_config
from afd_scale.config.command_line import Parser
from afd_scale.planning.gpus import GPUS
from afd_scale.planning.layouts import search_as_dict, search_layouts
from afd_scale.planning.plan import make_plan, plan_as_dict, remedies
from afd_scale.planning.report import report, report_search


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a run")
    parser.add_argument("--gpus", type=int, required=True, help="all GPUs of the run")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="kind of GPU (default %(default)s)")
    parser.add_argument("--best", action="store_true", help="search for the fastest layout that fits")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as of launch/train.py")
    options = parser.parse_intermixed_args(arguments)
    gpu = GPUS[options.gpu]
    try:
        config = load_config(options.config, options.overrides)
        if options.best:
            search = search_layouts(config, options.gpus, gpu)
            print(json.dumps(search_as_dict(search)) if options.json else report_search(search))
            return 0
        plan = make_plan(config, options.gpus, gpu)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    would_fit = {} if plan.fits else remedies(config, options.gpus, gpu)
    if options.json:
        print(json.dumps(plan_as_dict(plan, would_fit)))
    else:
        print(report(plan, would_fit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
