"""One raw row -> one `Problem`: which column is the question, which the answer, what is asked of the model.

A row is read by its own columns, so a file may mix schemas. Rows of `opdkit data prepare` (`prepared.py`) are taken as
they are; of others:

    question   `prompt` (chat turns or text), `problem`, `question`; else a conversation (`layouts.py`: `messages`,
               ShareGPT, Alpaca); `system` becomes a system turn before text and before a conversation without one
    gold       `reward_model.ground_truth` (verl), `answer`, `final_answer`, `expected_answer`, `ground_truth`, `gold`;
               what follows `####` on its last line (GSM8K), or its last boxed answer, where there is one;
               without such a column, the last boxed answer of `solution`
    solution   `solution`, `reference_solution`; else the whole `answer` text where gold was found inside it; else what
               the assistant answers at the end of a conversation.
               GSM8K's calculator marks (`48/2 = <<48/2=24>>24`) are removed: nobody should learn to write them;
               where the question asks for a box, its last line `#### 72` becomes `\\boxed{72}`; for an answer line,
               `Answer: 72`.
    id         `id`, `problem_id`, `unique_id`, ..., `extra_info.index`; else a digest of the question
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from opdkit.data.files.sources import Row
from opdkit.data.files.unusable import Unusable
from opdkit.data.prepared import KINDS, from_verl, is_prepared
from opdkit.data.schemas.code_tests import published_tests
from opdkit.data.schemas.conversations import (
    BESIDE,
    CONVERSATIONS,
    Conversation,
    alpaca,
    as_text,
    asked_of,
    chat_turns,
    conversation,
)
from opdkit.data.schemas.media import MEDIA, check_without_media
from opdkit.data.schemas.templates import INSTRUCTIONS
from opdkit.data.schemas.values import column_text, lookup, plain
from opdkit.errors import UserError
from opdkit.tasks.math.text import last_boxed
from opdkit.types import Message, Problem

# Columns of no role: of prepared rows (`prepared.py`), and of SDPO's and MOPD's code rows.
_OTHER_COLUMNS = {"task", "gold", "meta", "tests", *CONVERSATIONS, *BESIDE}
INSTRUCTION_NAMES = ("auto", "none", *INSTRUCTIONS)

# Role -> columns, tried in this order; a dot goes into a nested column. The first that is filled in is taken.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "problem", "question"),
    "answer": (
        "reward_model.ground_truth",
        "answer",
        "final_answer",
        "expected_answer",
        "ground_truth",
        "gold",
    ),
    "solution": ("solution", "reference_solution"),
    "system": ("system",),
    "id": ("id", "problem_id", "unique_id", "question_id", "task_id", "problem_idx", "uuid", "idx", "extra_info.index"),
    "meta": (
        "data_source",
        "ability",
        "source",
        "subject",
        "topic",
        "domain",
        "level",
        "difficulty",
        "type",
        "kind",
    ),
}

_LAST_LINE_MARK = re.compile(r"^####[ \t]+(\S[^\n]*)\s*\Z", re.MULTILINE)
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
# Asking for a box (empty, or with a placeholder) is not the same as showing one inside the question.
_ASKS_FOR_BOX = re.compile(
    r"\\boxed(?:\s*\{\s*(?:\{\s*\}|<[^<>]*>|\.{3}|\\[lc]?dots|[\w\s-]*answer[\w\s-]*)?\s*\}|(?!\s*[{\d]))",
    re.IGNORECASE,
)


class Schema:
    """How the rows of one source become problems.

    columns: role -> column name (for "meta": names), replacing the defaults of that role in `COLUMNS`.
    require_gold: False keeps rows that nobody can grade, with gold None or (code) without tests: a method that needs no
        reward learns from the prompt alone.
    asked: columns that reward functions want as they stand, `Problem.row`; "*": all. The question is among them,
        under "prompt".
    kept: columns of any name, whose texts become `Problem.columns`.
    """

    def __init__(
        self,
        *,
        task: str,
        instruction: str = "auto",
        columns: Mapping[str, str | Sequence[str]] | None = None,
        require_gold: bool = True,
        asked: Sequence[str] = (),
        kept: Sequence[str] = (),
    ) -> None:
        self._asked = asked
        if instruction not in INSTRUCTION_NAMES:
            raise UserError(_unknown("instruction", instruction, INSTRUCTION_NAMES))
        self.columns = dict(COLUMNS)
        self._given = bool(columns)  # who names the columns decides what a row is
        self._given_prompt = "prompt" in (columns or {})
        for role, names in (columns or {}).items():
            if role not in COLUMNS:
                raise UserError(_unknown("columns", role, tuple(COLUMNS)))
            self.columns[role] = (names,) if isinstance(names, str) else tuple(names)
        self.task, self.instruction, self.require_gold, self.kept = task, instruction, require_gold, tuple(kept)
        self._present: dict[tuple[str, ...], dict[str, list[str]]] = {}

    def keep(self, present: Sequence[str]) -> list[str]:
        """The columns worth reading. All of them if no question is among them, so that the refusal can list them."""
        named = [name for names in (*self.columns.values(), self.kept) for name in names]
        wanted = _OTHER_COLUMNS | {*MEDIA} | {*self.kept} | {name.partition(".")[0] for name in named}
        questions = (*self.columns["prompt"], *CONVERSATIONS)
        if "*" in self._asked or not any(name.partition(".")[0] in present for name in questions):
            return list(present)
        return [name for name in present if name in wanted or name in self._asked]

    def problem(self, row: Row) -> Problem:
        """Raises Unusable with the reason."""
        try:
            problem = self._problem(row)
            given = self._as_asked(row) if self._asked else {}
            return replace(problem, row=given, columns=self._kept(row, problem.meta) if self.kept else {})
        except RecursionError:
            raise Unusable("the row is nested too deeply") from None

    def _problem(self, row: Row) -> Problem:
        own = None if self._given else row if is_prepared(row) else _own_verl(row)
        if own is not None:
            return self._prepared(own)
        check_without_media(row)
        question, answer = self._conversation(row)
        asked = self._instructed(question)
        gold, solution = self._gold_and_solution(row, answer)
        solution = None if solution is None else as_asked(solution, asked.style)
        tests: dict[str, Any] = {}
        if self.task == "code":  # graded by its tests, and `gold` is not read
            given = self._tests(row)
            gold, tests = None, {} if given is None else published_tests(given)
        elif gold is None and self.require_gold:
            raise Unusable(self._why_no_gold(row))
        meta = tests | {
            name: plain(value)
            for name in self._present_columns(row)["meta"]
            if (value := lookup(row, name)) is not None
        }
        if asked.style == "answer_line":
            meta["answer_style"] = asked.style
        if asked.added:
            meta["instruction"] = asked.added
        return Problem(
            id=self.given_id(row) or question_digest(question),
            task=self.task,
            messages=asked.messages,
            gold=gold,
            solution=solution,
            meta=meta,
        )

    def _as_asked(self, row: Row) -> dict[str, Any]:
        """The columns of the row that reward functions ask for."""
        names = [name for name in row if "*" in self._asked or name in self._asked]
        kept = {name: plain(lookup(row, name)) for name in names}
        prompt = next(self._filled(row, [*self._present_columns(row)["prompt"], *CONVERSATIONS]), None)
        return kept | ({} if prompt is None else {"prompt": plain(lookup(row, prompt))})

    def _prepared(self, row: Row) -> Problem:
        """A row of `opdkit data prepare`: taken as it is, but for an instruction that is asked for now."""
        if row["task"] != self.task and self.task in KINDS:  # format, length, a user's own: they read what they like
            raise Unusable(f"the row was prepared for the task {row['task']!r}, not {self.task!r}")
        asked = self._instructed(self.messages(row))
        if row["gold"] is None and self.require_gold and self.task != "code":
            raise Unusable("no answer: gold is empty")
        try:
            meta = json.loads(row["meta"])
        except (ValueError, RecursionError) as error:
            raise Unusable(f"meta is not JSON: {error}") from None
        if not isinstance(meta, dict):
            raise Unusable("meta is not a JSON object")
        if asked.added:
            meta["instruction"] = asked.added
            meta.pop("answer_style", None)
            if asked.style == "answer_line":
                meta["answer_style"] = asked.style
        given = [name for name in ("gold", "solution") if row.get(name) is not None]
        texts: dict[str, Any] = {name: as_text(row[name], name) for name in given}
        return Problem(id=as_text(row.get("id"), "id"), task=self.task, messages=asked.messages, meta=meta, **texts)

    def _kept(self, row: Row, meta: Mapping[str, Any]) -> dict[str, str]:
        """The columns that were asked for, of the row or (`opdkit data prepare` puts them there) of its meta."""
        found = {name: lookup(row, name) for name in self.kept}
        found = {name: lookup(meta, name) if value is None else value for name, value in found.items()}
        return {
            name: column_text(value, name)
            for name, value in found.items()
            if value is not None and not (isinstance(value, str) and not value.strip())
        }

    def _tests(self, row: Row) -> Any:
        """Where SDPO's and MOPD's files keep the tests of a program; None: there are none, and none are required."""
        for name in ("tests", "reward_model.ground_truth"):
            tests = lookup(row, name)
            if tests not in (None, "", "-"):
                return tests
        if not self.require_gold:
            return None
        raise Unusable("no tests: prepare the file first (opdkit data prepare; docs/guides/data.md)")

    def given_answer(self, row: Row) -> Any:
        """The row's answer as it stands, whatever its type; None if it has none."""
        return self._first(row, "answer")

    def given_id(self, row: Row) -> str | None:
        """The row's own id, if it has one."""
        given = self._first(row, "id")
        return None if given is None else as_text(given, "id")

    def _first(self, row: Row, role: str) -> Any:
        """The first filled-in column of a role, or None."""
        name = next(self._filled(row, self._present_columns(row)[role]), None)
        return None if name is None else lookup(row, name)

    def _filled(self, row: Row, names: Sequence[str]) -> Iterator[str]:
        return (name for name in names if lookup(row, name) not in (None, ""))

    def _present_columns(self, row: Row) -> dict[str, list[str]]:
        """Role -> the columns of that role which this row has; worked out once per set of columns."""
        names = tuple(row)
        if names not in self._present:
            self._present[names] = {
                role: [name for name in columns if name in row or name.partition(".")[0] in row]
                for role, columns in self.columns.items()
            }
        return self._present[names]

    def messages(self, row: Row) -> tuple[Message, ...]:
        """The chat turns to be answered, as the row has them, without any instruction of ours. Raises Unusable."""
        return self._conversation(row).asked

    def _conversation(self, row: Row) -> Conversation:
        name = next(self._filled(row, self._present_columns(row)["prompt"]), None)
        if name is None and not self._given_prompt:
            name = next(self._filled(row, CONVERSATIONS), None)
        if name is None:
            raise Unusable(self._why_no("prompt", "question", row))
        found, system = lookup(row, name), self._first(row, "system")
        if name == "prompt" and not isinstance(found, str):  # verl's `system` column is in its turns already
            return Conversation(asked_of(chat_turns(found)), None)
        if name == "instruction":
            said = alpaca(row)
        elif isinstance(found, str):
            said = Conversation(({"role": "user", "content": as_text(found, "prompt")},), None)
        else:
            said = conversation(chat_turns(found))
        if name in CONVERSATIONS and row.get("tools"):
            raise Unusable("the row has tools, which cannot be rendered")
        if system is None or said.asked[0]["role"] == "system":
            return said
        return said._replace(asked=({"role": "system", "content": as_text(system, "system")}, *said.asked))

    def _instructed(self, question: tuple[Message, ...]) -> _Asked:
        """The question with the instruction it needs."""
        text = question[-1]["content"]
        boxed, line = _ASKS_FOR_BOX.search(text) is not None, "Answer:" in text
        add = self.instruction
        if add == "auto":  # only mathematics has these two conventions; other tasks say what they want in their prompts
            add = "boxed" if self.task == "math" and not boxed and not line else "none"
        if (add == "boxed" and boxed) or (add == "answer_line" and line):
            add = "none"
        if add != "none":
            content = f"{text.rstrip()}\n\n{INSTRUCTIONS[add]}"
            question = (*question[:-1], {**question[-1], "content": content})
            boxed, line = boxed or add == "boxed", line or add == "answer_line"
        style: Literal["boxed", "answer_line"] | None = "boxed" if boxed else "answer_line" if line else None
        return _Asked(question, style, INSTRUCTIONS[add] if add != "none" else None)

    def _gold_and_solution(self, row: Row, answered: str | None) -> tuple[str | None, str | None]:
        """answered: by the assistant, at the end of a conversation."""
        answer, solution = self._first(row, "answer"), self._first(row, "solution")
        solution = answered if solution is None else as_text(solution, "solution")
        if answer is None:
            return (None, None) if solution is None else (_final_answer(solution), solution)
        try:
            text = _gold_text(answer, json_allowed=self.task != "math")
        except Unusable:
            if self.require_gold:
                raise
            text = None  # as unknown as none
        if text is None:
            return None, solution
        gold = _final_answer(text)
        if gold is None:
            return text, solution
        is_worked = gold != text and not text.startswith("\\boxed")
        return gold, _CALCULATOR_MARK.sub("", text) if solution is None and is_worked else solution

    def _why_no_gold(self, row: Row) -> str:
        if self._first(row, "answer") is None and self._first(row, "solution") is not None:
            return "the solution holds no \\boxed{} answer and there is no answer column"
        return self._why_no("answer", "answer", row)

    def _why_no(self, role: str, word: str, row: Row) -> str:
        present = self._present_columns(row)[role]
        if present:
            return f"no {word}: {present[0]} is empty"
        accepted = self.columns[role] + (self.columns["solution"] if role == "answer" else ())
        rest = f", nor {', '.join(CONVERSATIONS)}" if role == "prompt" and not self._given_prompt else ""
        return f"no {word} column among {', '.join(row) or 'no columns at all'} (accepted: {', '.join(accepted)}){rest}"


