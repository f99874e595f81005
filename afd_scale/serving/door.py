"""Who may come in: by token, by the name that the server was called by, and with how much."""

import asyncio
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afd_scale.config import ConfigError, one_line
from afd_scale.config.errors import shown
from afd_scale.files import system_errors

SHORTEST_TOKEN = 16
MOST_BODY_BYTES = 64 * 1024  # of a request; prompts are all that is sent
_BODY_SECONDS = 20.0
_CODES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
          500: "server_error", 503: "server_error"}  # fmt: skip
_OPEN = ("/", "/healthz")  # paths without a secret


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None, variable: str | None) -> str | None:
    """The token that a file holds, or an environment variable; None where neither is named.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    if file is not None and variable is not None:
        raise ConfigError(f"token_env ({variable}) must not come with token_file: there is one token")
    if file is None and variable is None:
        return None
    if file is not None:
        field = f"token_file ({file})"
        with system_errors(f"{field} must be readable"):
            content = file.read_bytes()[:4096]
        token = content.decode(errors="replace").strip()
    else:
        field = f"token_env ({variable})"
        token = os.environ.get(variable or "", "").strip()
    if not re.fullmatch(rf"[!-~]{{{SHORTEST_TOKEN},1024}}", token):
        raise ConfigError(f"{field} must hold a token: {SHORTEST_TOKEN} to 1024 letters, digits or signs, no blanks")
    return token


@dataclass(frozen=True)
class Door:
    """Lets in who may.

    Attributes:
        token: that they must have; None lets in all who reach the server, and those are of this machine.
    """

    token: str | None = None

    @classmethod
    def at(cls, host: str, token: str | None) -> "Door":
        """For an address to listen at.

        Raises:
            ConfigError: others reach it, and there is no token.
        """
        if token is None and not is_loopback(host):
            raise ConfigError(f"host ({shown(host)}) must come with token_file or token_env: others than this machine "
                              "reach it")  # fmt: skip
        return cls(token)

    def knows(self, token: str | None) -> bool:
        """Whether a token is the right one, in a time that says nothing of it."""
        return self.token is None or hmac.compare_digest((token or "").encode(), self.token.encode())

    def refusal(self, headers: Mapping[str, str]) -> str | None:
        """Why a request may not come in whatever it asks for; None lets it.

        A browser lets any page open a connection to this machine. It says which page, and by which name it called.
        """
        host = headers.get("host", "")
        if self.token is None and not is_loopback(_name_of(host)):
            return f"host ({shown(host)}) must be this machine: without a token no other name is served"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return f"origin ({shown(origin)}) must be this server: pages of others may not ask for videos"
        return None


class Entrance:
    """The app behind a door: requests that may come in, with bodies of a bounded size that come in time."""

    def __init__(self, app: ASGIApp, door: Door):
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.door.refusal(headers)
        if scope["type"] == "websocket":
            if refusal is not None:
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": refusal[:120]})
                return
            await self.app(scope, receive, send)
            return
        answer = None
        if refusal is not None:
            answer = said(403, refusal)
        elif scope["path"] not in _OPEN and not self.door.knows(_bearer(headers.get("authorization", ""))):
            answer = said(401, "token: this server wants one, as `Authorization: Bearer ...`")
        elif not _is_bounded(headers.get("content-length", "0")):
            answer = said(413, _TOO_LARGE)
        await (answer or self.app)(scope, _bounded(receive), send)


def said(status: int, message: object, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as the videos API says it, in one line."""
    code = _CODES.get(status, "invalid_request_error")
    return JSONResponse({"error": {"message": one_line(message), "type": code, "code": code}}, status, headers)


_TOO_LARGE = f"body: it must have at most {MOST_BODY_BYTES} bytes"


def _is_bounded(length: str) -> bool:
    return bool(re.fullmatch(r"\d{1,9}", length)) and int(length) <= MOST_BODY_BYTES


def _bounded(receive: Receive) -> Receive:
    """The same body, as long as it is not too long, nor too slow."""
    total, whole = 0, False
    ends = asyncio.get_running_loop().time() + _BODY_SECONDS

    async def receive_some() -> Message:
        nonlocal total, whole
        if whole:  # what is waited for now is that the client goes
            return await receive()
        try:
            async with asyncio.timeout_at(ends):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"body: it must come within {_BODY_SECONDS:g} s") from None
        total += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if total > MOST_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return receive_some


def _bearer(header: str) -> str:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _name_of(host: str) -> str:
    """Of a Host header, without the port."""
    return re.sub(r":\d+$", "", host)
