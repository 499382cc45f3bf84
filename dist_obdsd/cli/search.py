"""``dist-obdsd search`` and ``serve``: images of a folder that are like one."""

import argparse
import base64
import io
import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

import dist_obdsd
from dist_obdsd.cli.output import check_writable, show
from dist_obdsd.data.images import decode
from dist_obdsd.errors import InputError
from dist_obdsd.files import write_atomically
from dist_obdsd.search_index import SearchIndex

THUMBNAIL = 256  # longer side in pixels
LARGEST = 64 * 2**20  # bytes of an uploaded file


def search(options: argparse.Namespace) -> int:
    """Print the images of a gallery that are most like each query."""
    check_writable(options.html)
    index = _open(options)
    results = []
    for query in options.query:
        # One more, since a query that lies in the gallery finds itself.
        matches = index.search(query, options.top + 1)
        matches = [match for match in matches if not index.files[match.path].samefile(query)][: options.top]
        lines = [f"  {match.cosine:7.4f}  {match.path}" for match in matches]
        show("\n".join([str(query), "   cosine  image", *lines]))
        if options.html is not None:
            found = [match._asdict() | {"image": _inlined(index.files[match.path])} for match in matches]
            results.append({"query": str(query), "image": _inlined(query), "matches": found})
    if options.html is not None:
        write_atomically(options.html, _page(index, results, live=False).encode())
        show(f"page: {options.html}")
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serve a page that shows the neighbours of a photo dropped on it, until Ctrl-C."""
    import uvicorn

    app = build_app(_open(options), options.top)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((options.host, options.port))
            listening.listen()
        except (OSError, OverflowError) as error:
            where, reason = f"{options.host}:{options.port}", str(getattr(error, "strerror", None) or error).rstrip(".")
            raise InputError(f"cannot listen at {where}: {reason}; choose another --host or --port") from error
        host, port = listening.getsockname()
        show(f"open http://{host}:{port} in a browser; Ctrl-C ends")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    return 0


def build_app(index: SearchIndex, top: int) -> Any:
    """Make the web application: the page, the search and the thumbnails."""
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, JSONResponse, Response

    app = FastAPI(openapi_url=None)

    @app.exception_handler(InputError)
    def refuse(request: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=400)

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(_page(index, [], live=True))

    @app.post("/search")
    async def find(request: Request, class_name: str = "") -> dict[str, Any]:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > LARGEST:
                raise InputError(f"the file has more than {LARGEST >> 20} MiB; make the image smaller")
        return {"matches": await run_in_threadpool(answer, bytes(data), class_name)}

    def answer(data: bytes, class_name: str) -> list[dict[str, Any]]:
        index.refresh()
        matches = index.search(data, top, class_name or None)
        return [match._asdict() | {"image": f"image/{quote(match.path)}"} for match in matches]

    @app.get("/image/{path:path}")
    def image(path: str) -> Response:
        if path not in index.files:
            raise InputError("there is no such image in the gallery")
        return Response(_thumbnail(index.files[path]), media_type="image/jpeg")

    return app


def _open(options: argparse.Namespace) -> SearchIndex:
    if options.top < 1:
        raise InputError(f"--top is {options.top}; give the number of images to find, 1 or more")
    index = SearchIndex(dist_obdsd.load(options.checkpoint), options.gallery, options.index)
    show(f"{options.gallery}: {len(index.paths)} images, embeddings in {index.file}")
    return index


def _page(index: SearchIndex, results: list[dict[str, Any]], live: bool) -> str:
    about = f"{len(index.paths):,} images of {index.gallery}, by the cosine of their embeddings"
    data = json.dumps({"about": about, "classes": index.classes, "results": results, "live": live})
    template = Path(__file__).with_name("search.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", data.replace("<", "\\u003c"))


def _inlined(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(_thumbnail(path)).decode()}"


def _thumbnail(path: Path) -> bytes:
    """Return a small JPEG of any image that can be embedded."""
    try:
        image = Image.fromarray(decode(path.read_bytes(), 3).permute(1, 2, 0).contiguous().numpy())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be shown: {error}") from error
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()
