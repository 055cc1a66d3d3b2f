"""What both models read and how they end: templates, think tags, stop tokens, vocabularies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkit.doctor.findings import Finding, failed, passed, warned
from opdkit.doctor.patient import Patient
from opdkit.engines.tokens.stops import texts_of
from opdkit.training.models.side import Side

ALIKE = "make [teacher] read and end as [model] does; `opdkit check --models` says the same without weights"
OPEN, CLOSE = "<think>", "</think>"


def templates(patient: Patient) -> Finding:
    """Both chat templates render the data's own problems, alike."""
    if found := _told(patient, "templates"):
        return found
    sides, ours = patient.sides, patient.sides.student.renderer
    problems = patient.data.problems[:8]
    texts = [ours.prompt_text(problem.messages) for problem in problems]
    for label, side in _others(patient):
        theirs = [side.renderer.prompt_text(problem.messages) for problem in problems]
        unlike = [number for number, text in enumerate(theirs) if text != texts[number]]
        named = patient.recipe.all_views[label].teacher
        meant = named.tokens == "align" or any(
            getattr(named, key) is not None for key in ("chat_template", "template_kwargs", "close_thinking", "system")
        )
        if unlike and not meant:
            first = unlike[0]
            return warned(
                f"{label}: {len(unlike)} of {len(problems)} problems are written in other words for the teacher",
                ALIKE,
                [f"student: {texts[first][-200:]!r}", f"{label}: {theirs[first][-200:]!r}"],
            )
    return passed(f"{len(problems)} problems are rendered; answers open with {sides.student.opening()!r}")


def think_tags(patient: Patient) -> Finding:
    """An answer begins as its prompt says: a thought is opened once and closed before the answer ends."""
    if found := _told(patient, "think tags"):
        return found
    side, rows = patient.sides.student, patient.rows
    inside = side.thinking == "inside a thought"
    texts = [side.renderer.tokenizer.decode(row.rollout.answer_ids) for row in rows]
    twice = [text for text in texts if inside and text.lstrip().startswith(OPEN)]
    unclosed = [
        text
        for text, row in zip(texts, rows, strict=True)
        if row.rollout.finish == "stop" and (OPEN in text or inside) and CLOSE not in text
    ]
    again = [text for text in texts if side.thinking == "behind an empty thought" and OPEN in text]
    for some, words in (
        (twice, "open a thought that their prompt has opened already"),
        (unclosed, "end inside a thought that was never closed"),
        (again, "think although the template closed the thought for them"),
    ):
        if some:
            return warned(
                f"{len(some)} of {len(texts)} answers {words}",
                "set model.template_kwargs (enable_thinking) or model.close_thinking to how the model was trained",
                [repr(some[0][:200])],
            )
    return passed(f"prompts begin {side.thinking}, on both sides")


def stop_tokens(patient: Patient) -> Finding:
    """What ends an answer of one side ends it for the other."""
    if found := _told(patient, "stop tokens"):
        return found
    side = patient.sides.student
    known = set(side.renderer.tokenizer.get_vocab().values())
    if side.stops.end not in known:
        return failed(f"the student's answers end with the id {side.stops.end}, which is no token", "model.stop_tokens")
    words = texts_of(side.renderer.tokenizer, side.stops.ids & known)
    return passed(f"answers end at {words}, on both sides")


def vocabulary(patient: Patient) -> Finding:
    """Rows beyond the tokenizer are neither sampled nor scored, and carry no weight where others read them."""
    if found := _told(patient, "vocabulary"):
        return found
    student = patient.state.student
    banned = {*student.absent_ids, *range(student.num_tokens, student.num_rows)}
    for name, answers in (("answers", patient.answer_ids), ("drawn answers", patient.drawn.answers)):
        if wrong := sorted({token for answer in answers for token in answer if token in banned}):
            return failed(
                f"{name} hold the ids {wrong[:5]}, which no tokenizer knows",
                "the engine must not draw ids from num_tokens on: use a server that hears allowed ids, or engine = hf",
            )
    if patient.head.num_tokens != student.num_tokens:
        return failed(
            f"the head scores {patient.head.num_tokens} ids, the tokenizer has {student.num_tokens}",
            "this is a fault of opdkit: please report it",
        )
    if student.num_rows == student.num_tokens:
        return passed(f"{student.num_tokens} ids, a row for each")
    share = _mass_on_padding(patient)
    said = f"{student.num_rows - student.num_tokens} of {student.num_rows} rows belong to no token"
    if share > 0.01 and _others_score(patient):
        return warned(
            f"{said}, and the model puts {share:.1%} of its probability there: a server's log-probs count that in",
            'teacher.payload = "hidden", or a checkpoint whose padded rows are trained down',
        )
    return passed(f"{said}; they are not sampled and not scored ({share:.2%} of the probability)")


@torch.no_grad()
def _mass_on_padding(patient: Patient) -> float:
    """Of the student's own head over all its rows, in the mean over some tokens."""
    states_NH = torch.cat(patient.states)[:64].to(patient.state.student.device)
    weight_VH = patient.head.weight_VH
    logits_NV = states_NH.float() @ weight_VH.float().T
    if patient.head.bias_V is not None:
        logits_NV += patient.head.bias_V.float()
    prob_NV = logits_NV.mul_(patient.head.logit_scale).softmax(-1)
    return float(prob_NV[:, patient.head.num_tokens :].sum(-1).mean())


def _others_score(patient: Patient) -> bool:
    return any(view.teacher.kind == "server" for view in patient.recipe.all_views.values())


def _others(patient: Patient) -> Sequence[tuple[str, Side]]:
    return [*patient.sides.teachers.items()]


def _told(patient: Patient, topic: str) -> Finding | None:
    """What comparing the models' words has said of a topic."""
    faults = [fault.sentence for fault in patient.sides.faults if fault.topic == topic]
    doubts = [doubt.sentence for doubt in patient.sides.doubts if doubt.topic == topic]
    if faults:
        return failed(faults[0], ALIKE, [*faults[1:], *doubts])
    return warned(doubts[0], ALIKE, doubts[1:]) if doubts else None
