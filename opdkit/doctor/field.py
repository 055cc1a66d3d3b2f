"""Faults that were found lately in the field: right code that teaches the wrong thing. Each needs answers to look at.

Limits are our choice where no source is named; papers give trends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from opdkit.doctor.findings import Finding, not_checked, passed, warned
from opdkit.doctor.patient import DISTRIBUTION, Patient
from opdkit.doctor.trainer import states_of
from opdkit.engines.tokens.stops import texts_of
from opdkit.losses import Head, head_stats
from opdkit.rollouts.single_turn import dataset_groups
from opdkit.training.models.base_teacher import Teacher
from opdkit.types import Asked, Example, Problem, View

SAMPLED = Asked("sampled")
MORE = "ask more and longer answers: --problems 32 --answer-tokens 1024"
LEAST_ROWS = 2
STOP_RATIO, STOP_ELSEWHERE = 0.1, 0.5  # of the student's probability of stopping; of what the teacher puts on any stop
AGREES = 0.9  # arXiv:2607.23731 measures 0.68 in answers that fail
HARM = 0.05  # nats a token by which a context lowers right answers; arXiv:2607.05184 measures up to 17 % of accuracy
STARVED = 0.5  # of the share of problems that a domain was given; D3-MOPD and arXiv:2608.19098 balance tokens
STEPS_LOOKED_AT = 64


def stop_disagreement(patient: Patient) -> Finding:
    """Where an answer ends, does the teacher end it, and by the same token? ("When EOS Tokens Disagree", 2026)"""
    teacher, rows = _whole_teacher(patient)
    if teacher is None:
        return not_checked("no teacher that gives whole distributions in the student's tokens reads these answers")
    student = patient.state.student
    # Of an episode, the environment may have had the last word.
    ended = [row for row in rows if row.rollout.finish == "stop" and row.rollout.answer_ids[-1] in student.stop_ids]
    kind = "answers that ended"
    if not ended:
        ended, kind = _solutions(patient, teacher), "of the data's solutions"
    if not ended:
        return not_checked("no answer ended by itself, and the data has no solutions", MORE)
    stops = sorted(token for token in student.stop_ids if token < student.num_tokens)
    ours = _at_end(patient.head, _student_states(patient, ended), stops)
    signals = teacher.score([r.views["teacher"].context_ids for r in ended], _answers(ended), DISTRIBUTION,
                            temperature=1.0)  # fmt: skip
    states = [signal.hidden_TH for signal in signals if signal.hidden_TH is not None]
    theirs = _at_end(signals[0].head, states, stops)
    own = [stops.index(row.rollout.answer_ids[-1]) for row in ended]
    at = np.arange(len(ended))
    student_any, teacher_any = ours.sum(1).mean(), theirs.sum(1).mean()
    teacher_own = theirs[at, own].mean()
    said = (
        f"at the end of {len(ended)} {kind} the student stops with {student_any:.2f}, the teacher with "
        f"{teacher_any:.2g}, of which {teacher_own:.2g} by the same token"
    )
    fix = "one chat template for both, or model.stop_tokens as the teacher ends; else a cold start on its answers (sft)"
    if teacher_any - teacher_own > STOP_ELSEWHERE * teacher_any and teacher_any > 0.05:
        other = stops[int(theirs.mean(0).argmax())]
        return warned(f"{said}; it would rather end by {texts_of(student.tokenizer, [other])}", fix)
    if teacher_any < STOP_RATIO * student_any:
        return warned(f"{said}: it would go on, and teaches longer answers", fix)
    return passed(said)


def _at_end(head: Head | None, states: Sequence[torch.Tensor], ids: Sequence[int]) -> np.ndarray:
    """[rows, ids] probabilities behind the last token before the end."""
    assert head is not None
    last_RH = torch.stack([hidden_TH[-1] for hidden_TH in states]).to(head.weight_VH.device)
    columns = [
        head_stats(last_RH, head, sampled_ids_N=torch.full((len(last_RH),), token, device=last_RH.device))
        for token in ids
    ]
    found = [one.sampled_logprob_N for one in columns]
    return torch.stack([one for one in found if one is not None], -1).double().exp().cpu().numpy()


def privileged_teacher(patient: Patient) -> Finding:
    """Does a context take probability from right answers, and no more of it from wrong ones? On what is solved it then
    teaches away from what works: most of all the thinking of models that think (arXiv:2607.05184).

    Answers of the student itself lose a little by any context that moves its own weights (a KL), so wrong ones are the
    measure where there are some."""
    viewers = patient.state.viewers
    if all(viewer.context.kind == "none" for viewer in viewers.values()):
        return not_checked("no teacher reads a context")
    read = [row for row in patient.rows if "teacher" in row.views and row.rollout.reward is not None]
    read = [row for row in read if viewers[row.views["teacher"].by or "teacher"].context.kind != "none"]
    right = [row for row in read if (row.rollout.reward or 0.0) >= 1.0]
    whole = [row for row in read if row not in right and (row.rollout.finish == "stop" or not patient.is_cut)]
    gains = [gain for row in right if (gain := _gain(patient, row)) is not None]
    losses = [gain for row in whole if (gain := _gain(patient, row)) is not None]
    if len(gains) < LEAST_ROWS:
        return not_checked(f"{len(gains)} of {len(patient.rows)} answers are right and read with a context", MORE)
    mean, wrong = float(np.mean(gains)), float(np.mean(losses)) if len(losses) >= LEAST_ROWS else None
    beside = "" if wrong is None else f", to one of {len(losses)} wrong answers {wrong:+.3f}"
    said = f"its context gives a token of {len(gains)} right answers {mean:+.3f} nats in the teacher's eyes{beside}"
    if mean < -HARM and (wrong is None or mean <= wrong):
        thinks = "; the student thinks, and it is thinking that gets rarer" if _thinks(patient) else ""
        return warned(
            f"{said}: it pulls the student away from what it does right{thinks}",
            "another context ([context] peers), weights.problems that leave solved problems out (paced), or none",
        )
    return passed(said)


def _gain(patient: Patient, row: Example) -> float | None:
    """Nats a token by which the teacher finds an answer likelier with its context than without; None: it cannot say."""
    viewer = patient.state.viewers[row.views["teacher"].by or "teacher"]
    teacher, answer = viewer.teacher, row.rollout.answer_ids
    contexts = [row.views["teacher"].context_ids, teacher.renderer.asked_ids(row.problem, row.rollout.history)]
    if not teacher.can_say(SAMPLED) or not all(teacher.fits(context, answer) for context in contexts):
        return None
    with_context, without = teacher.score(contexts, [answer, answer], SAMPLED, temperature=1.0)
    assert with_context.sampled_logprob_T is not None and without.sampled_logprob_T is not None
    gain_T = with_context.sampled_logprob_T.astype(np.float64) - without.sampled_logprob_T
    return float(np.nanmean(gain_T[row.rollout.answer_mask]))


def _thinks(patient: Patient) -> bool:
    texts = (patient.run.parts.renderer.tokenizer.decode(answer) for answer in patient.answer_ids)
    return patient.sides.student.thinking == "inside a thought" or any("<think" in text for text in texts)


def agreement_on_failures(patient: Patient) -> Finding:
    """In answers that fail, does the teacher still write what the student wrote? Then the tokens that matter drown
    (arXiv:2607.23731: 68 % of tokens agree)."""
    table = patient.table
    if table is None:
        return not_checked("no teacher that gives whole distributions reads these answers")
    graded = [row.rollout.reward for row in patient.rows]
    whole = [not patient.is_cut or row.rollout.finish == "stop" for row in patient.rows]
    groups = {
        kind: [n for n, (reward, is_whole) in enumerate(zip(graded, whole, strict=True))
               if reward is not None and is_whole and (reward >= 1.0) == (kind == "right")]
        for kind in ("right", "wrong")
    }  # fmt: skip
    agree = {
        kind: float(table.columns["top1_agreement"][np.isin(table.row_N, numbers)].mean())
        for kind, numbers in groups.items()
        if len(numbers) >= LEAST_ROWS and np.isin(table.row_N, numbers).any()
    }
    if "wrong" not in agree:
        return not_checked(f"{len(groups['wrong'])} of {len(whole)} answers are whole, graded and wrong", MORE)
    said = f"both have the same likeliest token at {agree['wrong']:.0%} of the tokens of wrong answers"
    if "right" in agree:
        said += f", at {agree['right']:.0%} of right ones"
    if agree["wrong"] >= AGREES:
        return warned(
            f"{said}: few tokens say what is wrong",
            'weights.tokens (name = "soft_or" or "divergence") keeps those that do; or a reward beside it (grpo_opd)',
        )
    return passed(said)


def starving_domains(patient: Patient) -> Finding:
    """Every domain of [route] or data.train gets its share of problems, and of tokens."""
    run, recipe = patient.run, patient.recipe
    route = recipe.route
    if route is None and isinstance(recipe.data.train, str):
        return not_checked("one set, one teacher")
    steps = min(recipe.train.steps, STEPS_LOOKED_AT)
    drawn = [problem for step in range(steps) for problem in run.drawn.of_step(step)]
    of_problem = _domain_of(patient)
    problems = Counter(of_problem(problem) for problem in drawn)
    wanted = {one.domain: one.share for one in recipe.data.sets if one.domain}
    expected = dict.fromkeys(route.views, 0.0) if route is not None else {}
    expected |= {name: share for name, share in wanted.items() if name is not None}
    lengths: dict[str, list[int]] = {}
    for row in patient.rows:
        lengths.setdefault(of_problem(row.problem), []).append(int(row.rollout.answer_mask.sum()))
    tokens = {name: problems[name] * float(np.mean(own)) for name, own in lengths.items() if own}
    total_problems, total_tokens = sum(problems.values()), sum(tokens.values())
    lines, starved = [], []
    for name in dict.fromkeys([*expected, *problems]):
        of_problems = problems[name] / max(1, total_problems)
        of_tokens = tokens.get(name, 0.0) / max(1.0, total_tokens)
        fair = expected.get(name) or of_problems
        lines.append(f"{name}: {of_problems:.0%} of the problems of {steps} steps, {of_tokens:.0%} of the tokens")
        by_domain = route is not None and route.denominator == "domain"
        if not problems[name] or of_problems < STARVED * fair or (not by_domain and of_tokens < STARVED * fair):
            starved.append(name)
    if starved:
        return warned(
            f"{', '.join(starved)}: hardly a problem or a token in {steps} steps",
            'data.train shares; route.denominator = "domain" counts each domain alike, however long its answers',
            lines,
        )
    return passed(f"{len(lines)} domains get their share of {steps} steps", lines)


def _domain_of(patient: Patient) -> Callable[[Problem], str]:
    route = patient.recipe.route
    if route is not None:
        return route.domain_of
    found = {problem.id: name for name, part in patient.run.data.parts.items() for problem in part.problems}
    return lambda problem: str(found[problem.id])


def _solutions(patient: Patient, teacher: Teacher) -> list[Example]:
    """The data's own solutions as answers that end, read by the teacher without a context."""
    some = [problem for problem in patient.problems if problem.solution is not None]
    groups = dataset_groups(
        some,
        renderer=patient.run.parts.renderer,
        stop_id=patient.state.student.end_id,
        max_answer_tokens=patient.recipe.longest_answer,
        policy_version=0,
    )
    found = []
    for group in groups:
        view = View(context_ids=teacher.renderer.asked_ids(group.problem))
        row = Example(problem=group.problem, rollout=group.rollouts[0], views={"teacher": view})
        if row.rollout.finish == "stop" and teacher.fits(view.context_ids, row.rollout.answer_ids):
            found.append(row)
    return found


def _student_states(patient: Patient, rows: Sequence[Example]) -> list[torch.Tensor]:
    return states_of(patient.state, patient.weights, [row.rollout.prompt_ids for row in rows], _answers(rows))


def _whole_teacher(patient: Patient) -> tuple[Teacher | None, list[Example]]:
    """The teacher of the most rows that gives whole distributions in the student's own tokens, and those rows."""
    rows, said = patient.heard
    readers = Counter(teacher for teacher, signal in said.values() if signal.spans is None)
    if not readers:
        return None, []
    teacher = readers.most_common(1)[0][0]
    return teacher, [row for row in rows if row.rollout.key in said and said[row.rollout.key][0] is teacher]


def _answers(rows: Sequence[Example]) -> list[tuple[int, ...]]:
    return [row.rollout.answer_ids for row in rows]
