"""From [episode] to where episodes are played, and what is refused before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from opdkit.contexts.drift import drift_warnings
from opdkit.contexts.render import Renderer
from opdkit.contexts.suffix import Suffixes
from opdkit.engines.tokens.stop_strings import StopStrings
from opdkit.errors import UserError
from opdkit.recipe.build import sentences
from opdkit.recipe.episode import EpisodeSection
from opdkit.recipe.load import read_sections
from opdkit.rollouts.environments.workers import Pool
from opdkit.rollouts.episode import Limits
from opdkit.rollouts.stage import Stage
from opdkit.rollouts.tools import CALL_FORMATS, CallFormat
from opdkit.types import Message

Reads = tuple[Renderer, frozenset[int]]  # how a model reads, and what ends its turns
# What a chat template writes that shows calls of this format.
_MARKS: Mapping[CallFormat, tuple[str, ...]] = {
    "harmony": ("<|channel|>",),
    "mistral": ("[TOOL_CALLS]",),
    "hermes": ("<tool_call>",),
    "llama3": ("ipython", "<|python_tag|>"),
}

_CALLS: Mapping[CallFormat, str] = {
    "harmony": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]',
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
    "llama3": '{"name": "f", "parameters": {"x": 1}}',
}


def make_stage(
    section: EpisodeSection,
    renderer: Renderer,
    stop_ids: frozenset[int],
    *,
    positions: int | None,
    turn_tokens: int,
    go_ahead: bool = False,
) -> Stage:
    """Starts the environment's workers; to be closed by its pool.

    positions: of a prompt and its answer together. turn_tokens: the most of one turn. go_ahead: where the section does
    not say. Raises UserError where the environment cannot be made, or it is not known how the model calls its tools.
    """
    pool = _pool(section)
    try:
        return Stage(
            pool=pool,
            limits=Limits(
                turn_tokens=turn_tokens,
                whole=section.max_episode_tokens,
                max_turns=section.max_turns,
                observation_tokens=section.max_observation_tokens,
                invalid_calls=section.max_invalid_calls,
                repeats=section.max_repeats,
                env_seconds=section.episode_timeout_s,
                positions=positions,
                truncated=section.truncated,
            ),
            stop_ids=stop_ids,
            calls=_call_format(section, renderer, must=bool(pool.tools)),
            shows_tools=section.show_tools == "template",
            role=section.observations,
            closers=section.turn_closers,
            history=section.history,
            stop=section.stop,
            go_ahead=go_ahead if section.go_ahead is None else section.go_ahead,
        )
    except BaseException:
        pool.close()
        raise


def check_stage(
    section: EpisodeSection,
    student: tuple[Renderer, frozenset[int]],
    teachers: Mapping[str, tuple[Renderer, frozenset[int]]],
) -> list[str]:
    """What is doubtful about the models' chat templates in episodes. student, teachers (by their sections' names): how
    each reads, and what ends its turns.

    Raises UserError for a template that does not show what an environment says, or offers no tools, and for a teacher
    that would read other tokens between the turns than the student.
    """
    with closing(_pool(section)) as pool:
        tools = pool.tools
    shown = tools if section.show_tools == "template" else ()
    names = [str(tool["function"]["name"]) for tool in tools]
    if tools:
        _call_format(section, student[0])
    _check_stop(section, student[0], has_tools=bool(tools))
    own = _suffixes(section, student, shown)
    own.check(names)
    for where, teacher in teachers.items():
        theirs = _suffixes(section, teacher, shown)
        for messages in _probes(names):
            if _ids(own, messages) != _ids(theirs, messages):
                raise UserError(
                    f"{where}: its chat template writes other tokens between the turns of an episode than the "
                    f"student's ({theirs.renderer.name} and {own.renderer.name}), and it would read the student's; "
                    f"give both one chat template ({where}.chat_template)"
                )
    return drift_warnings(own, shown) if section.history == "keep" else []


def _check_stop(section: EpisodeSection, renderer: Renderer, *, has_tools: bool) -> None:
    """Raises UserError for texts that the model cannot write, or that would end every call before its end."""
    for text in section.stop:
        ids = renderer.tokenizer.encode(text, add_special_tokens=False)
        if StopStrings(renderer.tokenizer, (text,)).end(ids) is None:
            raise UserError(
                f"episode.stop: the tokenizer of {renderer.name} cannot write {text!r} (it makes "
                f"{renderer.tokenizer.decode(ids)!r} of it), so no turn could end there; give it as the model writes it"
            )
        call = _CALLS[_call_format(section, renderer) or "hermes"] if has_tools else ""
        if text in call[:-1] and not call.endswith(text):
            raise UserError(
                f"episode.stop: {text!r} stands within every call of a tool, which would be cut there; remove it, or "
                "give the text that ends a call"
            )


def _suffixes(
    section: EpisodeSection, side: tuple[Renderer, frozenset[int]], tools: Sequence[Mapping[str, Any]]
) -> Suffixes:
    renderer, stop_ids = side
    return Suffixes(renderer.with_tools(tools), stop_ids, section.turn_closers, section.observations)


def _ids(suffixes: Suffixes, messages: Sequence[Message]) -> tuple[int, ...] | None:
    """Behind a turn that was cut; None: refused."""
    try:
        return suffixes.after(None, messages).ids
    except UserError:
        return None


def _probes(names: Sequence[str]) -> Iterator[list[Message]]:
    yield [{"role": "user", "content": "1"}]
    if names:
        yield [{"role": "tool", "name": names[0], "tool_call_id": "call00000", "content": "1"}]


def _call_format(section: EpisodeSection, renderer: Renderer, *, must: bool = True) -> CallFormat | None:
    """How the model writes calls. None: unknown, where it need not be (an environment may offer tools later)."""
    if section.calls != "auto":
        return section.calls
    template = renderer.template or ""
    found = [name for name, marks in _MARKS.items() if any(mark in template for mark in marks)]
    if not found and must:
        raise UserError(
            f'episode.calls = "auto": the chat template of {renderer.name} shows no call of a tool, so it is not known '
            f"how the model writes one; set it to one of {', '.join(CALL_FORMATS)}"
        )
    return found[0] if found else None


def _pool(section: EpisodeSection) -> Pool:
    return Pool(
        section.environment,
        workers=section.workers,
        max_calls=section.max_calls_per_turn,
        tool_timeout_s=section.tool_timeout_s,
    )


def read_episode(path: Path) -> EpisodeSection:
    """The [episode] of a recipe. Raises UserError where it has none, or a wrong one."""
    section = read_sections(path).get("episode")
    if not isinstance(section, Mapping):
        raise UserError(f"{path} has no [episode]; name the recipe that the model was trained with")
    try:
        return EpisodeSection.model_validate(section)
    except ValidationError as error:
        raise UserError(*(f"{path}: {said}" for said in sentences(error, EpisodeSection, "episode."))) from None
