"""Whether there is a C compiler: inductor and Triton make code that they have it translate."""

import os
import shutil


def has_c_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
