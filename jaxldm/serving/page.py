"""The page at `/`: a file of HTML, one of CSS and two ES modules, as they are in the package."""

from __future__ import annotations

import importlib.resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/server.js": "server.js"}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
# Nothing is loaded from elsewhere, nothing runs that is not in the module, and no other site shows the page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The routes of the page, which need no token: the page asks for it, and has nothing to hide."""
    folder = importlib.resources.files("jaxldm.serving") / "static"
    return [_route(path, name, (folder / name).read_bytes()) for path, name in FILES.items()]


def _route(path: str, name: str, content: bytes) -> Route:
    kind = KINDS[name.rpartition(".")[2]]

    async def answer(request: Request) -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    return Route(path, answer)
