"""A model behind a server, one that opdkit starts or one at an address: made ready, given new weights, made ready again
after it died, and let go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from opdkit.engines.servers import sglang, vllm
from opdkit.engines.servers.base import About, Api, Vocabulary, never_tried
from opdkit.engines.servers.engine import ServerEngine
from opdkit.engines.servers.http import Client, Refused, Unreachable
from opdkit.engines.servers.process import VllmProcess, Waiting
from opdkit.errors import UserError

ServerKind = Literal["vllm", "sglang"]
PATIENCE_S = 600.0  # for a server of somebody else's to come back


class Weights(NamedTuple):
    """What was published last: a checkpoint in `folder`, or an adapter of this name there; or, in the trainer's own
    memory on the engine's GPU, what `layout` describes while its block lasts."""

    version: str
    folder: str = ""
    adapter: str | None = None
    layout: Callable[[], AbstractContextManager[str]] | None = None


def api_of(kind: ServerKind, client: Client) -> Api:
    return vllm.Vllm(client) if kind == "vllm" else sglang.Sglang(client)


@dataclass(slots=True)
class Served:
    """process: of an own server; else `url` is where one runs. waiting: hears seconds while one is waited for, and may
    raise Interrupted. `open` first, `close` at the end."""

    vocabulary: Vocabulary
    process: VllmProcess | None = None
    url: str | None = None
    url_key: str = "sampling.url"
    kind: ServerKind = "vllm"
    waiting: Waiting = lambda seconds: None
    api: Api = None  # type: ignore[assignment]  # from `open` on
    about: About | None = None
    weights: Weights | None = None
    num_starts: int = 0
    is_closed: bool = False
    doubts: Callable[[str], object] = lambda sentence: None  # hears what is doubtful about the server

    def open(self) -> About:
        """Start or find it. Raises UserError where there is none, or one that cannot do what is needed."""
        self._connect()
        about = self.api.about()
        if self.about is None:
            span = (vllm.OLDEST, vllm.NEWEST) if self.kind == "vllm" else (sglang.OLDEST, sglang.NEWEST)
            if doubt := never_tried({"vllm": "vLLM", "sglang": "SGLang"}[self.kind], about.version, *span):
                self.doubts(doubt)
        self.about = about
        return about

    @property
    def is_running(self) -> bool:
        return self.process is None or self.process.is_running

    @property
    def max_model_len(self) -> int | None:
        rooms = (None if self.about is None else self.about.max_model_len, self.vocabulary.max_positions)
        return min((room for room in rooms if room is not None), default=None)

    def engine(self) -> ServerEngine:
        """With the weights that were published last; the server's own if none were."""
        return ServerEngine(
            host=self,
            vocabulary=self.vocabulary,
            max_model_len=self.max_model_len,
            adapter=self.weights.adapter if self.weights else None,
            version=self.weights.version if self.weights and not self.weights.adapter else None,
        )

    def publish(self, weights: Weights) -> None:
        """Give the server these weights; an adapter that was published before is dropped."""
        before = self.weights
        self._load(weights)
        self.weights = weights
        if before is not None and before.adapter not in (None, weights.adapter):
            self.api.drop_adapter(before.adapter)

    def recover(self, trouble: str) -> None:
        """Start it anew, or wait for whoever does, and give it the weights it had."""
        if self.is_closed:
            raise UserError("the engine was let go while it was still answering")
        if self.process is not None:
            self.doubts(f"the engine stopped answering ({trouble}) and is started again; see {self.process.log}")
            self._connect()
        else:
            self._wait(trouble)
        self.api.about()
        if self.weights is not None:
            self._load(self.weights)

    def sleep(self) -> None:
        """Free the accelerator; the weights are kept only where they are not published anew."""
        keep = self.weights is None or self.weights.adapter is not None
        self.api.sleep(keep)
        if not keep:
            self.weights = None

    def close(self) -> None:
        self.is_closed = True
        if self.api is not None:
            self.api.client.abort()
        if self.process is not None:
            self.process.stop()
        elif self.weights is not None and self.weights.adapter is not None:
            with contextlib.suppress(Refused, Unreachable):  # it is gone, and the adapter with it
                self.api.drop_adapter(self.weights.adapter)
        self.weights = None

    def _connect(self) -> None:
        client = self.process.start(self.waiting) if self.process else Client(self.url or "", key=self.url_key)
        self.num_starts += 1
        self.api = api_of(self.kind, client)

    def _load(self, weights: Weights) -> None:
        if weights.adapter is not None:
            self._load_adapter(weights.adapter, weights.folder)
        elif weights.layout is not None:
            with weights.layout() as layout:
                self.api.load_shared(layout, weights.version)
        else:
            self.api.load_weights(weights.folder, weights.version)

    def _load_adapter(self, name: str, folder: str) -> None:
        try:
            self.api.load_adapter(name, folder)
        except UserError as error:
            if "already been loaded" not in str(error):  # a server that came back may not have been away
                raise

    def _wait(self, trouble: str) -> None:
        self.doubts(f"{self.api.client.url} stopped answering ({trouble}); waiting up to {PATIENCE_S:.0f} s for it")
        started = time.monotonic()
        while True:
            self.waiting(time.monotonic() - started)
            try:
                self.api.client.ask("/health", timeout_s=30.0, patience_s=0)
                return
            except (Unreachable, Refused) as error:
                if time.monotonic() - started > PATIENCE_S:
                    raise UserError(f"{error}; start the server again and go on with --resume") from None
                time.sleep(1.0)
