"""The page to chat on and the one with statistics, as they were built: files, headers, and who gets them.

Knows HTTP, nothing of models: the page is a client of the same routes as every other. Sources and how they are built:
server/web. Invariant: what is served runs no script and loads no file but its own, whatever a model has written.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

DIST = Path(__file__).parent / "web" / "dist"
# data: for the images that a user attaches
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, but sent only when changed
}


class _Assets(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_assets(app: FastAPI) -> None:
    """Serve what the page is made of."""
    app.mount("/assets", _Assets(directory=DIST / "assets"))


def wants_page(request: Request) -> bool:
    """Whether a browser asks: it says that it reads HTML, and other clients do not."""
    return "text/html" in request.headers.get("accept", "")


def page() -> Response:
    """The page itself. Which of its two faces it shows, it sees from its address."""
    return FileResponse(DIST / "index.html", headers={**HEADERS, "Vary": "Accept"})
