"""Errors of bad input: one line each, whatever the input was."""

_LONGEST = 2000  # characters of a line
_LONGEST_VALUE = 200  # of a value in it


class ConfigError(ValueError):
    """One line: field (value), rule, reason; what is given is made one."""

    def __init__(self, message: object):
        super().__init__(one_line(message))


class LostInputError(Exception):
    """What one rank alone meets, input that can no longer be read or ranks that do not come; one line as above."""

    def __init__(self, message: object):
        super().__init__(one_line(message))


def one_line(error: object, longest: int = _LONGEST) -> str:
    """What an error says, whatever is in it: printable, without line breaks, a long middle left out."""
    text = " ".join(str(error).split())
    if not text.isprintable():
        text = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} ... {text[-(longest // 2) :]}"


def shown(value: object) -> str:
    """A value as an error names it."""
    return one_line(value, _LONGEST_VALUE)
