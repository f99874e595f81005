"""What the command lines of tools share."""

import argparse
import math
from typing import NoReturn

from afd_scale.config.errors import one_line


class Parser(argparse.ArgumentParser):
    """Bad usage in one line, like all other bad input; the description is printed as it stands."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}\n")


def count(text: str) -> int:
    """The type of an option that is a number of things, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"({text}) must be at least 1")
    return value


def positive(text: str) -> float:
    """The type of an option that is a positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"({text}) must be a positive number")
    return value
