"""What `train` itself would say: the models are there and fit each other, the data can be used, answers are graded."""

from __future__ import annotations

from typing import Any

from opdkit.doctor.findings import Finding, failed, passed, warned
from opdkit.doctor.patient import Patient
from opdkit.types import Example, base_name

LEAST_LEAK = 10  # characters of a solution; shorter ones stand in many prompts
MOST_SHOWN = 8  # rows among which the one with most views is shown


def models(patient: Patient) -> Finding:
    """Data, student and teachers are made as `train` makes them; what it would warn of is said here."""
    run = patient.run
    known = patient.sides.warnings
    said = [sentence for sentence in run.warn.said if sentence not in known]
    if said:
        return warned(f"train would warn of {len(said)}: {said[0]}", "see the sentence", said[1:])
    size = sum(parameter.numel() for parameter in run.parts.student.module.parameters())
    others = [model.name for model in run.state.models if model is not run.parts.student]
    beside = f", beside {', '.join(others)}" if others else ""
    return passed(f"{run.parts.student.name}, {size:,} parameters{beside}; {len(run.problems)} problems")


def answers(patient: Patient) -> Finding:
    """The recipe's own way of making answers makes some, and they are graded."""
    rollouts = [rollout for group in patient.groups for rollout in group.rollouts]
    graded = [rollout for rollout in rollouts if rollout.reward is not None]
    ended = sum(rollout.finish == "stop" for rollout in rollouts)
    said = f"{len(rollouts)} answers to {len(patient.groups)} problems"
    if not rollouts or not any(rollout.answer_ids for rollout in rollouts):
        return failed(f"{said}, all of them empty", "look at what the student reads (below), and at model.stop_tokens")
    if crashes := [*patient.run.task.new_crashes()]:
        return failed(f"{said}: {crashes[0]}", "correct the grader; an answer that it fails on is left ungraded")
    if not graded and patient.state.needs.reward:
        return failed(
            f"{said}, none of which could be graded; {patient.recipe.method.name} learns from rewards",
            "use data with gold answers, or another data.task",
        )
    if patient.is_cut:
        most = patient.dose.answer_tokens
        return passed(f"{said}, cut at {most} tokens here: {ended} ended by themselves, {len(graded)} graded")
    if not ended:
        return warned(
            f"{said}, none of which ended within sampling.max_answer_tokens",
            "raise it, or look at the stop tokens and the chat template",
        )
    return passed(f"{said}: {ended} ended by themselves, {len(graded)} graded")


def views(patient: Patient) -> Finding:
    """Every view reads the question, and something that the student does not where its context says so; the student
    does not read the solution."""
    rows, state = patient.rows, patient.state
    ours = patient.run.parts.renderer.tokenizer
    for row in rows:
        solution = _plain(row.problem.solution or "")
        if len(solution) >= LEAST_LEAK and solution in _plain(ours.decode(row.rollout.prompt_ids)):
            return warned(
                f"the student's prompt of problem {row.problem.id} holds its solution, so nothing is left to learn",
                "data.columns: the prompt's column must not have it (where it is one of the options, all is well)",
            )
    if not state.needs.views:
        return passed(f"{patient.recipe.method.name} asks no view")
    silent, lines = [], []
    for name in state.asked:
        read = [row for row in rows if name in row.views]
        shown = [row for row in read if row.views[name].context_ids != row.rollout.prompt_ids]
        cut = sum(row.views[name].num_truncated_tokens for row in read)
        unsaid = sum(name not in row.signals for row in read)
        viewer = state.viewers[read[0].views[name].by or base_name(name)] if read else None
        lost = [
            row for row in read if viewer and not _question_is_read(row, name, ours, viewer.teacher.renderer.tokenizer)
        ]
        if lost:
            return failed(
                f"the view {name!r} does not read the question of problem {lost[0].problem.id}",
                "its context or its chat template leaves the question out: correct [context] or the template",
            )
        if unsaid:
            return warned(
                f"{unsaid} of {len(read)} rows are longer than the view {name!r} can read, and leave its terms",
                "lower sampling.max_answer_tokens or what the context shows, or use a model with more positions",
            )
        if not read:
            silent.append(name)
        elif viewer and viewer.context.kind != "none" and not shown:
            return failed(
                f"the view {name!r} has the context {viewer.context.kind!r}, and reads what the student reads",
                "its context shows nothing: look at its keys and at the data's columns",
            )
        lines.append(f"{name}: reads {len(read)} of {len(rows)} rows, {cut} tokens cut off what it is shown")
    if silent:
        return warned(
            f"nothing to read for {', '.join(silent)}, of {len(rows)} rows here",
            "with peers: no answer was right among so few (--problems, --answer-tokens ask more); else see [context]",
            lines,
        )
    return passed(f"{len(state.asked)} views read the question, and what their contexts show", lines)


def _question_is_read(row: Example, name: str, ours: Any, theirs: Any) -> bool:
    """Whether the last words of the user stand in what a view reads, as they do in the student's prompt."""
    question = _plain(row.problem.messages[-1]["content"])
    if question not in _plain(ours.decode(row.rollout.prompt_ids)):
        return True  # the tokenizer changes texts, so nothing can be said
    return question in _plain(theirs.decode(row.views[name].context_ids))


def _plain(text: str) -> str:
    return "".join(text.split())


def side_by_side(patient: Patient) -> list[dict[str, str]]:
    """What the student and each view read of the first row, as text."""
    if "heard" in patient.lacking or "heard" not in patient.made:
        return []
    rows, state = patient.rows, patient.state
    row = max(rows[:MOST_SHOWN], key=lambda one: len(one.views))
    found = [{"reader": "student", "text": patient.run.parts.renderer.tokenizer.decode(row.rollout.prompt_ids)}]
    for name, view in row.views.items():
        renderer = state.viewers[view.by or base_name(name)].teacher.renderer
        found.append({"reader": name, "text": renderer.tokenizer.decode(view.context_ids)})
    answer = patient.run.parts.renderer.tokenizer.decode(row.rollout.answer_ids)
    return [*found, {"reader": "answer", "text": answer}]
