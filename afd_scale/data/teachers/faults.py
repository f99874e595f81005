"""Whose fault it is that a server refuses: that decides what becomes of the job, not the status alone."""

import re
from enum import Enum, auto


class Fault(Enum):
    ACCOUNT = auto()  # key, model, money: every request would be answered alike
    PROMPT = auto()  # the next one may be taken
    BUSY = auto()  # it was not taken, and another attempt may help
    UNCLEAR = auto()  # what is behind whoever answered may go on


_PROMPT = re.compile(
    r"moderation|polic(y|ies)\b|safety|sensitive|nsfw|prohibited|violat|content.?filter|risk.?detect|flagged|unsafe"
    r"|responsible.ai|the prompt|your prompt",
    re.IGNORECASE,
)
_MONEY = (
    r"balance|\bcredits?\b(?!.card)|overdue|arrears|payment|funds|hard.limit|set.?limit|quota.?exceeded|insufficient"
)
_UNPAID = re.compile(_MONEY, re.IGNORECASE)
_ACCOUNT = re.compile(rf"{_MONEY}|quota|billing|api.?key", re.IGNORECASE)
_CLOSED = re.compile(
    r"\b(account|user|organi[sz]ation|project)\b.{0,40}(suspended|deactivated|disabled|locked|blocked)", re.IGNORECASE
)
_GIVEN_BACK = re.compile(r"refund", re.IGNORECASE)  # of one video; there is money


def fault_of(status: int, said: str) -> Fault:
    """Whose fault an answer to a request for a video is.

    Args:
        status: of HTTP, 300 or more.
        said: by the server, nothing of the prompt in it.
    """
    if status in (401, 402) or (status == 403 and _CLOSED.search(said)):
        return Fault.ACCOUNT
    if status in (408, 409) or status >= 500:
        return Fault.BUSY if status == 503 else Fault.UNCLEAR
    if status in (425, 429):  # "quota" and "billing" are words of rates, too
        return Fault.ACCOUNT if _UNPAID.search(said) else Fault.BUSY
    if _PROMPT.search(said):
        return Fault.PROMPT
    if _ACCOUNT.search(said):
        return Fault.ACCOUNT
    return Fault.PROMPT if status in (400, 413, 422) else Fault.ACCOUNT


def is_unpaid(said: str) -> bool:
    """Whether a video ended because the account is empty."""
    return bool(_ACCOUNT.search(said)) and not _PROMPT.search(said) and not _GIVEN_BACK.search(said)
