"""The live page at `/`: its files, as they lie in this folder, read once and served without a key.

    browser ◀─ GET /, /page/… ─ these files
    browser ─ with the key ─▶ /status, /replicas, /runs, /runs/current and what is below it

They hold no data, and ask no other host for anything: the policy below has the browser enforce it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import FastAPI, Request, Response

_FOLDER = Path(__file__).parent
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
_NEEDS_KEY = b' data-key="needed"'
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask each time: a trainer that was updated has another page
}


@dataclass(frozen=True, slots=True)
class PageFile:
    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'


def page_files(*, needs_key: bool) -> Mapping[str, PageFile]:
    """By the path under which each is served. The page is told whether to ask for a key first."""
    files = {
        f"/page/{path.relative_to(_FOLDER)}": PageFile(path.read_bytes(), media_type)
        for path in sorted(_FOLDER.rglob("*"))
        if (media_type := _MEDIA_TYPES.get(path.suffix))
    }
    index = files.pop("/page/index.html")
    if not needs_key:
        assert _NEEDS_KEY in index.content
        index = replace(index, content=index.content.replace(_NEEDS_KEY, b""))
    return {"/": index, **files}


def serve_page(app: FastAPI, files: Mapping[str, PageFile]) -> None:
    async def file(request: Request) -> Response:
        found = files[request.url.path]
        headers = {**_HEADERS, "ETag": found.etag}
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=headers)
        return Response(found.content, media_type=found.media_type, headers=headers)

    for path in files:
        app.add_api_route(path, file, include_in_schema=False, methods=["GET", "HEAD"])
