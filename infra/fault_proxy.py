"""A proxy in front of a real HTTP server that injects faults: for tests and drills.

``decide`` sees every request and names a fault or None. The faults are those of a real network and a real store: an
error instead of an answer (the server never saw the request), an answer lost after the server acted, a body cut before
the promised length, a body that is shorter with a length that agrees.
"""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

__all__ = ["Decide", "Fault", "fault_proxy"]

Fault = Literal["409", "429", "503", "lost_reply", "cut_body", "short_body"]
Decide = Callable[[str, str], Fault | None]
"""(method, path with query) -> the fault to inject, or None; called once a request, from many threads."""

_CODES = {"409": "ConditionalRequestConflict", "429": "SlowDown", "503": "ServiceUnavailable"}


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    target: str
    decide: staticmethod  # type: ignore[type-arg]

    def _forward(self) -> None:
        body = self._body()
        fault: Fault | None = self.decide(self.command, self.path)
        if fault in _CODES:
            text = f"<Error><Code>{_CODES[fault]}</Code><Message>injected</Message></Error>".encode()
            self._answer(int(fault), [("Content-Type", "application/xml")], len(text), b"" if self.command == "HEAD" else text)
            return
        with closing(http.client.HTTPConnection(self.target, timeout=60)) as server:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host as it came: it is part of the S3 signature
                if name.lower() not in ("transfer-encoding", "content-length", "connection", "expect"):
                    server.putheader(name, value)
            server.putheader("Content-Length", str(len(body)))
            server.endheaders(body)
            reply = server.getresponse()
            data = reply.read()
        if fault == "lost_reply":
            self.close_connection = True
            return
        headers = [(n, v) for n, v in reply.getheaders() if n.lower() not in ("transfer-encoding", "content-length", "connection")]
        length = int(reply.headers.get("Content-Length", len(data)))
        if fault == "cut_body":
            data, self.close_connection = data[: len(data) // 2], True
        if fault == "short_body":
            data, length = data[: len(data) // 2], len(data) // 2
        self._answer(reply.status, headers, length, data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, headers: list[tuple[str, str]], length: int, data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _forward

    def log_message(self, *args: object) -> None:
        """Keep quiet: the test that injects a fault reports it."""


@contextmanager
def fault_proxy(target_url: str, decide: Decide) -> Iterator[str]:
    """Run the proxy on a free loopback port; yields its address.

    Args:
        target_url: the real server, http://host:port.
        decide: which request gets which fault.
    """
    handler = type("Handler", (_Proxy,), {"target": urlsplit(target_url).netloc, "decide": staticmethod(decide)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="fault-proxy")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
