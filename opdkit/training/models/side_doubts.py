"""What is wrong or doubtful with a student beside its teacher, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from opdkit.contexts.render import OPENED_THINKING
from opdkit.engines.tokens.aligned import Alignment
from opdkit.engines.tokens.stops import texts_of
from opdkit.engines.tokens.token_bytes import encode_plainly
from opdkit.engines.tokens.vocabulary import CommonIds
from opdkit.errors import UserError
from opdkit.recipe import Recipe, TeacherSection
from opdkit.recipe.model_sections import ModelSection
from opdkit.recipe.schedule import stages_of
from opdkit.training.models.side import QUESTION, Doubt, Side

SAMPLES = ("The total is 12 + 345 = 357, so x = 0.5.", "12+345=357")  # the second for models of arithmetic alone


def pair_faults(student: Side, teacher: Side, common: CommonIds | None) -> Iterator[Doubt]:
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


def thought_faults(student: Side, teacher: Side) -> Iterator[Doubt]:
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


def merges_digits(student: Side, alignment: Alignment) -> bool:
    """Whether a number is other tokens on the two sides."""
    try:
        ids = encode_plainly(student.renderer.tokenizer, "1234567")
    except Exception:  # tokenizers raises plain Exception for a character it does not know: then it writes no numbers
        return False
    return any(span.sizes != (1, 1) for span in alignment.read(ids).spans)


def aligned_sentence(student: Side, teacher: Side, alignment: Alignment) -> str:
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


def own_warnings(side: Side, section: ModelSection | TeacherSection) -> list[Doubt]:
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


def pair_warnings(student: Side, teacher: Side, section: TeacherSection) -> list[Doubt]:
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
