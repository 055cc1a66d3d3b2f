"""JSON over HTTP to a server of models: asked again where that can help, bounded in time, in size and in number.

Only the address that the user gave is asked, and no redirection is followed. One connection a request: beside the
forward pass behind it a connection costs nothing, and none is ever stale. A key is read from the environment variable
`VLLM_API_KEY` (as vLLM reads it) and is neither kept nor said; a server that opdkit started has one of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from opdkit.errors import UserError

KEY_VARIABLE = "VLLM_API_KEY"
MOST_BYTES = 1 << 30  # of one answer
MOST_SAID = 300  # characters of a server's own words in a sentence
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may better
CHUNK = 1 << 20
K = TypeVar("K")
R = TypeVar("R")


class Sink(Protocol):
    """Takes an answer part by part. `end` raises HalfError for one that is not whole."""

    def feed(self, part: bytes) -> None: ...

    def end(self) -> None: ...


S = TypeVar("S", bound=Sink)


class Refused(UserError):
    """The server understood, and will not: a status that asking again does not better."""

    def __init__(self, sentence: str, status: int = 0, said: str = "") -> None:
        super().__init__(sentence)
        self.status, self.said = status, said


class Unreachable(UserError):
    """No whole answer came: nobody listens, the line broke, the time was over, or the server failed again and again."""


class Client:
    """One server. Safe to use from many threads.

    patience_s  how long one request is tried again where no whole answer comes (429, 5xx, half an answer, nobody there)
    timeout_s   how long one try may take
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "url",
        timeout_s: float = 3600.0,
        patience_s: float = 60.0,
        most: int = MOST_BYTES,
        token: str | None = None,
    ) -> None:
        """key: of the recipe or the command line, for messages. token: what the server asks for; None: as the
        environment says. Raises UserError for what is no address."""
        self._token = token
        self.url, self._host, self._port, self._prefix, self._is_tls = _parts(url, key)
        self.timeout_s, self.patience_s, self.most = timeout_s, patience_s, most
        self.num_retries = 0
        self._live: set[http.client.HTTPConnection] = set()
        self._num_aborts = 0
        self._lock = threading.Lock()

    def json(
        self, path: str, body: Any = None, *, timeout_s: float | None = None, patience_s: float | None = None
    ) -> Any:
        """What `ask` gives, read as JSON; what is none counts as half an answer."""
        return self._tried(path, body, timeout_s, patience_s, lambda: _Whole(_read_json)).value

    def ask(
        self, path: str, body: Any = None, *, timeout_s: float | None = None, patience_s: float | None = None
    ) -> bytes:
        """GET, or POST of a body as JSON. Raises Refused or Unreachable."""
        return self._tried(path, body, timeout_s, patience_s, lambda: _Whole(bytes)).value

    def read(self, path: str, body: Any, read: Callable[[Any], R]) -> R:
        """What `read` makes of an answer in JSON. It raises HalfError or OSError for one that is to be asked again."""
        return self._tried(path, body, None, None, lambda: _Whole(lambda data: read(_read_json(data)))).value

    def stream(self, path: str, body: Any, begin: Callable[[], S]) -> S:
        """The sink that `begin` made for the try that got a whole answer; as `ask`."""
        return self._tried(path, body, None, None, begin)

    def abort(self) -> None:
        """End what is in flight in other threads; a server ends the work that nobody waits for any more."""
        with self._lock:
            self._num_aborts += 1
            for connection in self._live:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):  # it has ended by itself
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _tried(
        self, path: str, body: Any, timeout_s: float | None, patience_s: float | None, begin: Callable[[], S]
    ) -> S:
        timeout = self.timeout_s if timeout_s is None else timeout_s
        until = time.monotonic() + (self.patience_s if patience_s is None else patience_s)
        pause, begun, data = (
            0.1,
            self._num_aborts,
            None if body is None else json.dumps(body, separators=(",", ":")).encode(),
        )
        while True:
            wait = pause
            try:
                sink = begin()
                status, answer, after_s = self._once(path, data, timeout, sink)
                if status not in AGAIN:
                    _check(status, answer, self.url, path)
                    sink.end()
                    return sink
                wait = max(wait, after_s)
                said = f"status {status}: {_words(answer)}"
            except (OSError, http.client.HTTPException, HalfError) as error:
                said = _reason(error)
            if time.monotonic() + wait > until or self._num_aborts > begun:
                raise Unreachable(f"no answer from {self.url}{path} ({said})")
            time.sleep(wait)
            self.num_retries += 1
            pause = min(2 * pause, 5.0)

    def _once(self, path: str, data: bytes | None, timeout_s: float, sink: Sink) -> tuple[int, bytes, float]:
        """(status, body of a refusal, seconds that the server asks us to wait). One try; `sink` is fed what is none."""
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection, ends = kind(self._host, self._port, timeout=min(timeout_s, 20.0)), time.monotonic() + timeout_s
        headers = {"Connection": "close", **({"Content-Type": "application/json"} if data is not None else {})}
        if key := self._token or os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        with self._lock:
            self._live.add(connection)
        try:
            connection.connect()
            connection.request("GET" if data is None else "POST", self._prefix + path, body=data, headers=headers)
            connection.sock.settimeout(timeout_s)
            response = connection.getresponse()
            parts, size = list[bytes](), 0
            take = sink.feed if 200 <= response.status < 300 else parts.append
            while part := response.read(CHUNK):
                take(part)
                size += len(part)
                if size > self.most:
                    raise Refused(f"{self.url}{path} answered with more than {self.most:,} bytes; that is no answer")
                if time.monotonic() > ends:
                    raise TimeoutError(f"the answer was not whole after {timeout_s:.0f} s")
            whole = response.length in (None, 0)
            if not whole:
                raise HalfError("the line broke in the middle of an answer")
            return response.status, b"".join(parts), _seconds(response.getheader("Retry-After"))
        finally:
            with self._lock:
                self._live.discard(connection)
            connection.close()


