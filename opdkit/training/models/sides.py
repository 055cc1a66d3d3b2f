"""Student and teacher side by side, before a weight is loaded: how each is asked, how it ends, which ids both know.

`opdkit train`, `opdkit fit` and `opdkit check --models` say the same sentences, and this is where they come from. What
would ruin a run is refused; what is probably not meant is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opdkit.contexts.render import OPENED_THINKING, PLAIN, Renderer, read_chat_template, read_kwargs
from opdkit.engines.load import load_words
from opdkit.engines.tokens.aligned import Alignment, align
from opdkit.engines.tokens.stops import Stops, find_stops, texts_of
from opdkit.engines.tokens.token_bytes import encode_plainly
from opdkit.engines.tokens.vocabulary import CommonIds, common_ids
from opdkit.errors import UserError
from opdkit.evaluation.episodes import check_stage
from opdkit.recipe import Recipe, TeacherSection, load_recipe
from opdkit.recipe.load import read_toml
from opdkit.recipe.pipeline import Asked, is_pipeline, load_pipeline
from opdkit.recipe.schedule import stages_of
from opdkit.recipe.sections import ModelSection
from opdkit.types import Message

QUESTION: tuple[Message, ...] = ({"role": "user", "content": "1+1"},)  # rendered, never encoded: any template shows it
SAMPLES = ("The total is 12 + 345 = 357, so x = 0.5.", "12+345=357")  # the second for models of arithmetic alone
_CLOSED_THINKING = re.compile(r"<think\s*>\s*</think\s*>\s*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model as it reads and ends."""

    label: str  # the section of the recipe
    name: str
    renderer: Renderer
    stops: Stops

    def opening(self, messages: Sequence[Message] = QUESTION) -> str:
        """What the template writes behind the last turn's words: the end of the turn, the role, perhaps a think tag."""
        return self.renderer.prompt_text(messages).rpartition(messages[-1]["content"].strip())[2][-120:]

    @property
    def thinking(self) -> str:
        """How an answer begins."""
        opening = self.opening()
        if OPENED_THINKING.search(opening):
            return "inside a thought"
        return "behind an empty thought" if _CLOSED_THINKING.search(opening) else "without a thought"

    @property
    def bos(self) -> str | None:
        """The beginning-of-text token its prompts begin with."""
        bos: str | None = self.renderer.tokenizer.bos_token
        if bos is None:
            return None
        written = self.renderer.prompt_text(QUESTION).startswith(bos)
        return bos if written or (self.renderer.chat_template == PLAIN and self.adds_bos) else None

    @property
    def adds_bos(self) -> bool:
        """Whether its tokenizer puts one in front of every text of its own accord."""
        tokenizer = self.renderer.tokenizer
        return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


class Doubt(NamedTuple):
    """What is wrong or doubtful, and what it is about."""

    topic: Literal["templates", "think tags", "stop tokens", "vocabulary"]
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """What a recipe's models are to each other."""

    student: Side
    teachers: Mapping[str, Side]  # by the view that they read
    faults: tuple[Doubt, ...]  # what would ruin the run
    doubts: tuple[Doubt, ...]

    @property
    def teacher(self) -> Side | None:
        """Who reads the view "teacher"."""
        return self.teachers.get("teacher")

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(doubt.sentence for doubt in self.doubts)


def student_reading(recipe: Recipe, now: datetime | None) -> dict[str, Any]:
    """How the student's renderer is made (`LanguageModel.renderer`)."""
    section = recipe.model
    return {
        "template_kwargs": section.template_kwargs,
        "close_thinking": section.close_thinking,
        "system": section.system,
        "now": now,
    }


def teacher_reading(recipe: Recipe, section: TeacherSection, bare: Renderer, now: datetime | None) -> dict[str, Any]:
    """How a teacher's renderer is made: what its section does not say is as for the student. bare: without kwargs."""
    model = recipe.model
    kwargs = section.template_kwargs
    return {
        "template_kwargs": read_kwargs(bare, model.template_kwargs) if kwargs is None else kwargs,
        "close_thinking": model.close_thinking if section.close_thinking is None else section.close_thinking,
        "system": model.system if section.system is None else section.system,
        "now": now,
    }


def read_sides(recipe: Recipe, *, student: str | Path | None = None, now: datetime | None = None) -> Sides:
    """As `compare_sides`. Raises UserError with a line for each thing that would ruin the run."""
    sides = compare_sides(recipe, student=student, now=now)
    if sides.faults:
        raise UserError(*(fault.sentence for fault in sides.faults))
    return sides


