"""Sampling from a server: numbers, stops, seeds, and a server that dies, hangs or is another one. The fake server's
numbers are a real tiny model's; that a real vLLM behaves so is for `make test-vllm`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer

from opdkit.engines.base import Sampled, SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.sampling.draw import kept_entries
from opdkit.engines.servers import engine as engine_file
from opdkit.engines.servers.base import Vocabulary
from opdkit.engines.servers.served import Served
from opdkit.errors import Interrupted, UserError
from opdkit.types import Asked

PROMPTS = [[5, 6, 7], [5, 6, 7], [9, 10, 11, 12], [20]]
SEEDS = [1, 2**62, 3, 4]
PARAMS = SamplingParams(max_answer_tokens=12)


@pytest.fixture
def server(tiny_folder: Path) -> Iterator[FakeServer]:
    with FakeServer(tiny_folder) as fake:
        yield fake


def served(server: FakeServer, tiny_model: Any, **how: Any) -> Served:
    vocabulary = Vocabulary(num_tokens=tiny_model.num_tokens, num_rows=48, stop_ids=tiny_model.stop_ids)
    one = Served(vocabulary=vocabulary, url=server.url, kind=server.kind, **how)
    one.open()
    return one


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("params", [PARAMS, SamplingParams(max_answer_tokens=12, temperature=0.7)])
def test_log_probs_are_the_models_and_rows_are_their_own(
    tiny_folder: Path, tiny_model: Any, kind: str, params: SamplingParams
) -> None:
    """Equal to scoring here; the same in another order and alone; ids that the tokenizer lacks are never drawn."""
    with FakeServer(tiny_folder, kind=kind) as server:
        engine = served(server, tiny_model).engine()
        rows = engine.sample(PROMPTS, SEEDS, params)
        said = HFEngine(tiny_model).score(
            PROMPTS, [row.answer_ids for row in rows], Asked("sampled"), temperature=params.temperature
        )
        for row, signal in zip(rows, said, strict=True):
            np.testing.assert_allclose(row.logprobs_T, signal.sampled_logprob_T, atol=2e-5)
            assert max(row.answer_ids) < tiny_model.num_tokens
            assert (row.finish == "stop") == (row.answer_ids[-1] in tiny_model.stop_ids)
        again = engine.sample(PROMPTS[::-1], SEEDS[::-1], params)[::-1]
        assert [row.answer_ids for row in again] == [row.answer_ids for row in rows]
        assert len({row.answer_ids for row in rows[:2]}) == 2


def test_cuts_are_those_of_the_engine_here(server: FakeServer, tiny_model: Any) -> None:
    """min-p alone and top-k then top-p: the distribution that was sampled; what it was before a cut is not known."""
    for params in (
        SamplingParams(max_answer_tokens=8, min_p=0.2),
        SamplingParams(max_answer_tokens=8, top_k=5, top_p=0.8),
        SamplingParams(max_answer_tokens=8, top_k=5, min_p=0.1),
    ):
        row = served(server, tiny_model).engine().sample([[5, 6, 7]], [7], params)[0]
        hidden = HFEngine(tiny_model).score([[5, 6, 7]], [row.answer_ids], Asked("distribution"))[0]
        scores_TV = hidden.head.logits(hidden.head.project(hidden.hidden_TH), 1.0).detach()
        for place, token in enumerate(row.answer_ids):
            kept_BK, ids_BK = kept_entries(scores_TV[place : place + 1].clone(), params)
            where = token if ids_BK is None else int((ids_BK[0] == token).nonzero())
            assert row.logprobs_T[place] == pytest.approx(float(kept_BK.log_softmax(-1)[0, where]), abs=2e-5)
        assert row.uncut_logprobs_T is not None and np.isnan(row.uncut_logprobs_T).all()


def test_greedy_has_all_mass_on_its_token(server: FakeServer, tiny_model: Any) -> None:
    params = SamplingParams(max_answer_tokens=12, temperature=0)
    row = served(server, tiny_model).engine().sample(PROMPTS[:1], [0], params)[0]
    assert row.answer_ids == HFEngine(tiny_model).sample(PROMPTS[:1], [0], params)[0].answer_ids
    assert not row.logprobs_T.any() and row.uncut_logprobs_T is None


def test_every_field_is_sent(server: FakeServer, tiny_model: Any) -> None:
    """What a request leaves out a generation config may fill in, and an unknown field is ignored without a word."""
    served(server, tiny_model).engine().sample(PROMPTS[:1], [5], PARAMS)
    (body,) = server.asked("/inference/v1/generate")
    assert set(body) == {"model", "token_ids", "sampling_params", "stream"}
    assert set(body["sampling_params"]) == {
        *("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "logprobs", "detokenize"),
        *("logit_bias", "skip_special_tokens"),
    }


def test_a_text_ends_an_answer(server: FakeServer, tiny_model: Any) -> None:
    """The server may write on, or stop a token late: the answer ends with the token that completes the text."""
    one = served(server, tiny_model)
    one.vocabulary = replace(one.vocabulary, tokenizer=tiny_model.tokenizer)
    whole = one.engine().sample(PROMPTS, SEEDS, PARAMS)[3]
    text = tiny_model.tokenizer.decode(whole.answer_ids[2:4])
    (cut,) = one.engine().sample(PROMPTS[3:], SEEDS[3:], replace(PARAMS, stop=("nowhere", text)))
    assert len(whole.answer_ids) > 4 and cut.answer_ids == whole.answer_ids[:4] and cut.finish == "stop"
    assert (cut.logprobs_T == whole.logprobs_T[:4]).all()
    asked = server.asked("/inference/v1/generate")[-1]["sampling_params"]
    assert (asked["stop"], asked["detokenize"]) == (["nowhere", text], True)


def test_rows_come_as_they_are_finished_and_all_at_once(server: FakeServer, tiny_model: Any) -> None:
    heard: dict[int, Sampled] = {}
    barrier = threading.Barrier(len(PROMPTS), timeout=20)  # opens only if all rows are in flight together
    server.before_answer = barrier.wait
    rows = served(server, tiny_model).engine().sample(PROMPTS, SEEDS, PARAMS, finished=heard.update)
    assert [heard[index] for index in range(len(PROMPTS))] == rows


def test_a_server_that_dies_in_the_middle_loses_and_doubles_nothing(
    server: FakeServer, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers, then it is gone and comes back: only the rest is asked again, with the same seeds."""
    one = served(server, tiny_model, doubts=[].append)
    expected = one.engine().sample(PROMPTS, SEEDS, PARAMS)
    monkeypatch.setattr(engine_file, "AT_ONCE", 1)
    one.api.client.patience_s = 0.3
    heard: list[int] = []
    asked = len(server.asked("/inference/v1/generate"))

    def finished(rows: dict[int, Sampled]) -> None:
        heard.extend(rows)
        if len(heard) == 2:
            server.stop()
            threading.Timer(0.8, server.restart).start()

    rows = one.engine().sample(PROMPTS, SEEDS, PARAMS, finished=finished)
    assert [row.answer_ids for row in rows] == [row.answer_ids for row in expected]
    assert sorted(heard) == [0, 1, 2, 3] and len(server.asked("/inference/v1/generate")) <= asked + 5


