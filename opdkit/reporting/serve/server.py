"""`opdkit report --serve`: the runs of a folder in a browser of this machine, while they are written and after.

Loopback only, and nothing is answered without the random token that is in the printed address. The host that a request
names must be this machine's, so that no page of a stranger reaches it under a name of its own (DNS rebinding). It only
reads, and only run folders that it found itself: no part of an address is ever joined to a path.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from opdkit.errors import UserError
from opdkit.reporting.figures.series import NUM_COLOURS
from opdkit.reporting.serve.runs import Made, Runs

HOST = "127.0.0.1"
SECONDS = 20.0  # for one request's lines to arrive
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # beside the page's own; this part must be in a header
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def serve(folder: Path, port: int, say: Callable[[str], None]) -> None:
    """Until Ctrl-C. port 0: any that is free. Raises UserError for a folder without runs and a port that is taken."""
    with open_server(folder, port) as server:
        say(f"the runs of {folder} are at {server.address} (Ctrl-C to stop)")
        server.serve_forever(poll_interval=0.2)


def open_server(folder: Path, port: int) -> Server:
    runs = Runs(folder)
    try:
        return Server(runs, port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--port {port}: {why}; give another, or 0 for any that is free") from None


class Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET

    def __init__(self, runs: Runs, port: int) -> None:
        self.runs, self.token = runs, secrets.token_urlsafe(24)
        super().__init__((HOST, port), _Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a browser that goes away in the middle of a page is no fault."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS
    server_version, sys_version = "opdkit", ""

    def do_GET(self) -> None:
        self._answer(with_text=True)

    def do_HEAD(self) -> None:
        """The page's mark without the page: a page asks by it whether it is still true."""
        self._answer(with_text=False)

    def _answer(self, *, with_text: bool) -> None:
        if self.headers.get("Host", "") not in self.server.hosts:
            return self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to its own address only")
        address = urlsplit(self.path)
        parts = address.path.split("/")
        token, rest = "".join(parts[1:2]), parts[2:]
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return self._refuse(HTTPStatus.FORBIDDEN, "open the address that `opdkit report --serve` printed")
        try:
            made = self._find(rest, address.query)
        except UserError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        if made is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        self.send_response(HTTPStatus.OK)
        self._finish(made.text, "text/html; charset=utf-8", {"ETag": f'"{made.mark}"'}, with_text=with_text)

    def _find(self, rest: list[str], query: str) -> Made | None:
        runs = self.server.runs
        if rest == [""]:
            return runs.index()
        if rest == ["compare"]:
            names = parse_qs(query, max_num_fields=100).get("run", [])
            if len(names) > NUM_COLOURS:
                raise UserError(f"{len(names)} runs are more than the {NUM_COLOURS} colours of a page")
            return runs.several(names)
        if len(rest) == 3 and rest[0] == "run" and not rest[2]:
            return runs.run(unquote(rest[1]))
        return None

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is no request, or of another method: without its words."""
        self._refuse(HTTPStatus(code), HTTPStatus(code).phrase)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.send_response(status)
        self._finish(
            f"{why}\n".encode(), "text/plain; charset=utf-8", {}, with_text=getattr(self, "command", "") != "HEAD"
        )

    def _finish(self, text: bytes, kind: str, more: dict[str, str], *, with_text: bool) -> None:
        for name, value in {**HEADERS, **more, "Content-Type": kind, "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_text:
            self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: an address holds the token, and requests are a stranger's words."""
