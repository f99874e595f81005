"""Watch a student live, and let it be a teacher: a page and the videos API behind one small server.

    tools/serve.py runs/toy-afd
    tools/serve.py exported --models Wan2.1-T2V-1.3B-Diffusers --port 8080
    SERVE_TOKEN=... tools/serve.py exported --models DIR --host 0.0.0.0 --token-env SERVE_TOKEN

SOURCE is what tools/generate.py takes: a run (its newest checkpoint), a checkpoint, an exported folder or a weights
file. The page is at http://127.0.0.1:PORT/: type a prompt, watch what is made while it is made, change the prompt, save
an mp4. At /v1/videos the student is asked for videos as OpenAI's protocol has it (create, poll, content), which is what
tools/make_shards.py --teacher http speaks: --url http://127.0.0.1:PORT/v1 --model NAME. One video is made at a time;
who comes later waits. Needs the extra serve: pip install -e '.[serve]'. docs/serving.md says more.

Only this machine is served, unless --host names another address; then a token must be named, by --token-file or
--token-env, and everyone needs it.

Exit 0: stopped by Ctrl-C or SIGTERM. Exit 2: bad input, one line says which, and nothing is served.
"""

import argparse
import importlib.util
import logging
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from afd_scale.config import ConfigError, one_line
from afd_scale.config.command_line import Parser, positive
from afd_scale.generation.command_line import add_student_options
from afd_scale.generation.job import MOST, Job

_NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "websockets": "websockets",
           "python_multipart": "python-multipart"}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("afd_scale").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _stop)
    try:
        serve(options)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def serve(options: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    for module, package in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{package} must be installed: pip install 'afd-scale[serve]'")
    from afd_scale.serving.door import Door, read_token
    from afd_scale.serving.server import listen, server_of
    from afd_scale.serving.studio import Studio
    from afd_scale.serving.viewer import Limits, Patience

    door = Door.at(options.host, read_token(options.token_file, options.token_env))
    patience = Patience(options.stall_seconds, options.turn_seconds, options.stream_seconds)
    with tempfile.TemporaryDirectory(prefix="afd-serve-") as folder, listen(options.host, options.port) as listening:
        job = Job(source=options.source, out=Path(folder), frames=options.frames, size=options.size, fps=options.fps,
                  models=options.models, precision=options.precision, architecture=options.architecture,
                  family=options.family, window=options.window, sink=options.sink, positions=options.positions,
                  at_prompt_change=options.at_prompt_change)  # fmt: skip
        studio = Studio(job, options.name or options.source.resolve().name)
        server = server_of(studio, Path(folder), door, Limits(options.viewers, patience, options.keep_seconds),
                           queue=options.queue, longest_seconds=options.longest_seconds, keeps=options.keep_videos,
                           )  # fmt: skip
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{studio.name} on {studio.device_name}: http://{shown}:{port}/ and {shown}:{port}/v1/videos", flush=True)
        server.run(sockets=[listening])


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run, checkpoint, export or weights file")
    parser.add_argument("--name", help="of the model, in the API and on the page (the last part of SOURCE)")
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    where.add_argument("--port", type=port, default=8000, help="(%(default)s); 0 takes a free one")
    where.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token that everyone needs")
    where.add_argument("--token-env", metavar="NAME", help="of the environment variable that holds it")
    form = parser.add_argument_group("videos")
    form.add_argument("--frames", type=count, help="of a video that no length is asked of; as trained if known")
    form.add_argument("--size", metavar="HEIGHTxWIDTH", help="pixels of all; as trained where the source says it")
    form.add_argument("--fps", type=positive, help="as trained where the source says it (16; 8 in the toy world)")
    add_student_options(parser.add_argument_group("how"))
    limits = parser.add_argument_group("limits")
    limits.add_argument("--viewers", type=count, default=8, help="who watch or wait at a time (%(default)s)")
    limits.add_argument("--queue", type=count, default=16, help="streams and videos that wait (%(default)s)")
    limits.add_argument("--turn-seconds", type=seconds, default=120.0,
                        help="that a stream has once others wait (%(default)g)")  # fmt: skip
    limits.add_argument("--stall-seconds", type=seconds, default=30.0,
                        help="without anything shown that end a stream (%(default)g)")  # fmt: skip
    limits.add_argument("--stream-seconds", type=seconds, default=3600.0, help="of a stream's video (%(default)g)")
    limits.add_argument("--keep-seconds", type=seconds, default=120.0,
                        help="of a stream's end that can be saved (%(default)g)")  # fmt: skip
    limits.add_argument("--longest-seconds", type=seconds, default=60.0, help="of the API's videos (%(default)g)")
    limits.add_argument("--keep-videos", type=count, default=256, help="finished ones that are kept (%(default)s)")
    return parser


def count(text: str) -> int:
    value = int(text)
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"({text}) must be positive, and at most {MOST}")
    return value


def seconds(text: str) -> float:
    value = positive(text)
    if value > MOST:
        raise argparse.ArgumentTypeError(f"({text}) must be at most {MOST}")
    return value


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"({text}) must be a port")
    return value


if __name__ == "__main__":
    sys.exit(main())