def as_answered(
    ask: Callable[[K], R],
    keys: Sequence[K],
    *,
    at_once: int,
    abort: Callable[[], None],
    tick_s: float = 0.25,
) -> Generator[list[tuple[K, R | Exception]], None, None]:
    """(key, what `ask` gave or raised) of every key, in lists of what has come since the last one. Begun in their
    order, `at_once` at most in flight.

    An empty list every `tick_s` in which nothing came, for whoever must look around. A caller that stops before the end
    (`close`) ends what is in flight (`abort`).
    """
    todo: queue.SimpleQueue[K] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[K, R | Exception]] = queue.SimpleQueue()
    for key in keys:
        todo.put(key)
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                key = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((key, ask(key)))
            except Exception as error:  # whoever asked decides what becomes of it
                done.put((key, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(keys)))]
    for thread in threads:
        thread.start()
    left = len(keys)
    try:
        while left:
            come: list[tuple[K, R | Exception]] = []
            try:
                come.append(done.get(timeout=tick_s))
                while True:
                    come.append(done.get_nowait())
            except queue.Empty:
                left -= len(come)
                yield come
    finally:
        stopped.set()
        while any(thread.is_alive() for thread in threads):
            if left:
                abort()  # again: a thread may just have begun a request
            for thread in threads:
                thread.join(0.05)


class HalfError(Exception):
    """An answer that is not whole, or not one to what was asked: asking again may better it."""


class _Whole(Generic[R]):
    """Sink of an answer that is read at its end."""

    value: R

    def __init__(self, read: Callable[[bytes], R]) -> None:
        self._read, self._parts = read, list[bytes]()

    def feed(self, part: bytes) -> None:
        self._parts.append(part)

    def end(self) -> None:
        self.value = self._read(b"".join(self._parts))


def _parts(url: str, key: str) -> tuple[str, str, int | None, str, bool]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"{key} = {url!r} is no address ({error}); give http://HOST:PORT") from None
    if parts.username or parts.password:
        raise UserError(
            f"{key} holds a user name or a password, which would be written into the run's files; put a key into the "
            f"environment variable {KEY_VARIABLE} instead"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"{key} = {url!r} is no address of a server; give http://HOST:PORT")
    prefix = parts.path.rstrip("/").removesuffix("/v1")  # as clients of OpenAI's interface are told it
    shown = f"{parts.scheme}://{parts.netloc}{prefix}"
    return shown, parts.hostname, port, prefix, parts.scheme == "https"


def _read_json(data: bytes) -> Any:
    if not data.strip():
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HalfError(f"its answer is no JSON: {error}") from None


def _check(status: int, answer: bytes, url: str, path: str) -> None:
    if 200 <= status < 300:
        return
    said = _words(answer)
    more = f"; set the key in the environment variable {KEY_VARIABLE}" if status in (401, 403) else ""
    raise Refused(f"{url}{path} answered with status {status} ({said}){more}", status, said)


def _words(answer: bytes) -> str:
    """What a server says of an error: OpenAI's form, FastAPI's, or the beginning of the text."""
    text = answer[:65536].decode("utf-8", "replace")
    try:
        said = json.loads(text)
        for key in ("error", "detail", "message"):
            if isinstance(said, dict) and key in said:
                said = said[key]
        text = said if isinstance(said, str) else json.dumps(said)
    except (ValueError, RecursionError):
        pass
    text = " ".join(text.split())
    return text[:MOST_SAID] + ("..." if len(text) > MOST_SAID else "") if text else "no words"


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected | ConnectionError):
        return "the line broke in the middle of an answer"
    if isinstance(error, TimeoutError):
        return f"no answer in time{f': {error}' if str(error) else ''}"
    return str(error) or type(error).__name__


def _seconds(header: str | None) -> float:
    try:
        return min(60.0, max(0.0, float(header or 0)))
    except ValueError:  # a date: our own pause does
        return 0.0
