"""A text or a column beside the problem: where it stands, what is cut, what is refused."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from opdkit.contexts.column import Column
from opdkit.contexts.text import Text
from opdkit.errors import UserError
from opdkit.recipe import parse_recipe
from opdkit.types import Group, Problem

ASKED = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1? {text}"})
BASE: dict[str, Any] = {
    "name": "r",
    "model": {"path": "m"},
    "teacher": {"kind": "self", "weights": "initial"},
    "data": {"train": "d.jsonl"},
    "method": {"name": "opd"},
    "train": {"steps": 4, "warmup_steps": 0},
}


def read(context: Any, **columns: str) -> Any:
    problem = Problem(id="p", task="math", messages=ASKED, columns=columns)

    def cut(text: str, limit: int) -> tuple[str, int]:
        return text[:limit], max(0, len(text) - limit)

    return context.read(Group(problem=problem, rollouts=()), None, cut)


def test_where_the_text_stands() -> None:
    """Braces in the text or the question are text; a system turn keeps the problem's own words."""
    assert read(Text(text="Know {question}.")).messages == (
        ASKED[0],
        {"role": "user", "content": "Know {question}.\n\n1+1? {text}"},
    )
    after = read(Text(text="hint", layout="{question} ({text}) {x}"))
    assert after.messages[-1]["content"] == "1+1? {text} (hint) {x}"
    system = read(Text(text="hint", role="system"))
    assert system.messages == ({"role": "system", "content": "hint\n\nBe brief."}, ASKED[1])
    assert system.shown == ("text",)


def test_a_column_and_its_cut() -> None:
    reading = read(Column(column="hint", max_tokens=3), hint="123456")
    assert reading.messages[-1]["content"] == "123\n\n1+1? {text}"
    assert reading.num_truncated_tokens == 3 and reading.shown == ("column",)
    assert read(Column(column="hint"), other="x") is None


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "rules.txt"
    path.write_text("  Two rules.\n")
    context = Text(file=str(path))
    assert read(context).messages[-1]["content"].startswith("Two rules.\n\n1+1?")
    path.write_text("Others.")
    assert read(context).messages[-1]["content"].startswith("Two rules.")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, words in (("none", "No such file"), ("empty", "holds no text"), ("bytes", "UTF-8")):
        with pytest.raises(UserError, match=words):
            read(Text(file=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "set one of the two"),
        ({"text": "a", "file": "b"}, "set one of the two"),
        ({"text": " "}, "no text to show"),
        ({"text": "a", "layout": "{text}"}, "once each"),
        ({"text": "a", "layout": "{text}{question}{text}"}, "once each"),
        ({"text": "a", "role": "system", "layout": "{question}{text}"}, 'not read with context.role = "system"'),
        ({"text": "a", "max_tokens": 0}, "greater than 0"),
    ],
)
def test_what_says_nothing(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Text(**keys)


def test_a_system_prompt_would_take_its_place() -> None:
    context = {"kind": "text", "text": "a", "role": "system"}
    with pytest.raises(UserError, match=r'set teacher.system = "", or role = "user"'):
        parse_recipe({**BASE, "context": context, "model": {"path": "m", "system": "s"}})
    teacher = {**BASE["teacher"], "system": ""}
    assert parse_recipe({**BASE, "context": context, "model": {"path": "m", "system": "s"}, "teacher": teacher})


def test_a_recipe_keeps_the_columns_that_it_names() -> None:
    recipe = parse_recipe({**BASE, "context": {"kind": "column", "column": "meta.hint"}})
    assert recipe.columns == ("meta.hint",) and parse_recipe(BASE).columns == ()
    assert parse_recipe(recipe.as_dict()).as_dict() == recipe.as_dict()
