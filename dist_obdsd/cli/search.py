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
from dist_obdsd.data.image_folder import find_images
from dist_obdsd.data.images import decode
from dist_obdsd.errors import InputError, require
from dist_obdsd.files import read_file, write_atomically
from dist_obdsd.search_index import SearchIndex

THUMBNAIL, PHOTO = 256, 2048  # longer side in pixels, at most
LARGEST = 64 * 2**20  # bytes of an uploaded file


def search(options: argparse.Namespace) -> int:
    """Print the images of a gallery that are most like each query."""
    check_writable(options.html)
    for query in options.query:  # before all that takes time
        _picture(query)
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

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((options.host, options.port))
            listening.listen()
        except (OSError, OverflowError) as error:
            where, reason = f"{options.host}:{options.port}", str(getattr(error, "strerror", None) or error).rstrip(".")
            raise InputError(f"cannot listen at {where}: {reason}; choose another --host or --port") from error
        app = build_app(_open(options), options.top)
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
    async def find(request: Request, class_name: str | None = None) -> dict[str, Any]:
        size = int(request.headers.get("content-length", 0))
        if size > LARGEST or "transfer-encoding" in request.headers:  # of unknown size
            raise InputError(f"send an image of at most {LARGEST >> 20} MiB, and its size (Content-Length) before it")
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            uploads = [value for value in (await request.form()).values() if not isinstance(value, str)]
            data = await uploads[0].read() if uploads else b""
        else:
            data = await request.body()
        if not data:
            raise InputError("no image came; send an image file as the request's body or as a file of a form")
        return {"matches": await run_in_threadpool(answer, data, class_name)}

    def answer(data: bytes, class_name: str | None) -> list[dict[str, Any]]:
        index.refresh()
        if class_name is not None and class_name not in index.classes:
            raise InputError(f"the gallery has no class {class_name!r}; its classes are its subfolders")
        matches = index.search(data, top, class_name)
        return [match._asdict() | {"image": f"image/{quote(match.path)}"} for match in matches]

    @app.get("/image/{path:path}")
    def image(path: str, large: bool = False) -> Response:
        if path not in index.files:
            raise InputError("there is no such image in the gallery")
        return Response(_jpeg(index.files[path], PHOTO if large else THUMBNAIL), media_type="image/jpeg")

    return app


def _open(options: argparse.Namespace) -> SearchIndex:
    require("--top", options.top, options.top > 0, "the number of images to find, 1 or more")
    check_writable(options.index)
    find_images(options.gallery)
    index = SearchIndex(dist_obdsd.load(options.checkpoint), options.gallery, options.index)
    show(f"{options.gallery}: {_count(index)}; embeddings in {index.file}")
    return index


def _count(index: SearchIndex) -> str:
    return f"{len(index.paths):,} images" + (f", {index.left_out:,} left out" if index.left_out else "")


def _page(index: SearchIndex, results: list[dict[str, Any]], live: bool) -> str:
    about = f"{index.gallery}: {_count(index)}; the numbers are cosines of embeddings"
    data = json.dumps({"about": about, "classes": index.classes, "results": results, "live": live})
    template = Path(__file__).with_name("search.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", data.replace("<", "\\u003c"))


def _inlined(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(_jpeg(path, THUMBNAIL)).decode()}"


def _picture(path: Path) -> Image.Image:
    try:
        return Image.fromarray(decode(read_file(path), 3).permute(1, 2, 0).contiguous().numpy())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _jpeg(path: Path, side: int) -> bytes:
    """Return a JPEG, of at most this side, of any image that can be embedded."""
    image, stream = _picture(path), io.BytesIO()
    image.thumbnail((side, side))
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()
