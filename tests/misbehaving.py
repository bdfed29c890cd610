"""What must be survived: a local HTTP server that answers as a script says, careless functions."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# status, headers, body (bytes, or JSON), seconds before the answer
Answer = tuple[int, dict[str, str], Any, float]
Script = Callable[[int, dict[str, Any]], Answer]


def good(text: str = "fine", **choice: Any) -> Answer:
    """A chat completion as servers give it."""
    body = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }
    body["choices"][0] |= choice
    return 200, {}, body, 0.0


class Log:
    """What a server was asked: (path, headers, body) of each request, and how many at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()


@contextlib.contextmanager
def server(script: Script) -> Iterator[tuple[str, Log]]:
    """Address (ending in /v1) and log of a server whose n-th request is answered by `script(n)`."""
    log = Log()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(raw) if raw else {}
            with log.lock:
                number = len(log.asked)
                log.asked.append((self.path, dict(self.headers), body))
                log.now += 1
                log.most = max(log.most, log.now)
            status, headers, answer, wait = script(number, body)
            time.sleep(wait)
            with log.lock:
                log.now -= 1
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}/v1", log
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def careless() -> float:
    """As a reward of a user's own may be written; here it is told to end meanwhile."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except Exception:
        return 0.0
    return 1.0
