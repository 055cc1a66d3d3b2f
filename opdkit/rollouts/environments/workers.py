"""Many episodes' environments at once, in worker processes, each thing with a deadline.

    pool.reset(7, problem, seed)          asks, and waits for nothing; 7 is the caller's number of the episode
    pool.step(7, action, seed)
    pool.grade(7, transcript)
    pool.close_episode(7)
    for reply in pool.replies(wait_s):    what has been answered since, of any episode

So the caller samples those episodes that are ready while others wait for a tool. What becomes of an episode:

    step has no result in time    its worker is killed; the calls are answered with a sentence, and it goes on
    step raises, the worker dies  failure "crash", done: it says nothing of the model
    another's worker is killed    its environment is made again in a new worker, by the same reset and the same steps;
                                  where that leads elsewhere, or must not be repeated: "crash"
"""

from __future__ import annotations

import hashlib
import json
import select
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from opdkit.errors import UserError
from opdkit.rollouts.environments.base import Action, Failure, Step, Tool, Transcript
from opdkit.rollouts.environments.channel import Gone, Item, Worker
from opdkit.rollouts.environments.held import action_as_json, step_from_json, transcript_as_json
from opdkit.rollouts.environments.options import EnvironmentOptions
from opdkit.tasks.arguments import value_as_json
from opdkit.tasks.base import Crash, Grade
from opdkit.tasks.user.imports import START_LIMIT_S
from opdkit.tasks.user.process import Failed
from opdkit.tasks.user.task import grade_from_json, problem_as_json
from opdkit.types import Message, Problem

GRADE_LIMIT_S = 30.0
CLOSE_LIMIT_S = 5.0
_LOOK_S = 0.2  # a process that has ended may have left the channel open in one it forked
_MAX_LOST_IN_A_ROW = 10  # workers, without one answer between; then no episode will end well


class EnvironmentDown(UserError, RuntimeError):
    """No episode can be run now, whatever the model does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an environment said. One of `prompt`, `step`, `grade` and `crash` is there."""

    episode: int
    prompt: tuple[Message, ...] | None = None  # what `reset` returned
    tools: tuple[Tool, ...] = ()  # with `prompt`: what the episode offers
    step: Step | None = None
    failures: tuple[Failure | None, ...] = ()  # with `step`: of each call of the action, in order
    grade: Grade | None = None
    crash: str | None = None  # why `reset` said nothing, or the step's failure is "crash": one line
    cut_characters: int = 0  # that were left out of messages too long to be sent
    seconds: float = 0.0  # that the environment took


@dataclass(slots=True)
class _Episode:
    """Where an episode is, and how it is led there again."""

    number: int  # the caller's
    instance: int  # the worker's: a number that no other episode ever has
    worker: Worker
    history: list[Item] = field(default_factory=list)  # what was answered, with digests of the answers
    asked: deque[Item] = field(default_factory=deque)  # what is not answered yet; the first of it is at the worker
    crash: str | None = None


