"""Many episodes at once, in rounds: one turn of every episode that is ready is sampled together.

An environment is asked as soon as a turn of the model has ended, while the others are still being sampled; it works in
processes of its own. Every seed is from identity: turn 0 has that of an answer of one turn, later ones and what the
environment draws name themselves. So a row depends on nobody that it is played with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from opdkit.contexts.drift import compared
from opdkit.contexts.render import OPENED_THINKING, Renderer
from opdkit.contexts.suffix import Suffixes
from opdkit.engines.base import Gathering, Progress, Sampled, Sampler, SamplingParams
from opdkit.errors import UserError
from opdkit.rollouts.environments.base import Action, Step
from opdkit.rollouts.environments.workers import EnvironmentDown, Reply
from opdkit.rollouts.episode import Episode, Row
from opdkit.rollouts.history import messages_of, told_anew
from opdkit.rollouts.stage import Stage
from opdkit.rollouts.tools import parse_calls
from opdkit.tasks.base import Task, can_grade
from opdkit.tasks.tool_calls import Call
from opdkit.types import Ended, Message, Problem, Rollout, TurnRecord, seed_from

MOST_BARREN = 3  # calls in a row in which no environment begins; then none will
MOST_FAILURES = 16  # kinds of them that are told of
COMPARED = 8  # episodes of each call whose stream is compared with the template's rendering
_LAST = 16  # ids of a prompt, in which a thought is opened or not
_GRACE_S = 0.05  # a round that does not wait for all waits so long
_LOOK_S = 0.5  # how often whoever waits is asked whether to go on


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What one episode became."""

    messages: tuple[Message, ...]  # of the environment's reset: the prompt
    tools: tuple[Mapping[str, object], ...]
    rollouts: tuple[Rollout, ...]
    said: tuple[Message, ...] = ()  # behind the prompt, as the chat template is given it; for whoever hears of each
    why: str | None = None  # it failed

    @property
    def answer(self) -> Rollout:
        """The last row, as the answer that was asked for."""
        last = self.rollouts[-1]
        return replace(last, sample_id=last.episode_id)

    def asked(self, problem: Problem) -> Problem:
        """The problem as the episode's prompt has it."""
        return replace(problem, messages=self.messages, tools=self.tools)


def play(
    asked: Sequence[tuple[Problem, int]],
    *,
    stage: Stage,
    sampler: Sampler,
    renderer: Renderer,
    task: Task,
    params: SamplingParams,
    identity: tuple[int | str, ...],
    policy_version: int,
    group_size: int,
    progress: Progress | None = None,
    kept: Callable[[list[Played]], None] | None = None,
) -> list[Played]:
    """An episode for every (problem, sample id), in order, graded. kept, progress: as in `sample_rollouts`.

    Raises UserError where no environment at all could begin, or gave siblings different prompts.
    """
    params = replace(params, stop=stage.stop)
    played = _Play(stage, sampler, renderer, task, params, identity, policy_version, group_size, progress, kept)
    try:
        # Episodes take as many calls of the sampler as they have turns, and ranks have other episodes each.
        with sampler.gathered() if isinstance(sampler, Gathering) else nullcontext():
            return played.through(asked)
    except EnvironmentDown:  # its processes are gone, and the episodes with them
        played.opened.clear()
        raise
    finally:
        played.leave()


