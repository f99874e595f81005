"""Fit the gravity probe of the world of kicks: `tools/fit_probe.py --out FILE [--steps N] [--seed S]`.

It renders fresh clips as it goes, which takes some minutes of one core. Printed is one JSON object: the mean errors on
held-out clips in pixels per frame squared, by gravity, of clean and of degraded clips and of the teacher's; and the
sha256 of FILE, its weights in half precision. The same command gives the same errors, up to rounding, on any machine,
but the same bytes only where torch computes alike.

Exit 2: bad input, one line says which.
"""

import hashlib
import json
import sys
from pathlib import Path

from safetensors.torch import save

from afd_scale.config import ConfigError, one_line
from afd_scale.config.command_line import Parser
from afd_scale.evaluation.suites.gravity_probe_fit import FEWEST_STEPS, fit, held_out_errors
from afd_scale.files import replacing, system_errors
from afd_scale.progress import progress


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors that is written")
    parser.add_argument("--steps", type=int, default=2000, help="of 256 clips each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(fit_probe(options.out, options.steps, options.seed), indent=2))
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def fit_probe(out: Path, steps: int, seed: int) -> dict[str, object]:
    """Write the weights and say how good they are."""
    if steps < FEWEST_STEPS:
        raise ConfigError(f"steps ({steps}) must be at least {FEWEST_STEPS}: the learning rate rises first")
    if seed < 0:
        raise ConfigError(f"seed ({seed}) must not be negative")
    with system_errors(f"out ({out}) must be a file that can be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            partial.touch()  # before minutes are spent
            with progress("Steps") as on_step:
                probe = fit(steps, seed, on_step)
            weights = save({name: weight.half() for name, weight in probe.state_dict().items()})
            partial.write_bytes(weights)
    errors = {
        name: {kind: round(error, 4) for kind, error in each.items()} for name, each in held_out_errors(probe).items()
    }
    sha256 = hashlib.sha256(weights).hexdigest()
    return {"steps": steps, "seed": seed, **errors, "bytes": len(weights), "sha256": sha256}


if __name__ == "__main__":
    sys.exit(main())