def test_a_server_that_hangs_is_found_out(server: FakeServer, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives and writes nothing: after a while it is left, and the rows are asked for again."""
    monkeypatch.setattr(engine_file, "LOOK_S", 0.1)
    monkeypatch.setattr(engine_file, "STALL_S", 0.3)
    one = served(server, tiny_model)
    server.faults[:] = ["hang"]
    monkeypatch.setattr(type(one.api), "progress", lambda self: 1.0)
    engine = one.engine()
    assert len(engine.sample(PROMPTS, SEEDS, PARAMS)) == 4 and engine.num_recoveries == 1


def test_an_interruption_is_passed_on(server: FakeServer, tiny_model: Any) -> None:
    server.faults[:] = ["hang"] * 4

    def stop(done: int, total: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        served(server, tiny_model).engine().sample(PROMPTS, SEEDS, PARAMS, progress=stop)


def test_what_is_no_such_server_is_refused(tiny_folder: Path, tiny_model: Any) -> None:
    with FakeServer(tiny_folder, kind="sglang") as server:
        vocabulary = Vocabulary(num_tokens=38, num_rows=48, stop_ids=tiny_model.stop_ids)
        with pytest.raises(UserError, match="so it is no vLLM"):
            Served(vocabulary=vocabulary, url=server.url).open()
    with FakeServer(tiny_folder, version="0.11.0") as server:
        doubts: list[str] = []
        one = served(server, tiny_model, doubts=doubts.append)
        assert "vLLM 0.11.0 was never tried" in doubts[0]
        with pytest.raises(UserError, match="max_model_len = 96"):
            one.engine().sample([[5] * 90], [1], PARAMS)
        one.vocabulary = Vocabulary(num_tokens=10, num_rows=10, stop_ids=tiny_model.stop_ids)
        with pytest.raises(UserError, match="another model served"):
            one.engine().sample(PROMPTS, SEEDS, PARAMS)
