"""The answers `opdkit fit` asks for: the student's, and the teacher's from prefixes of them. Kept part by part.

    <folder>/asked.json                        what the answers are answers to; others are refused, not mixed in
    <folder>/student/problems_000-015.parquet  the student's answers to these problems (rows.py)
    <folder>/teacher/...                       the teacher's, going on from the first `prefix` tokens of the student's

A part appears whole or not at all, so a second call samples only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.contexts.render import Renderer
from opdkit.engines.base import Sampler, SamplingParams
from opdkit.errors import UserError
from opdkit.ranks.base import ALONE, Ranks
from opdkit.rollouts.single_turn import grade, sample_rollouts
from opdkit.run.folder import atomic_write
from opdkit.run.rows import load_rows, save_rows
from opdkit.run.stored_answers import check_identity
from opdkit.tasks.base import Task
from opdkit.types import Example, Problem, Rollout, seed_from


def asked_before(folder: Path) -> dict[str, Any] | None:
    """What the answers in a folder are answers to; None: there are none."""
    path = folder / "asked.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() and _has_answers(folder) else None


def _has_answers(folder: Path) -> bool:
    return any(folder.glob("*/*.parquet"))


PROBLEMS_PER_PART = 16  # what a crash can cost

Done = Callable[[int], None]  # how many answers have just become available; may raise Interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who samples and who grades, with everything that identifies an answer but its problem and number."""

    folder: Path
    task: Task
    params: SamplingParams
    seed: int
    ranks: Ranks = ALONE  # each samples its share, and the first one writes

    def open(self, asked: Mapping[str, Any]) -> None:
        """The folder is there, and locked. Raises UserError if it holds something else."""
        path, wanted = self.folder / "asked.json", json.loads(json.dumps(asked))
        if (found := asked_before(self.folder)) is not None:
            check_identity(path, found, wanted)
        elif not path.exists() and any(entry.name not in (".lock", "ranks") for entry in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not a folder of opdkit fit; choose another --out")
        else:
            atomic_write(path, json.dumps(wanted, indent=1))
        for name in ("student", "teacher"):
            (self.folder / name).mkdir(exist_ok=True)

    def student(
        self, problems: Sequence[Problem], sampler: Sampler, renderer: Renderer, num_samples: int, done: Done
    ) -> list[Example]:
        """`num_samples` graded answers to every problem, without a view, in the problems' order."""
        rows: list[Example] = []
        for place, some in _parts(problems):
            path = self.folder / "student" / f"problems_{place}.parquet"
            pairs = [(problem, sample_id) for problem in some for sample_id in range(num_samples)]

            def ask(pairs: Sequence[tuple[Problem, int]] = pairs) -> list[Example]:
                own = self.ranks.share(pairs)
                rollouts = sample_rollouts(
                    own,
                    sampler=sampler,
                    renderer=renderer,
                    task=self.task,
                    params=self.params,
                    identity=(self.seed, "fit", "student"),
                    policy_version=0,
                )
                return [Example(problem=p, rollout=r) for (p, _), r in zip(own, rollouts, strict=True)]

            rows += self._kept(path, ask)
            done(len(pairs))
        return rows

    def teacher(
        self,
        problems: Sequence[Problem],
        rows: Sequence[Example],
        prefix: int,
        sampler: Sampler,
        renderer: Renderer,
        done: Done,
    ) -> list[Example]:
        """`rows` with the answers as the teacher would have written them, had it begun with their first `prefix`
        tokens. Rows must have a view and, for a prefix, more tokens than it."""
        by_problem: dict[str, list[Example]] = {problem.id: [] for problem in problems}
        for row in rows:
            by_problem[row.problem.id].append(row)
        found: list[Example] = []
        for place, some in _parts(problems):
            asked = [row for problem in some for row in by_problem[problem.id]]
            path = self.folder / "teacher" / f"prefix_{prefix:06d}_problems_{place}.parquet"

            def go_on(asked: Sequence[Example] = asked) -> list[Example]:
                return self._gone_on(self.ranks.share(asked), prefix, sampler, renderer)

            found += self._kept(path, go_on) if asked else []
            done(len(asked))
        return found

    def _kept(self, path: Path, ask: Callable[[], list[Example]]) -> list[Example]:
        """The rows of a part, all ranks' shares of which are put there where nobody did so before."""
        if not self.ranks.from_first(path.exists):
            rows = self.ranks.from_all(ask)
            self.ranks.from_first(lambda: save_rows(path, rows))
        return self.ranks.from_first(lambda: load_rows(path))

    def _gone_on(self, rows: Sequence[Example], prefix: int, sampler: Sampler, renderer: Renderer) -> list[Example]:
        contexts, begun = [], [row.rollout.answer_ids[:prefix] for row in rows]
        for row, ids in zip(rows, begun, strict=True):
            assert row.view is not None
            contexts.append((*row.view.context_ids, *ids))
        sampled = sampler.sample(
            contexts,
            [seed_from(self.seed, "fit", "teacher", prefix, *row.rollout.key) for row in rows],
            replace(self.params, max_answer_tokens=self.params.max_answer_tokens - prefix),
        )
        rollouts = [
            Rollout(
                problem_id=row.problem.id,
                sample_id=row.rollout.sample_id,
                policy_version=0,
                prompt_ids=row.rollout.prompt_ids,
                answer_ids=(*ids, *answer.answer_ids),
                answer_logprobs=None,  # of the prefix nobody knows what the teacher would have said
                answer_mask=np.arange(prefix + len(answer.answer_ids)) >= prefix,
                author=(np.arange(prefix + len(answer.answer_ids)) >= prefix).astype(np.uint8),  # student, then teacher
                finish=answer.finish,
            )
            for row, ids, answer in zip(rows, begun, sampled, strict=True)
        ]
        graded = grade([row.problem for row in rows], rollouts, renderer, self.task)
        return [replace(row, rollout=rollout) for row, rollout in zip(rows, graded, strict=True)]


def _parts(problems: Sequence[Problem]) -> Iterator[tuple[str, Sequence[Problem]]]:
    for start in range(0, len(problems), PROBLEMS_PER_PART):
        some = problems[start : start + PROBLEMS_PER_PART]
        yield f"{start:06d}-{start + len(some) - 1:06d}", some
