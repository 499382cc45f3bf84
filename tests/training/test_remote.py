"""Shards behind a URL, through the command line."""

import functools
import http.server
import threading

from tests import runs


def test_shards_behind_a_url_train_the_same(folder, shards):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        runs.train(folder, f"data.shards={url}", "name=remote", ranks=2)
        missing = runs.train(folder, f"data.shards={url}/nothing", "name=missing", code=2)
        server.shutdown()
        thread.join()
    runs.train(folder, "name=local", ranks=2)
    remote, local = (runs.metrics(folder / "runs" / name, "step") for name in ("remote", "local"))
    assert [row["ranking"] for row in remote] == [row["ranking"] for row in local]
    assert "/nothing/manifest.json" in missing.stderr
    assert "Traceback" not in missing.stderr