class _Asked(NamedTuple):
    messages: tuple[Message, ...]
    style: Literal["boxed", "answer_line"] | None  # how the final answer is to be written, if anything is said of it
    added: str | None  # the instruction that was appended, kept in meta["instruction"]


def _own_verl(row: Row) -> Row | None:
    try:
        return from_verl(row)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unusable(f"extra_info.opdkit is not what opdkit data prepare writes: {error!r:.100}") from None


def as_asked(solution: str, style: Literal["boxed", "answer_line"] | None) -> str:
    """GSM8K's last line `#### 72` as the prompt wants it: who learns from the solution must learn what the grader
    reads."""
    if style is None:
        return solution
    return _LAST_LINE_MARK.sub(
        lambda mark: f"\\boxed{{{mark[1].strip()}}}" if style == "boxed" else f"Answer: {mark[1].strip()}", solution
    )


def _gold_text(answer: Any, *, json_allowed: bool) -> str | None:
    """The answer column as text; a list of one is that one; other structures are JSON text where the task reads it."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        return None
    if isinstance(answer, (list, dict)):
        if not json_allowed:
            raise Unusable(f"the answer is a {type(answer).__name__} of {len(answer)}, not one answer")
        return json.dumps(plain(answer), ensure_ascii=False)
    return as_text(answer, "answer").strip()


def _final_answer(text: str) -> str | None:
    """The last line's `#### 42` (GSM8K), else the last boxed answer, else None."""
    marked = _LAST_LINE_MARK.search(text)
    if marked is not None:
        return marked[1].strip()
    return last_boxed(text) or None


def question_digest(messages: Sequence[Message]) -> str:
    """16 hexadecimal digits of the question before any instruction: the id does not change with the instruction."""
    text = "\x1e".join(f"{turn['role']}\x1f{turn['content']}" for turn in messages)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _unknown(key: str, value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"{key}: {value!r} is not known; {hint}"