def compare_sides(recipe: Recipe, *, student: str | Path | None = None, now: datetime | None = None) -> Sides:
    """Load the tokenizers and compare. student: its folder, where a run goes on from a checkpoint.

    Raises UserError for a model that cannot be read or rendered at all.
    """
    model = recipe.model
    ours = read_words(str(student or model.path), model.trust_remote_code, model.chat_template)
    stops = find_stops(ours.bare, ours.generation_config, model.stop_tokens, name=str(model.path))
    pupil = Side(
        label="model", name=model.path, renderer=ours.renderer(stops, student_reading(recipe, now)), stops=stops
    )  # fmt: skip
    pupil.opening()  # what cannot be rendered shows here
    said, faults, sides = _own_warnings(pupil, recipe.model), list[Doubt](), dict[str, Side]()
    for view, section in recipe.all_views.items():
        if section.teacher.kind == "saved":  # what it read and said is there already
            continue
        label = "teacher" if view == "teacher" else f"views.{view}.teacher"
        sides[view], wrong, doubts = _read_teacher(recipe, label, section.teacher, pupil, ours, now)
        faults += wrong
        said += [] if wrong else doubts
    if recipe.episode is not None:
        reading = {view: (side.renderer, side.stops.ids) for view, side in sides.items()}
        teachers = {"teacher" if view == "teacher" else f"views.{view}.teacher": own for view, own in reading.items()}
        try:
            told = check_stage(recipe.episode, (pupil.renderer, stops.ids), teachers)
            said += [Doubt("templates", sentence) for sentence in told]
        except UserError as error:
            faults += [Doubt("templates", sentence) for sentence in error.sentences]
    found = tuple(dict.fromkeys(faults)), tuple(dict.fromkeys(said))
    return Sides(student=pupil, teachers=sides, faults=found[0], doubts=found[1])


def _read_teacher(
    recipe: Recipe, label: str, section: TeacherSection, pupil: Side, ours: Words, now: datetime | None
) -> tuple[Side, list[Doubt], list[Doubt]]:
    """A teacher; what would ruin the run with it; what is doubtful about it beside the student."""
    model, name, stops = recipe.model, recipe.model.path, pupil.stops
    if section.is_other_model:
        assert section.path is not None
        name = section.path
        ours = read_words(name, section.trust_remote_code, section.chat_template)
        stops = find_stops(ours.bare, ours.generation_config, name=name)
    reading = teacher_reading(recipe, section, ours.bare, now)
    tutor = Side(label=label, name=name, renderer=ours.renderer(stops, reading), stops=stops)
    tutor.opening()
    aligned, common = section.tokens == "align", None
    if section.is_other_model and not aligned:
        try:
            common = common_ids(pupil.renderer, tutor.renderer, names=(pupil.name, name))
        except UserError as error:
            return tutor, [Doubt("vocabulary", sentence) for sentence in error.sentences], []
    if faults := list(_thought_faults(pupil, tutor) if aligned else _faults(pupil, tutor, common)):
        return tutor, faults, []
    unread = sorted(model.template_kwargs.keys() - reading["template_kwargs"].keys())
    if aligned:
        ours_theirs = [(side.renderer, side.stops.end, side.name) for side in (pupil, tutor)]
        alignment = align(*ours_theirs, pair_stops=section.pair_stops)
        check_lists(recipe, alignment, label)
        said = [Doubt("vocabulary", _aligned_sentence(pupil, tutor, alignment))]
        if section.span == "exact" and _merges_digits(pupil, alignment):
            sentence = (
                f'{label}.span = "exact": the two tokenizers cut numbers at other places, and what this teacher says '
                "of the digits that are left alone is about other numbers; a tiny student became worse by it. Use "
                'method.support = "sampled" with span = "even", "macro" or "proportional" '
                "(docs/guides/another_tokenizer.md)"
            )
            said.append(Doubt("vocabulary", sentence))
    else:
        said = _pair_warnings(pupil, tutor, section)
    if section.is_other_model or section.close_thinking:
        said += _own_warnings(tutor, section)
    if unread and section.template_kwargs is None:
        sentence = (
            f"the teacher's chat template reads no {', '.join(unread)}, which model.template_kwargs sets for the "
            f"student; say what the teacher reads with {label}.template_kwargs"
        )
        said.append(Doubt("templates", sentence))
    if common is not None:
        said.append(Doubt("vocabulary", common.sentence))
    return tutor, [], said


