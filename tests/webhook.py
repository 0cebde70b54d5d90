"""An incoming webhook, as a chat provides it: a real server that keeps what is posted."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET_PATH = "/services/planted-webhook"


@dataclass
class Webhook:
    """The address, and the texts that were posted to it."""

    url: str = ""
    status: int = 200
    """What it answers."""
    texts: list[str] = field(default_factory=list)


@contextmanager
def webhook() -> Iterator[Webhook]:
    """Serve a webhook inside a block."""
    hook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == SECRET_PATH
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.texts.append(json.loads(body)["text"])
            self.send_response(hook.status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hook.url = f"http://127.0.0.1:{server.server_port}{SECRET_PATH}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hook
    finally:
        server.shutdown()
        server.server_close()
