"""Whose fault it is that a server refuses: its words before its status, for APIs agree on neither."""

import re
from enum import Enum, auto


class Fault(Enum):
    ACCOUNT = auto()  # key, model, money: every request would be answered alike
    PROMPT = auto()  # the next one may be taken
    BUSY = auto()  # it was not taken, and another attempt may help
    UNCLEAR = auto()  # what is behind whoever answered may go on


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_PROMPT = _words(
    r"moderat|sensitive|nsfw|flagged|unsafe|safety|inappropriate|risk.?detect|responsible.ai|content.?(filter|polic)",
    r"\b(the|your|this) (prompt|input)",
)
_RULES = _words(r"polic(y|ies)\b|prohibited|violat")  # of contents, or of an organisation
_UNPAID = _words(
    r"balance(?!r)|credits?(?![a-z]|.card)|overdue|arrears|payment|funds\b|billing|\btop.?up|recharge",
    r"(hard|set|spend\w*|usage).?limit|quota.{0,12}(exceed|exhaust|used)|exceed\w*.{0,20}quota|insufficient.?quota",
)
_ACCOUNT = _words(
    r"quota|api.?key|permission|model.{0,60}(not.?(found|exist|open)|deprecated)",
    r"\b(account|user|organi[sz]ation|project)\b.{0,40}(suspended|deactivated|disabled|locked|blocked)",
)
_RATE = _words(
    r"rate.?limit|too many|throttl|per.?(sec|min|hour|day)|concurren|(try|retry).{0,9} in",
    r"(?<![a-z])[rt]p[smd](?![a-z])",
)
_GIVEN_BACK = _words(r"refund|returned|not.{0,9}charged|no charge")  # of one video; there is money


def fault_of(status: int, said: str) -> Fault:
    """Whose fault an answer to a request for a video is.

    Args:
        status: of HTTP; of a success, where it says that something went wrong.
        said: by the server, nothing of the prompt in it.
    """
    if status in (401, 402):
        return Fault.ACCOUNT
    if status in (425, 429):  # "quota" and "billing" are words of rates, too
        return Fault.ACCOUNT if is_unpaid(said) and not _RATE.search(said) else Fault.BUSY
    if status in (408, 409) or (status >= 500 and status != 501):
        unclear = Fault.BUSY if status == 503 else Fault.UNCLEAR
        return Fault.ACCOUNT if is_unpaid(said) else unclear
    if _PROMPT.search(said):
        return Fault.PROMPT
    if _UNPAID.search(said) or _ACCOUNT.search(said):
        return Fault.ACCOUNT
    return Fault.PROMPT if status in (400, 413, 422) or _RULES.search(said) else Fault.ACCOUNT


def is_unpaid(said: str) -> bool:
    """Whether there is no money, in what a server says of a video or of all."""
    return bool(_UNPAID.search(said)) and not _PROMPT.search(said) and not _GIVEN_BACK.search(said)
