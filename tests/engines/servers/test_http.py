"""The client of model servers: what it asks again, what it refuses, what it bounds. Against a fake server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import FakeServer

from opdkit.engines.servers.http import Client, Refused, Unreachable, as_answered
from opdkit.errors import UserError

ASKED = {"model": "m", "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4, "seed": 3, "logprobs": 0}}


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[FakeServer]:
    with FakeServer(tiny_folder) as fake:
        yield fake


@pytest.mark.parametrize("fault", ["busy", "half", "drop", "no_json", "error"])
def test_what_another_try_betters_is_asked_again(server: FakeServer, fault: str) -> None:
    """The same request gives the same answer: nothing is lost or doubled."""
    client = Client(server.url)
    whole = client.json("/inference/v1/generate", ASKED)
    server.faults[:] = [fault, fault]
    assert client.json("/inference/v1/generate", ASKED)["choices"] == whole["choices"]
    assert not server.faults


def test_what_no_try_betters_is_said_at_once(server: FakeServer) -> None:
    asked = len(server.requests)
    with pytest.raises(Refused, match="`other` does not exist") as refused:
        Client(server.url).json("/inference/v1/generate", {**ASKED, "model": "other"})
    assert refused.value.status == 404 and len(server.requests) == asked + 1


def test_silence_and_a_wrong_port_end_with_a_sentence(server: FakeServer) -> None:
    server.faults[:] = ["hang"]
    with pytest.raises(Unreachable, match="no answer in time"):
        Client(server.url).ask("/inference/v1/generate", ASKED, timeout_s=0.2, patience_s=0)
    with pytest.raises(Unreachable, match="nobody listens there"):
        Client("http://127.0.0.1:9").ask("/health", patience_s=0.2)


def test_an_answer_is_bounded(server: FakeServer) -> None:
    with pytest.raises(Refused, match="more than 50 bytes"):
        Client(server.url, most=50).ask("/v1/models")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000", "no address"),
        ("file:///etc/passwd", "no address"),
        ("http://h:port", "no address"),
        ("http://me:secret@h:1", "environment variable VLLM_API_KEY"),
    ],
)
def test_addresses_that_are_none(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Client(url, key="sampling.url")
    assert "secret" not in str(error.value)


def test_the_key_goes_with_requests_and_into_no_sentence(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-1234")
    with pytest.raises(Refused) as refused:
        Client(f"{server.url}/v1/").json("/nothing", {})
    assert "sk-1234" not in str(refused.value) and "/v1" not in str(refused.value)


def test_many_in_flight_are_bounded_and_a_caller_may_stop(server: FakeServer) -> None:
    client, begun = Client(server.url), threading.Semaphore(0)
    server.most_at_once = 0
    bodies = {n: {**ASKED, "sampling_params": {**ASKED["sampling_params"], "seed": n}} for n in range(12)}
    answered = as_answered(
        lambda n: client.json("/inference/v1/generate", bodies[n]), list(bodies), at_once=3, abort=client.abort
    )
    assert sorted(key for come in answered for key, _ in come) == list(bodies)
    assert server.most_at_once <= 3
    server.faults[:] = ["hang"] * 4
    server.before_answer = begun.release
    waiting = as_answered(
        lambda n: client.ask("/inference/v1/generate", bodies[n], patience_s=0),
        list(bodies)[:4],
        at_once=4,
        abort=client.abort,
    )
    assert next(waiting) == []
    for _ in range(4):
        begun.acquire()
    waiting.close()  # would wait for an hour
    server.before_answer = None
