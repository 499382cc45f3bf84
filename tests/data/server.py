"""A web server on this machine that fails in the ways that servers and networks do."""

import base64
import http.server
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Server:
    """Files of a folder under ``url``, and what it does instead: a list per name, one entry per request."""

    folder: Path
    url: str = ""
    ranges: bool = True
    """Whether a part of a file can be asked for."""
    faults: dict[str, list[object]] = field(default_factory=lambda: defaultdict(list))
    """An integer below 100 cuts the transfer after that many percent, a larger one is the status; bytes are sent in
    place of the file; a text is a URL to go to; a function is called with the name after half of the file."""
    login: str = ""
    """USER:PASSWORD that is asked for."""
    requests: list[tuple[str, int]] = field(default_factory=list)
    """(name, first byte) of each; a question mark is added to the name where only a part was asked for."""

    def count(self, name: str) -> int:
        return sum(requested == name for requested, _ in self.requests)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.lstrip("/").partition("?")[0]
            asked = self.headers.get("Range")
            first, _, last = (asked.removeprefix("bytes=") if asked and server.ranges else "0-").partition("-")
            start = int(first)
            server.requests.append((name + "?" * bool(last), start))
            fault = server.faults[name].pop(0) if server.faults[name] else None
            path = server.folder / name
            given = self.headers.get("Authorization", "Basic ").removeprefix("Basic ")
            if server.login and base64.b64decode(given).decode() != server.login:
                self.send_error(401)
            elif isinstance(fault, str):
                self.send_response(302)
                self.send_header("Location", fault)
                self.end_headers()
            elif (isinstance(fault, int) and fault >= 100) or not path.is_file():
                self.send_error(fault if isinstance(fault, int) else 404)
            else:
                data = fault if isinstance(fault, bytes) else path.read_bytes()
                self.send_response(206 if start or last else 200)
                if last:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                data = data[: int(last) + 1] if last else data
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.send_body(data, start, fault)

        def send_body(self, data: bytes, start: int, fault: object) -> None:
            if callable(fault):
                self.wfile.write(data[start : len(data) // 2])
                self.wfile.flush()
                fault(self.path.lstrip("/"))
                start = max(start, len(data) // 2)
            self.wfile.write(data[start : len(data) * fault // 100 if isinstance(fault, int) else len(data)])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asks may hang up early
        server.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            running.shutdown()
            thread.join()