@dataclass(slots=True)
class _Play:
    """One call of `play`."""

    stage: Stage
    sampler: Sampler
    renderer: Renderer
    task: Task
    params: SamplingParams
    identity: tuple[int | str, ...]
    policy_version: int
    group_size: int
    progress: Progress | None
    kept: Callable[[list[Played]], None] | None
    episodes: list[Episode] = field(default_factory=list)
    suffixes: list[Suffixes] = field(default_factory=list)  # of each episode
    done: dict[int, Played] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)  # for what the environment says to a turn
    ungraded: list[Episode] = field(default_factory=list)  # ended, and the task has not graded them yet
    opened: set[int] = field(default_factory=set)

    def through(self, asked: Sequence[tuple[Problem, int]]) -> list[Played]:
        self._begin(asked, self._reset(asked))
        while len(self.done) < len(asked):
            if self.stage.go_ahead:
                self._hear_soon()
            live = [e for e in self.episodes if e.ended is None and e.number not in self.waiting]
            if live and (self.stage.go_ahead or not self.waiting):
                self._round(live)
            else:
                self._hear(_LOOK_S)
            self._grade()
            self._tell()
        return [self.done[number] for number in range(len(asked))]

    def leave(self) -> None:
        """Whatever happened, no episode stays open, and nothing that one says is heard later."""
        for number in sorted(self.opened):
            self.stage.pool.close_episode(number)
        self.opened.clear()
        self.stage.pool.replies(0.0)

    def _reset(self, asked: Sequence[tuple[Problem, int]]) -> dict[int, Reply]:
        """What every environment says first."""
        pool, told = self.stage.pool, dict[int, Reply]()
        for number, (problem, _) in enumerate(asked):
            self.opened.add(number)
            pool.reset(number, problem, seed_from(*self.identity, problem.id, "reset"))
        while len(told) < len(asked):
            told |= {reply.episode: reply for reply in pool.replies(_LOOK_S)}
            self._tell()
        crashes = [reply.crash for _, reply in sorted(told.items()) if reply.crash is not None]
        is_barren = bool(crashes) and len(crashes) == len(asked)
        self.stage.num_barren = self.stage.num_barren + 1 if is_barren else 0
        self.stage.has_begun |= bool(asked) and not is_barren
        if is_barren and (not self.stage.has_begun or self.stage.num_barren >= MOST_BARREN):
            raise UserError(f"the environment {pool.name} could not begin one of {len(asked)} episodes: {crashes[0]}")
        return told

    def _begin(self, asked: Sequence[tuple[Problem, int]], told: Mapping[int, Reply]) -> None:
        limits, stage = replace(self.stage.limits, turn_tokens=self.params.max_answer_tokens), self.stage
        begun: dict[str, tuple[Reply, Problem, Suffixes, Row, bool]] = {}
        for number, (problem, sample_id) in enumerate(asked):
            reply = told[number]
            if reply.crash is None and problem.id not in begun:
                said = replace(problem, messages=reply.prompt or (), tools=reply.tools if stage.shows_tools else ())
                if reply.tools and stage.calls is None:
                    raise UserError(
                        f"the environment {stage.pool.name} offers tools to problem {problem.id}, and it is not known "
                        "how the model calls one; set episode.calls"
                    )
                words = self.renderer.with_tools(said.tools)
                row = Row(prompt_ids=words.prompt_ids(said.messages))
                end = words.tokenizer.decode(row.prompt_ids[-_LAST:], skip_special_tokens=False)
                in_thought = bool(OPENED_THINKING.search(end))
                begun[problem.id] = reply, said, stage.suffixes(words), row, in_thought
            if problem.id in begun:
                first, problem, suffixes, row, in_thought = begun[problem.id]
                if reply.crash is None and (first.prompt, first.tools) != (reply.prompt, reply.tools):
                    raise UserError(
                        f"the environment {stage.pool.name} gave two episodes of problem {problem.id} different "
                        "prompts; what reset says must depend on the problem and the seed alone"
                    )
            else:
                suffixes, in_thought = stage.suffixes(self.renderer), False
                row = Row(prompt_ids=self.renderer.prompt_ids(problem.messages))
            episode = Episode(
                number=number,
                problem=problem,
                sample_id=sample_id,
                limits=limits,
                has_tools=bool(reply.tools),
                in_thought=in_thought,
                rows=[Row(prompt_ids=row.prompt_ids)],
            )
            self.episodes.append(episode)
            self.suffixes.append(suffixes)
            if reply.crash is not None:
                episode.why = reply.crash
                self._end(episode, "failure")
            elif not episode.has_room:
                self._end(episode, "token_limit")

    def _round(self, live: Sequence[Episode]) -> None:
        def finished(answers: Mapping[int, Sampled]) -> None:
            for place, answer in answers.items():
                self._said(live[place], answer)
            self._hear(0.0)

        prompts, seeds = [episode.row.stream for episode in live], [self._seed(episode) for episode in live]
        self.sampler.sample(prompts, seeds, self.params, lambda done, total: self._tell(), finished)

    def _tell(self) -> None:
        """May raise Interrupted."""
        if self.progress is not None:
            self.progress(len(self.done), len(self.episodes))

    def _seed(self, episode: Episode, *what: str) -> int:
        number = len(episode.turns)
        later: tuple[int | str, ...] = (*what, number) if what else ("turn", number) if number else ()
        return seed_from(*self.identity, episode.problem.id, episode.sample_id, *later)

    def _said(self, episode: Episode, answer: Sampled) -> None:
        """A turn of the model has ended: the environment is asked."""
        ids, finish = episode.say(answer)
        tokenizer, number = self.renderer.tokenizer, len(episode.turns)
        written = ids[:-1] if ids and ids[-1] in self.stage.stop_ids else ids
        text = str(tokenizer.decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        calls: tuple[Call, ...] = ()
        if self.stage.calls is not None and episode.has_tools and finish == "stop":  # a turn that was cut calls nothing
            calls = parse_calls(text, self.stage.calls, in_thought=episode.in_thought, turn=number).calls
        self.stage.counts.num_turns += 1
        self.stage.counts.num_at_text += finish == "stop" and len(written) == len(ids)
        self.stage.counts.num_reencoded += self._reencodes(text, written)
        action = Action(text=text, token_ids=tuple(ids), calls=calls, finish=finish, turn=number)
        self.waiting.add(episode.number)
        episode.pending = action
        self.stage.pool.step(episode.number, action, self._seed(episode, "env"))

    def _reencodes(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the text of a turn is encoded to other ids than were sampled."""
        try:
            return self.renderer.encode(text) != tuple(ids)
        except UserError:
            return True

    def _hear(self, wait_s: float) -> None:
        """What environments have said; waits so long for one of them."""
        for reply in self.stage.pool.replies(wait_s):
            episode = self.episodes[reply.episode]
            if reply.grade is not None:
                episode.grade = reply.grade
                self._finish([episode])
            elif reply.step is not None:
                self.waiting.discard(episode.number)
                self._stepped(episode, reply, reply.step)

    def _hear_soon(self) -> None:
        """Most tools answer at once: who would come a moment late does not wait for a whole round."""
        until_s = time.monotonic() + _GRACE_S
        while self.waiting and (left_s := until_s - time.monotonic()) > 0:
            self._hear(left_s)

    def _stepped(self, episode: Episode, reply: Reply, step: Step) -> None:
        action, suffixes = episode.pending, self.suffixes[episode.number]
        assert action is not None
        shown = [suffixes.shown(str(m["content"]), episode.limits.observation_tokens) for m in step.messages]
        said = [one.text if self.stage.history == "keep" else self.renderer.torn(one.text) for one in shown]
        messages = tuple({**m, "content": text} for m, text in zip(step.messages, said, strict=True))
        invalid = sum(failure == "invalid_call" for failure in reply.failures) or int(step.failure == "invalid_call")
        episode.answered(action, replace(step, messages=messages), invalid, reply.seconds)
        ended, num_heard, other_stop = episode.end_of(step), 0, False
        if ended is None and not messages and step.history is None:
            ended, episode.why = "failure", "its step said nothing and was not done"
        if ended is None:
            suffix = suffixes.after(action.token_ids[-1] if action.token_ids else None, messages) if messages else None
            if step.history is not None:
                episode.told = told_anew(step.history, suffixes, episode.limits.observation_tokens)
                episode.num_told = len(episode.turns)
            try:
                if suffix is not None and step.history is None and self.stage.history == "keep":
                    heard = episode.hears(suffix)
                else:
                    heard = self._rerendered(episode)
                num_heard = len(suffix.ids) if heard and suffix is not None else 0
                other_stop = suffix is not None and suffix.other_stop
                ended = None if heard and episode.has_room else "token_limit"
            except UserError as refusal:  # of the template, of what the model wrote (no words and no call, for one)
                ended, episode.why = "failure", str(refusal)
        record = TurnRecord(
            finish=action.finish,
            num_calls=len(action.calls),
            reward=step.reward,
            failure=step.failure,
            failures=tuple(failure for failure in reply.failures if failure is not None),
            messages=messages,
            observation_tokens=num_heard,
            cut_tokens=sum(one.num_cut_tokens for one in shown),
            num_control=sum(one.num_control for one in shown),
            other_stop=other_stop,
            info=step.info,
            env_seconds=reply.seconds,
        )
        episode.records.append(record)
        if ended is not None:
            episode.why = episode.why or reply.crash
            self._end(episode, ended)

    def _messages(self, episode: Episode, num_turns: int | None = None) -> list[Message]:
        """What was said behind the prompt, in so many turns, as the chat template is given it."""
        since = episode.turns[episode.num_told : num_turns]
        turns = messages_of(since, self.stage.calls, in_thought=episode.in_thought)
        return [*episode.told, *self.suffixes[episode.number].as_role(turns)]

    def _rerendered(self, episode: Episode) -> bool:
        """As a server would: the whole conversation through the chat template."""
        history = self._messages(episode)
        words = self.suffixes[episode.number].renderer
        return episode.goes_on(words.prompt_ids([*episode.problem.messages, *history]), history)

    def _end(self, episode: Episode, ended: Ended) -> None:
        episode.ended = ended
        if episode.is_failed or not episode.turns:
            self._finish([episode])
        elif self.stage.pool.grades:
            self.stage.pool.grade(episode.number, episode.transcript)
        elif can_grade(self.task, episode.problem):
            self.ungraded.append(episode)
        else:
            self._finish([episode])

    def _grade(self) -> None:
        """What the task is to grade: the last turn of the model."""
        if not self.ungraded:
            return
        ended, self.ungraded = self.ungraded, []
        items = [(e.problem, self.renderer.answer_text(e.turns[-1].action.token_ids)) for e in ended]
        for episode, grade in zip(ended, self.task.grade(items), strict=True):
            episode.grade = grade
        self._finish(ended)

    def _compare(self, episode: Episode) -> None:
        """The stream beside what the template shows of the same conversation, for the first episodes."""
        is_one = self.stage.history == "keep" and len(episode.rows) == 1 and not episode.num_told
        if not is_one or len(episode.turns) < 2 or episode.number >= COMPARED:
            return
        words, last = self.suffixes[episode.number].renderer, len(episode.turns) - 1
        begun = episode.row.turn.index(last)  # where the last turn begins
        before = self._messages(episode, last)
        try:
            shown = words.prompt_ids([*episode.problem.messages, *before])
        except UserError:  # of what was said, not of a stand-in; the template may refuse a call that cannot be read
            return
        stream = (*episode.row.prompt_ids, *episode.row.ids[:begun])
        self.stage.counts.drift.append(compared(stream, shown).num_tokens)

    def _finish(self, ended: Sequence[Episode]) -> None:
        finished: list[Played] = []
        for episode in ended:
            self._compare(episode)
            if episode.is_failed and len(self.stage.failed) < MOST_FAILURES:
                self.stage.failed.setdefault(episode.why or "it took too long", False)
            played = self.done[episode.number] = Played(
                messages=episode.problem.messages,
                tools=episode.problem.tools,
                rollouts=tuple(episode.rollouts(self.policy_version, self.group_size)),
                said=() if self.kept is None else tuple(self._messages(episode)),
                why=episode.why,
            )
            self.stage.pool.close_episode(episode.number)
            self.opened.discard(episode.number)
            finished.append(played)
        if self.kept is not None:
            self.kept(finished)
