"""What the command lines of tools share."""

import argparse
from typing import NoReturn

from afd_scale.config.errors import one_line


class Parser(argparse.ArgumentParser):
    """Bad usage in one line, like all other bad input; the description is printed as it stands."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}\n")
