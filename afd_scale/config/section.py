"""The base of every config section, and how its errors read."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from afd_scale.config.errors import shown

# Axes and batches: a million is beyond all machines, and computing with more takes for ever.
Size = Annotated[int, Field(gt=0, le=2**20)]


class Section(BaseModel):
    """Frozen, strict about unknown keys, documented field by field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def first_problem(error: ValidationError, keys: str = ": see the sections in afd_scale/config") -> str:
    """The first problem as `field (value), rule`; our own rules already read so.

    Args:
        keys: what is added where one is unknown.
    """
    problem = error.errors()[0]
    # A tagged union puts its tag into the location, which is no part of the written key; a judge's own name may be one.
    tags, parts = {"conv", "latent", "vlm", "http", "motion"}, problem["loc"]
    field = ".".join(
        shown(part) for before, part in zip(("", *parts), parts) if part not in tags or before == "judges"
    )  # fmt: skip
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{field} ({shown(problem['input'])}) is not a known key{keys}{more}"
    if problem["type"] == "missing":
        return f"{field} must be given: it has no default{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{field}.{message}{more}" if field else f"{message}{more}"
    return f"{field} ({shown(problem['input'])}): {message[0].lower()}{message[1:]}{more}"
