"""Student and teacher side by side, before a weight is loaded: how each is asked, how it ends, which ids both know.

`opdkit train`, `opdkit fit` and `opdkit check --models` say the same sentences, and this is where they come from. What
would ruin a run is refused; what is probably not meant is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from opdkit.contexts.render import Renderer
from opdkit.engines.tokens.aligned import align
from opdkit.engines.tokens.stops import find_stops
from opdkit.engines.tokens.vocabulary import common_ids
from opdkit.errors import UserError
from opdkit.evaluation.episodes import check_stage
from opdkit.recipe import Recipe, TeacherSection, load_recipe
from opdkit.recipe.load import read_toml
from opdkit.recipe.pipeline import is_pipeline, load_pipeline
from opdkit.recipe.stage_kinds import Asked
from opdkit.training.models.side import QUESTION, Doubt, Side, Words, read_words, student_reading, teacher_reading
from opdkit.training.models.side_doubts import (
    aligned_sentence,
    check_lists,
    merges_digits,
    own_warnings,
    pair_faults,
    pair_warnings,
    thought_faults,
)


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
    said, faults, sides = own_warnings(pupil, recipe.model), list[Doubt](), dict[str, Side]()
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
    if faults := list(thought_faults(pupil, tutor) if aligned else pair_faults(pupil, tutor, common)):
        return tutor, faults, []
    unread = sorted(model.template_kwargs.keys() - reading["template_kwargs"].keys())
    if aligned:
        ours_theirs = [(side.renderer, side.stops.end, side.name) for side in (pupil, tutor)]
        alignment = align(*ours_theirs, pair_stops=section.pair_stops)
        check_lists(recipe, alignment, label)
        said = [Doubt("vocabulary", aligned_sentence(pupil, tutor, alignment))]
        if section.span == "exact" and merges_digits(pupil, alignment):
            sentence = (
                f'{label}.span = "exact": the two tokenizers cut numbers at other places, and what this teacher says '
                "of the digits that are left alone is about other numbers; a tiny student became worse by it. Use "
                'method.support = "sampled" with span = "even", "macro" or "proportional" '
                "(docs/guides/another_tokenizer.md)"
            )
            said.append(Doubt("vocabulary", sentence))
    else:
        said = pair_warnings(pupil, tutor, section)
    if section.is_other_model or section.close_thinking:
        said += own_warnings(tutor, section)
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
