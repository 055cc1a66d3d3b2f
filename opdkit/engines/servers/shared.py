"""One engine that several ranks ask. One of them, its host, starts it or finds it and gives it weights.

Whoever finds it failing says so in a file of the folder where weights are handed over, and waits. A thread of the host
hears it, makes the engine ready again with the weights it had, says in another file where it is now, and takes the
first one away. So no rank need be where another one asks it, and an engine that several find failing is started again
once. Keys are in none of these files.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opdkit.engines.servers.base import Api, Vocabulary
from opdkit.engines.servers.engine import ServerEngine
from opdkit.engines.servers.http import Client
from opdkit.engines.servers.served import PATIENCE_S, Served, ServerKind, api_of
from opdkit.errors import UserError

PLACE = "engine.json"  # {"number", "url", "failed"}: number of times it was made ready, why it cannot be
POLL_S = 0.2
MOST_SAID = 500  # characters of a trouble


class Told(NamedTuple):
    """What the host tells the ranks that ask its engine."""

    folder: str
    url: str
    token: str | None
    number: int
    version: str | None
    adapter: str | None
    max_model_len: int | None


@dataclass(slots=True)
class Asker:
    """`Host` (see `engine.py`) on every rank that asks, also on the one that has the engine."""

    told: Told
    vocabulary: Vocabulary
    kind: ServerKind
    rank: int
    api: Api = None  # type: ignore[assignment]
    is_running: bool = True  # as far as one knows who did not start it

    def __post_init__(self) -> None:
        self.api = api_of(self.kind, Client(self.told.url, token=self.told.token))

    def engine(self) -> ServerEngine:
        told = self.told
        version = told.version if told.adapter is None else None
        return ServerEngine(self, self.vocabulary, told.max_model_len, told.adapter, version)

    def recover(self, trouble: str) -> None:
        """Until the host has made it ready. Raises UserError where it could not, or is gone."""
        folder = Path(self.told.folder)
        bell, began = folder / f"trouble-{self.rank}", time.monotonic()
        try:
            _write(bell, {"number": self.told.number, "said": trouble[:MOST_SAID]})
            while bell.exists():
                if time.monotonic() - began > 2 * PATIENCE_S:
                    raise UserError(
                        f"the engine at {self.told.url} stopped answering ({trouble}) and did not come back"
                    )
                time.sleep(POLL_S)
            place = _read(folder / PLACE)
        except OSError as error:
            raise UserError(
                f"the engine at {self.told.url} stopped answering ({trouble}), and the rank that looks after it has "
                f"ended ({error.strerror}); go on with --resume"
            ) from None
        if place["failed"] is not None:
            raise UserError(str(place["failed"]))
        self.told = self.told._replace(number=int(place["number"]), url=str(place["url"]))
        self.__post_init__()


class Keeper:
    """On the host, while the engine is there: hears of troubles. close() before the engine is let go."""

    def __init__(self, served: Served, folder: Path) -> None:
        self._served, self._folder, self._number = served, folder, 0
        self._failed: str | None = None
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="engine", daemon=True)
        self._thread.start()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what the host itself does with the engine."""
        with self._lock:
            yield

    def tell(self) -> Told:
        """Where it is, and with which weights."""
        served, weights = self._served, self._served.weights
        self._say()
        return Told(
            folder=str(self._folder),
            url=served.api.client.url,
            token=None if served.process is None else served.process.token,
            number=self._number,
            version=None if weights is None else weights.version,
            adapter=None if weights is None else weights.adapter,
            max_model_len=served.max_model_len,
        )

    def close(self) -> None:
        """A start that is under way is given up."""
        self._closing.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._closing.wait(POLL_S):
            bells = sorted(self._folder.glob("trouble-*"))
            if bells:
                with self._lock:
                    self._answer(bells)

    def _answer(self, bells: list[Path]) -> None:
        news = [_read(bell) for bell in bells]
        trouble = next((str(one["said"]) for one in news if one["number"] == self._number), None)
        if trouble is not None and self._failed is None:  # else it was made ready since
            waiting = self._served.waiting
            self._served.waiting = self._still_wanted
            try:
                self._served.recover(trouble)
                self._number += 1
            except UserError as error:
                self._failed = str(error)
            finally:
                self._served.waiting = waiting
            self._say()
        for bell in bells:
            bell.unlink(missing_ok=True)

    def _say(self) -> None:
        url = self._served.api.client.url
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._folder / PLACE, {"number": self._number, "url": url, "failed": self._failed})

    def _still_wanted(self, seconds: float) -> None:
        if self._closing.is_set():
            raise UserError("the engine was let go while it was made ready again")


def _write(path: Path, said: dict[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(said), encoding="utf-8")
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