class Pool:
    """Worker processes of one environment. Safe to close twice."""

    def __init__(
        self,
        chosen: EnvironmentOptions,
        *,
        workers: int = 2,
        max_calls: int = 4,
        tool_timeout_s: float = 10.0,
    ) -> None:
        """max_calls: of one turn; the others are refused. tool_timeout_s: of one call, or of a turn without any.

        Raises UserError where the environment cannot be made, or offers what no tool can be.
        """
        self.name, self._source = chosen.name, type(chosen).source
        self._make_request = {"do": "make", "options": value_as_json(chosen.options), "max_calls": max_calls}
        self._max_calls, self._tool_timeout_s = max_calls, tool_timeout_s
        self._episodes: dict[int, _Episode] = {}  # by the caller's number
        self._by_instance: dict[int, _Episode] = {}
        self._num_begun = 0
        self._told: list[Reply] = []
        self._num_lost_in_a_row = 0
        self.num_lost_workers = 0
        with ThreadPoolExecutor(workers) as threads:
            self._workers = list(threads.map(lambda _: self._start(), range(workers)))
        described = self._workers[0].described
        self.tools: tuple[Tool, ...] = tuple(described["tools"])  # of an environment whose episodes all have the same
        self.grades = bool(described["grades"])  # whether it has a `grade` of its own
        self._repeatable = bool(described["repeatable"])
        self.rewrites_history = bool(described["rewrites_history"])

    def reset(self, episode: int, problem: Problem, seed: int) -> None:
        """Begins an episode; the reply has its `prompt`. Siblings are given the same seed."""
        worker = min(self._workers, key=lambda worker: worker.num_episodes)
        worker.num_episodes += 1
        self._num_begun += 1
        held = self._episodes[episode] = _Episode(episode, self._num_begun, worker)
        self._by_instance[held.instance] = held
        request = {"what": "reset", "problem": problem_as_json(problem), "seed": seed}
        self._ask(episode, request, START_LIMIT_S)

    def step(self, episode: int, action: Action, seed: int) -> None:
        """The reply has a `step`, in which every call of the action is answered, in order, unless it is done."""
        num_calls = min(len(action.calls), self._max_calls)
        request = {"what": "step", "action": action_as_json(action), "seed": seed}
        self._ask(episode, request, self._tool_timeout_s * max(num_calls, 1))

    def grade(self, episode: int, transcript: Transcript) -> None:
        """The reply has a `grade`: a `Crash` where the environment failed at it."""
        self._ask(episode, {"what": "grade", "transcript": transcript_as_json(transcript)}, GRADE_LIMIT_S)

    def close_episode(self, episode: int) -> None:
        """No reply. Also of an episode that crashed, or is still asked something."""
        held = self._episodes.pop(episode)
        del self._by_instance[held.instance]
        held.worker.num_episodes -= 1
        held.worker.give(Item(held.instance, {"what": "close"}, CLOSE_LIMIT_S))

    def replies(self, wait_s: float | None = None) -> list[Reply]:
        """What has been answered since the last call. Waits for one answer at least, but no longer than wait_s; and for
        none where nothing is asked."""
        until_s = None if wait_s is None else time.monotonic() + wait_s
        while True:
            self._exchange(0.0)
            is_over = until_s is not None and time.monotonic() >= until_s
            if self._told or is_over or not any(held.asked for held in self._episodes.values()):
                told, self._told = self._told, []
                return told
            limits = [worker.deadline_s for worker in self._workers] + ([] if until_s is None else [until_s])
            self._exchange(max(0.0, min(limits) - time.monotonic()))

    def close(self) -> None:
        for worker in self._workers:
            worker.process.end()
        self._episodes.clear()
        self._by_instance.clear()

    def _ask(self, number: int, request: Mapping[str, Any], limit_s: float) -> None:
        held = self._episodes[number]
        if held.crash is not None:
            self._told.append(_crash(number, request["what"], held.crash))
        else:
            self._queue(held, Item(held.instance, request, limit_s))

    def _queue(self, held: _Episode, item: Item) -> None:
        """An environment is asked one thing at a time."""
        held.asked.append(item)
        if len(held.asked) == 1:
            held.worker.give(item)

    def _exchange(self, wait_s: float) -> None:
        poll = select.poll()
        for worker in self._workers:
            poll.register(worker.process.channel, select.POLLIN | (select.POLLOUT if worker.wants_to_write else 0))
        poll.poll(min(wait_s, _LOOK_S) * 1000)
        for worker in list(self._workers):
            was_alive = worker.is_alive()
            try:
                answers = worker.exchange()
            except Gone as error:
                self._replace(worker, str(error), worker.suspects(), "crash")
                continue
            for item, said in answers:
                self._num_lost_in_a_row = 0
                self._answered(item, said)
            if not was_alive:  # and all that it said before has been read
                self._replace(worker, worker.process.how_it_ended(), worker.suspects(), "crash")
            elif overdue := worker.overdue():
                self._replace(worker, f"no result within {overdue[0].limit_s:g} s", overdue, "timeout")

    def _answered(self, item: Item, said: dict[str, Any]) -> None:
        held = self._by_instance.get(item.episode)
        if held is None or item.request["what"] == "close":
            return
        held.asked.popleft()
        seconds, fault = float(said.pop("seconds")), said.pop("fault", None)
        if fault is not None:
            self._failed(held, item, fault, str(said["said"]), seconds)
        else:
            answer = {key: value for key, value in said.items() if key not in ("number", "at")}
            digest = hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()
            if item.digest is None:
                self._told.append(_reply(held.number, item.request["what"], answer, seconds))
            elif item.digest != digest:
                self._failed(held, item, "crash", "its worker was lost, and it did not repeat itself in another", 0.0)
            if item.request["what"] != "grade":
                held.history.append(replace(item, digest=digest))
        if held.asked:
            held.worker.give(held.asked[0])

    def _failed(self, held: _Episode, item: Item, fault: str, why: str, seconds: float) -> None:
        """It was asked this, and there will be no answer."""
        what = item.request["what"]
        if item.digest is None and what == "step" and fault == "timeout":
            calls = item.request["action"]["calls"]
            answers = [{"role": "tool", "name": name, "tool_call_id": own} for name, _, _, own in calls]
            messages = tuple({**message, "content": f"error: {why}"} for message in answers or [{"role": "user"}])
            step = Step(messages=messages, failure="timeout")
            failures: list[Failure] = ["timeout"] * len(calls)
            self._told.append(Reply(episode=held.number, step=step, failures=tuple(failures), seconds=seconds))
        elif item.digest is None and what == "grade":
            self._told.append(Reply(episode=held.number, grade=Crash.because(why), seconds=seconds))
        else:
            held.crash = why
            asked = next((one for one in (item, *held.asked) if one.digest is None), None)
            held.asked.clear()
            if asked is not None:
                self._told.append(_crash(held.number, asked.request["what"], why))

    def _replace(self, worker: Worker, why: str, guilty: list[Item], fault: str) -> None:
        """Another process for one that is gone or must go, in which its episodes are led where they were."""
        worker.process.end()
        self.num_lost_workers += 1
        self._num_lost_in_a_row += 1
        if self._num_lost_in_a_row >= _MAX_LOST_IN_A_ROW:
            self.close()
            raise EnvironmentDown(
                f"the environment {self.name} lost {self._num_lost_in_a_row} workers and answered nothing between; the "
                f"last time: {why}"
            )
        fresh = self._workers[self._workers.index(worker)] = self._start()
        by_episode = {item.episode: item for item in guilty}
        for held in [held for held in self._episodes.values() if held.worker is worker]:
            held.worker, fresh.num_episodes = fresh, fresh.num_episodes + 1
            if held.instance in by_episode:
                item = held.asked.popleft()
                self._failed(held, item, fault, why, item.limit_s)
            if held.history and not self._repeatable and held.crash is None:
                why = f"another episode's worker was lost, and {self.name} is not repeatable"
                self._failed(held, replace(held.history[0], digest=""), "crash", why, 0.0)
            if held.crash is None:
                items, held.history, held.asked = [*held.history, *held.asked], [], deque()
                for item in items:
                    self._queue(held, item)

    def _start(self) -> Worker:
        process = self._source.start()
        try:
            return Worker(process, process.ask(self._make_request, START_LIMIT_S))
        except (Failed, UserError) as error:
            process.end()
            raise UserError(f"the environment {self.name} cannot be made: {error}") from None
        except BaseException:
            process.end()
            raise


def _reply(episode: int, what: str, said: Mapping[str, Any], seconds: float) -> Reply:
    if what == "grade":
        return Reply(episode=episode, grade=grade_from_json(said["grade"]), seconds=seconds)
    if what == "reset":
        prompt, tools = tuple(said["messages"]), tuple(said["tools"])
        return Reply(episode=episode, prompt=prompt, tools=tools, cut_characters=said["cut"], seconds=seconds)
    failures = tuple(said["failures"])
    return Reply(
        episode=episode, step=step_from_json(said), failures=failures, cut_characters=said["cut"], seconds=seconds
    )


def _crash(episode: int, what: str, why: str) -> Reply:
    if what == "grade":
        return Reply(episode=episode, grade=Crash.because(why))
    step = Step(done=True, failure="crash") if what == "step" else None
    return Reply(episode=episode, step=step, crash=why)
