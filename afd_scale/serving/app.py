"""What the server answers: the page, streams over websockets, and the videos API."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from afd_scale.files import checked, checked_json
from afd_scale.serving.door import Door, Entrance, said
from afd_scale.serving.hall import Hall
from afd_scale.serving.line import FullError, Line
from afd_scale.serving.shelf import Asked, Shelf, Video
from afd_scale.serving.studio import Studio
from afd_scale.serving.viewer import Limits

_ASKED = TypeAdapter(Asked)
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
}  # fmt: skip


class App:
    """The handlers, and what they share."""

    def __init__(self, studio: Studio, line: Line, shelf: Shelf, door: Door, limits: Limits):
        self.studio, self.line, self.shelf, self.door, self.limits = studio, line, shelf, door, limits
        self.hall = Hall(studio, line, door, limits)
        self._page = files("afd_scale.serving").joinpath("page.html").read_text(encoding="utf-8")

    def starlette(self) -> Starlette:
        """The whole app, behind its door; the line closes with it."""
        routes = [
            Route("/", self.page),
            Route("/healthz", self.health),
            Route("/v1/server", self.server),
            Route("/v1/videos", self.create, methods=["POST"]),
            Route("/v1/videos/{video_id}", self.look, methods=["GET"]),
            Route("/v1/videos/{video_id}", self.remove, methods=["DELETE"]),
            Route("/v1/videos/{video_id}/content", self.content),
            WebSocketRoute("/v1/stream", self.watch),
        ]

        @asynccontextmanager
        async def until_stopped(app: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.line.close)

        handlers: Any = {HTTPException: _refused, ValueError: _bad_input, FullError: _full, ClientDisconnect: _gone,
                         Exception: _failed}  # fmt: skip
        return Starlette(routes=routes, middleware=[Middleware(Entrance, door=self.door)], lifespan=until_stopped,
                         exception_handlers=handlers)  # fmt: skip

    # -- the page -----------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"ok": True, "wants_token": self.door.token is not None})

    async def server(self, request: Request) -> Response:
        """What the page says of the student, and how busy it is."""
        pixels, studio = self.studio.pixels, self.studio
        return JSONResponse({
            "name": studio.name, "device": studio.device_name, "width": pixels.width, "height": pixels.height,
            "fps": pixels.fps, "chunk_frames": studio.chunk_frames, "examples": studio.examples,
            "viewers": self.hall.viewers, "most_viewers": self.limits.viewers, "waiting": self.line.waiting,
            "is_free": self.line.is_free,
        })  # fmt: skip

    async def watch(self, socket: WebSocket) -> None:
        await self.hall.serve(socket)

    # -- the videos API -----------------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        """Ask for a video, by a form or JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            asked = checked_json(await request.body(), _ASKED)
        elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            async with request.form(max_files=0, max_fields=16) as form:
                if len({*form}) != len(form.multi_items()):
                    raise ValueError("a field of the form is given twice")
                asked = checked(dict(form), _ASKED)
        else:
            raise HTTPException(415, f"content-type ({kind[:100]}) must be multipart/form-data or application/json")
        key = request.headers.get("idempotency-key")
        if key is not None and len(key) > 200:
            raise ValueError("idempotency-key: it must have at most 200 signs")
        return JSONResponse(self.shelf.state(self.shelf.ask(asked, key)))

    async def look(self, request: Request) -> Response:
        """How a video stands."""
        return JSONResponse(self.shelf.state(self._video(request)))

    async def remove(self, request: Request) -> Response:
        """Take a video away."""
        video = self._video(request)
        self.shelf.remove(video)
        return JSONResponse({"id": video.video_id, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        """A finished video."""
        video = self._video(request)
        if video.status != "completed":
            raise HTTPException(409, f"video ({video.video_id}) must be completed: it is {video.status}")
        return FileResponse(video.path, media_type="video/mp4")

    def _video(self, request: Request) -> Video:
        video = self.shelf.find(request.path_params["video_id"])
        if video is None:
            raise HTTPException(404, "there is no such video, or it is no longer kept")
        return video


async def _refused(request: Request, error: HTTPException) -> Response:
    return said(error.status_code, error.detail, error.headers)


async def _bad_input(request: Request, error: ValueError) -> Response:
    return said(400, error)


async def _full(request: Request, error: FullError) -> Response:
    return said(429, error, {"Retry-After": "2"})


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return said(400, "body: it ended early")  # nobody hears it


async def _failed(request: Request, error: Exception) -> Response:
    return said(500, "the server failed: its log says why")