def check_models(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """What is doubtful about the models of a recipe or of a pipeline's stages, a sentence each.

    Models that a stage is yet to make are named, not looked at. Raises UserError with a line for every fault.
    """
    if not is_pipeline(read_toml(path)):
        with _in_front(f"{path}: "):
            return list(read_sides(load_recipe(path, overrides)).warnings)
    pipeline = load_pipeline(path, overrides)
    said: list[str] = []
    faults: list[str] = []
    made = {str(stage.result) for stage in pipeline.stages}
    for stage in pipeline.stages:
        asked = stage.does
        paths = [*asked.model_paths.values()] if isinstance(asked, Recipe) else [getattr(asked, "model", None)]
        if missing := [one for one in paths if one in made and not Path(one).exists()]:
            said.append(f"stage {stage.name}: {missing[0]} is not made yet, so its models were not looked at")
            continue
        try:
            with _in_front(f"{path}: stage {stage.name}: "):
                if isinstance(asked, Recipe):
                    said += [f"stage {stage.name}: {sentence}" for sentence in read_sides(asked).warnings]
                elif isinstance(asked, Asked):
                    _check_asked(asked)
        except UserError as error:
            faults += error.sentences
    if faults:
        raise UserError(*faults)
    return said


def _check_asked(asked: Asked) -> None:
    words = read_words(asked.model, asked.trust_remote_code, asked.chat_template)
    find_stops(words.bare, words.generation_config, asked.stop_tokens, name=asked.model)
    renderer = Renderer(words.tokenizer, words.chat_template, asked.template_kwargs, system=asked.system)
    renderer.prompt_text(QUESTION)


@contextmanager
def _in_front(where: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(*(where + sentence for sentence in error.sentences)) from error


@dataclass(frozen=True, slots=True)
class Words:
    """What a model reads and ends with, without its weights."""

    tokenizer: Any
    generation_config: Any
    chat_template: str | None

    @property
    def bare(self) -> Renderer:
        return Renderer(self.tokenizer, self.chat_template)

    def renderer(self, stops: Stops, reading: Mapping[str, Any]) -> Renderer:
        return Renderer(self.tokenizer, self.chat_template, stop_ids=stops.ids, **reading)


def read_words(path: str, trust_remote_code: bool, chat_template: str | None) -> Words:
    """Raises UserError for a model that is not there."""
    return Words(*load_words(path, trust_remote_code), read_chat_template(chat_template))


def _faults(student: Side, teacher: Side, common: CommonIds | None) -> Iterator[Doubt]:
    ends, ours, theirs = teacher.stops.end, student.renderer.tokenizer, teacher.renderer.tokenizer
    if ends not in student.stops.ids:
        wanted = texts_of(theirs, {*student.stops.ids, ends} & {*theirs.get_vocab().values()})
        yield Doubt(
            "stop tokens",
            f"the teacher ends its answers with {texts_of(theirs, [ends])}, which does not stop the student (it stops "
            f"at {texts_of(ours, student.stops.ids)}): it would learn to write it and go on. Give both one chat "
            f"template (model.chat_template), or set model.stop_tokens = [{wanted}]",
        )
    if common is not None and (student.stops.end >= common.end or student.stops.end in common.absent):
        shared = [token for token in student.stops.ids if token < common.end and token not in common.absent]
        way = f"set model.stop_tokens = [{texts_of(ours, shared)}]" if shared else "choose another teacher"
        yield Doubt(
            "stop tokens",
            f"the student ends its answers with {texts_of(ours, [student.stops.end])}, which the teacher's vocabulary "
            f"lacks, so no answer could be taught to end; {way}",
        )


def _thought_faults(student: Side, teacher: Side) -> Iterator[Doubt]:
    """Of models with two tokenizers, each asked in its own template."""
    inside = {side.label: side.thinking == "inside a thought" for side in (student, teacher)}
    if len({*inside.values()}) > 1:
        yield Doubt(
            "think tags",
            f"the student's answers begin {student.thinking}, the teacher's {teacher.thinking}, so the teacher would "
            "read a thought as an answer or the reverse; ask both alike (template_kwargs, close_thinking of [model] "
            "and [teacher])",
        )


def check_lists(recipe: Recipe, alignment: Alignment, label: str) -> None:
    """Raises UserError where a list is to have more candidates than both tokenizers know."""
    stages = stages_of(recipe).values()
    chosen = {"method.k": [getattr(stage.method, "k", None) for stage in stages]}
    chosen["weights.tokens.k"] = [getattr(stage.weights.tokens, "k", None) for stage in stages]
    for key, lengths in chosen.items():
        longest = max((k for k in lengths if k is not None), default=0)
        if longest > len(alignment.teacher_id):
            raise UserError(
                f'{key} = {longest}, but with {label}.tokens = "align" only the {len(alignment.teacher_id)} tokens of '
                "the same bytes on both sides are candidates; set it to that or less"
            )


def _merges_digits(student: Side, alignment: Alignment) -> bool:
    """Whether a number is other tokens on the two sides."""
    try:
        ids = encode_plainly(student.renderer.tokenizer, "1234567")
    except Exception:  # tokenizers raises plain Exception for a character it does not know: then it writes no numbers
        return False
    return any(span.sizes != (1, 1) for span in alignment.read(ids).spans)


def _aligned_sentence(student: Side, teacher: Side, alignment: Alignment) -> str:
    """How far two tokenizers agree, on a text that everybody can look at."""
    shown = ""
    for text in SAMPLES:
        try:
            ids = encode_plainly(student.renderer.tokenizer, text)
        except Exception:  # tokenizers raises plain Exception for a character it does not know
            continue
        single = sum(span.sizes == (1, 1) for span in alignment.read(ids).spans)
        shown = f", and {single} of the {len(ids)} tokens of {text!r} are one token on both sides"
        break
    num = len(alignment.teacher_id)
    return (
        f"{teacher.label}: another tokenizer. {num} of the student's {len(alignment.student.bytes_V)} tokens have one "
        f"of the same bytes{shown}; the metrics {teacher.label.removesuffix('.teacher').replace('.', '/')}/share_... "
        f"tell how much is heard in training"
    )


def _own_warnings(side: Side, section: ModelSection | TeacherSection) -> list[Doubt]:
    said = []
    if side.adds_bos and side.bos is None:
        sentence = (
            f"{side.label}: its tokenizer begins every text with {side.renderer.tokenizer.bos_token!r}, but its chat "
            f"template does not, so no prompt has one; write it into the template ({side.label}.chat_template)"
        )
        said.append(Doubt("templates", sentence))
    if side.renderer.reads_clock and side.renderer.now is not None:
        sentence = f"{side.label}: its chat template prints the date, which stays {side.renderer.now:%Y-%m-%d}"
        said.append(Doubt("templates", sentence))
    if section.close_thinking and not OPENED_THINKING.search(_left_open(side)):
        sentence = f"{side.label}.close_thinking = true closes nothing: its chat template opens no <think>; remove it"
        said.append(Doubt("think tags", sentence))
    return said


def _left_open(side: Side) -> str:
    return replace(side.renderer, close_thinking=False).prompt_text(QUESTION)


def _pair_warnings(student: Side, teacher: Side, section: TeacherSection) -> list[Doubt]:
    said = []
    chosen = [
        key for key in ("chat_template", "template_kwargs", "close_thinking") if getattr(section, key) is not None
    ]
    if student.opening() != teacher.opening() and not chosen:  # a difference that the recipe names is meant
        think = student.thinking != teacher.thinking
        how = f"{student.opening()!r}, for the teacher with {teacher.opening()!r}"
        if think:
            how += f" (the student begins {student.thinking}, the teacher {teacher.thinking})"
        sentence = (
            f"the student's answers open with {how}; ask both alike (chat_template, template_kwargs, close_thinking of "
            "[model] and [teacher]), or name the difference in [teacher]"
        )
        said.append(Doubt("think tags" if think else "templates", sentence))
    if student.bos != teacher.bos:
        sentence = (
            f"the student's prompts begin with {student.bos or 'no beginning of text'}, the teacher's with "
            f"{teacher.bos or 'none'}; make their chat templates agree, unless the models were trained so"
        )
        said.append(Doubt("templates", sentence))
    if student.stops.end not in teacher.stops.ids:
        ours, theirs = student.renderer.tokenizer, teacher.renderer.tokenizer
        sentence = (
            f"the student ends its answers with {texts_of(ours, [student.stops.end])}, the teacher with "
            f"{texts_of(theirs, [teacher.stops.end])}: the student will learn to end as the teacher does"
        )
        said.append(Doubt("stop tokens", sentence))
    return said
