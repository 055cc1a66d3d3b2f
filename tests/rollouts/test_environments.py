"""The environments that come with opdkit, each by itself; how workers hold them is in test_workers.py."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdkit.errors import UserError
from opdkit.rollouts.environments import functions
from opdkit.rollouts.environments.base import Action, Call, Step, Transcript
from opdkit.rollouts.environments.calculator import Calculator, calculator
from opdkit.rollouts.environments.functions import FunctionTools, ToolError, pure, schema_of
from opdkit.rollouts.environments.game import _MOVES, Game
from opdkit.rollouts.environments.held import Held, maker_of
from opdkit.rollouts.environments.python import Python, _shared
from opdkit.rollouts.environments.replay import Replay
from opdkit.rollouts.environments.schema import tool_faults
from opdkit.types import Problem

PROBLEM = Problem(id="p", task="none", messages=({"role": "user", "content": "What is 17*23?"},))


def action(*calls: tuple[str, dict[str, Any]]) -> Action:
    return Action(text="", calls=tuple(Call(name, said, None, f"c{place}") for place, (name, said) in enumerate(calls)))


def step(environment: Any, *calls: tuple[str, dict[str, Any]]) -> Step:
    """As a worker takes it."""

    async def taken() -> Step:
        said = environment.step(action(*calls), 0)
        return said if isinstance(said, Step) else await said

    return asyncio.run(taken())


def contents(said: Step) -> list[str]:
    return [message["content"] for message in said.messages]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 * 23", "391"), ("(17 * 23 - 4) / 3", "129"), ("2^10", "1024"), ("2**-2", "0.25"), ("-3^2", "-9"),
        ("7 // 2 + 7 % 4", "6"), ("10 ÷ 4 =", "2.5"), ("sqrt(16) + sqrt(2)", "5.41421356237"),
        ("1 / 3", "0.333333333333"), ("round(2.675, 2)", "2.68"),
        ("min(3, 2, 1) - pi", "-2.14159265359"), ("10^(-400)", "1E-400"),
    ],
)  # fmt: skip
def test_calculator(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("1 / 0", "division by zero"), ("9^9^9", "too large"), ("9**9999", "too large"),
        ("(" * 60 + "1" + ")" * 60, "deep"),
        ("2^" * 60 + "2", "deep"), ("((1)", "not closed"), ("1 +", "too early"), ("__import__('os')", "is not known"),
        ("exit(1)", "'exit' is not expected"), ("exp(100000)", "no value"), ("1" * 1001, "1000 characters"),
        ("", "early"),
        ("1e999 * 1e999", "too large"), ("sqrt(1, 2)", "does not take 2"), ("(-8)^(1/3)", "root"),
        ("1 2", "not expected"),
    ],
)  # fmt: skip
def test_what_the_calculator_refuses(expression: str, sentence: str) -> None:
    """In microseconds, and as the model reads it."""
    said = step(Calculator(), ("calculator", {"expression": expression}))
    assert sentence in contents(said)[0] and contents(said)[0].startswith("error: ")
    assert said.messages[0]["failure"] == "tool_error"


def multiply(a: int, b: int = 2) -> int:
    """Multiplies.

    Args:
        a: The one.
        b: The other.
    """
    return a * b


def test_functions_are_tools() -> None:
    tools = FunctionTools([multiply])
    assert tools.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The one."},
            "b": {"type": "integer", "description": "The other."},
        },
        "required": ["a"],
    }
    assert list(tool_faults(tools.tools)) == [] and tools.reset(PROBLEM, 0) == PROBLEM.messages
    said = step(tools, ("multiply", {"a": 17, "b": 23}), ("multiply", {"a": 2}))
    assert said == Step(
        messages=tuple(
            {"role": "tool", "name": "multiply", "tool_call_id": f"c{n}", "content": content}
            for n, content in enumerate(["391", "4"])
        )
    )
    assert step(tools) == Step(done=True)
    with pytest.raises(UserError, match=r"the tool <lambda> cannot be described: .* a tool has type hints"):
        schema_of(lambda a: a)


def test_functions_that_wait_fail_and_repeat_themselves() -> None:
    calls = []

    async def slow(city: str) -> list[str]:
        """Waits.

        Args:
            city: Where.
        """
        await asyncio.sleep(0)
        if city == "Nowhere":
            raise ToolError("no such city")
        return [city, "é"]

    @pure
    def counted(a: int) -> int:
        """Counts.

        Args:
            a: What.
        """
        calls.append(a)
        return 1 // a

    functions._kept.clear()
    tools = FunctionTools([slow, counted])
    said = step(tools, ("slow", {"city": "Oslo"}), ("slow", {"city": "Nowhere"}), *[("counted", {"a": 1})] * 3)
    assert contents(said) == ['["Oslo", "é"]', "error: no such city", "1", "1", "1"] and calls == [1]
    failed = step(tools, *[("counted", {"a": 0})] * 2)
    assert contents(failed) == ["error: ZeroDivisionError: integer division or modulo by zero"] * 2
    assert calls == [1, 0, 0], "a failure is not kept"


def test_a_list_of_functions_is_an_environment() -> None:
    held = Held(maker_of([multiply], "TOOLS"), {}, 4)
    assert held.described["grades"] is False and held.described["is_async"] is False
    with pytest.raises(UserError, match="TOOLS is no environment: it is neither a class"):
        maker_of([3], "TOOLS")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("42", "step returned str, not a Step"),
        (Step(messages=["42"]), "has the role 'str'"),
        (Step(messages=[{"role": "assistant", "content": "42"}]), "has the role 'assistant'"),
        (Step(messages=[{"role": "user", "content": 42}]), "not made of text alone"),
        (Step(messages=[{"role": "user", "content": "", "name": "x" * 2000}]), "a name or an id of over 1000"),
        (Step(messages=[{"role": "user", "content": "", "image": "x"}]), "has the key 'image'"),
        (Step(reward=float("nan")), "the reward of a step is nan"),
        (Step(failure="bad luck"), "the failure of a step is 'bad luck'"),
    ],
)
def test_what_a_step_cannot_be(said: Any, sentence: str) -> None:
    """One sentence, which becomes the episode's failure."""

    class Odd:
        def reset(self, problem: Problem, seed: int) -> Any: ...

        def step(self, action: Action, seed: int) -> Any:
            return said

    held = Held(maker_of(Odd, "Odd"), {}, 4)
    action_said = {"text": "", "token_ids": [], "calls": [], "finish": "stop", "turn": 0}
    with pytest.raises((TypeError, ValueError), match=sentence):
        asyncio.run(held.step(action_said, 0))


@pytest.fixture
def python() -> Iterator[Any]:
    made: list[Python] = []

    def make(**options: Any) -> Python:
        made.append(Python(**options))
        return made[-1]

    yield make
    for environment in made:
        environment.close()
    for interpreters in _shared.values():
        interpreters.close()
    _shared.clear()


def test_python(python: Any) -> None:
    """With state, one interpreter an episode; without, a new one for every call; and what ends one is said."""
    kept, fresh = python(state=True, time_limit_s=1.0), python()
    assert contents(step(kept, ("python", {"code": "x = 6"}), ("python", {"code": "print('a')\nx * 7"}))) == [
        "",
        "a\n42",
    ]
    assert "NameError" in contents(step(fresh, ("python", {"code": "x = 6"}), ("python", {"code": "x"})))[1]
    other = python(state=True)
    assert "NameError" in contents(step(other, ("python", {"code": "x"})))[0], "episodes share nothing"
    said = step(kept, ("python", {"code": "print(x)\nwhile True: pass"}))
    assert contents(said)[0].endswith("error: it ran longer than 1 s; what was defined is lost")
    assert said.messages[0]["failure"] == "timeout"
    assert "NameError" in contents(step(kept, ("python", {"code": "x"})))[0]
    ended = step(kept, ("python", {"code": "import os; os._exit(3)"}))
    assert contents(ended) == ["error: it ended with status 3; what was defined is lost"]
    denied = step(kept, ("python", {"code": "open('/etc/passwd')"}))
    assert contents(denied)[0].endswith("PermissionError: [Errno 13] Permission denied: '/etc/passwd'")


def test_game() -> None:
    """Siblings play the same game; the shortest way earns what it should; nonsense costs."""
    games = [Game(size=4), Game(size=4)]
    shown = [game.reset(PROBLEM, 7)[0]["content"] for game in games]
    assert shown[0] == shown[1] != Game(size=4).reset(PROBLEM, 8)[0]["content"]
    game = games[0]
    assert contents(game.step(Action(text="perhaps"), 0))[0].startswith("Say up, down, left or right.")
    rewards: list[float | None] = []
    said = Step()
    while not said.done:
        aim = game._door if game._has_key else game._key
        near = [word for word, (down, right) in _MOVES.items()
                if game._is_free(there := (game._at[0] + down, game._at[1] + right))
                and game._distance(there, aim) < game._distance(game._at, aim)]  # fmt: skip
        said = game.step(Action(text=f"<think>left? no</think>I go {near[0]}."), 0)
        rewards.append(said.reward)
    assert rewards.count(1.0) == 2 and set(rewards) <= {1.0, 0.1} and said.info == {"won": 1.0}
    assert game.grade(PROBLEM, Transcript(prompt=(), turns=(), ended="done")).score == 1.0
    lost = Game(max_moves=1)
    lost.reset(PROBLEM, 7)
    assert lost.step(Action(text="nothing"), 0) == Step(done=True, reward=-0.1, info={"won": 0.0})


def test_replay(tmp_path: Path) -> None:
    """What was said is said again, by the same calls; what was not called is not known; the ids are the new calls'."""

    def turn(name: str, said: str) -> dict[str, Any]:
        messages = [{"role": "tool", "name": name, "tool_call_id": "old", "content": said}]
        return {"messages": json.dumps(messages), "reward": None if name == "a" else float(said)}

    asked = [[("role", "user"), ("content", "How is Oslo?")]]
    tools = json.dumps(Calculator().tools)
    went = [[turn("a", "1"), turn("b", "2")], [turn("a", "1")], [turn("a", "7"), turn("b", "8")], [turn("c", "3")]]
    of = [0, 1, 2, 1]  # the second episode is in two rows
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    (tmp_path / "rows").mkdir()
    columns = {"problem_id": ["p"] * 4, "sample_id": range(4), "episode": of, "tools": [tools] * 4, "turns": went}
    columns["ended"] = ["answer", "done", "answer", "done"]
    messages = pa.array([asked] * 4, type=kind)
    pq.write_table(pa.table({**columns, "messages": messages}), tmp_path / "rows" / "step_000001.parquet")
    replay = Replay(str(tmp_path))
    assert replay.reset(PROBLEM, 0) == ({"role": "user", "content": "How is Oslo?"},)
    first = step(replay, ("a", {}))
    assert contents(first) == ["1"] and first.messages[0]["tool_call_id"] == "c0"
    assert contents(step(replay, ("d", {}))) == ["error: nothing is recorded of this call here"]
    assert first.reward is None and not first.done
    third = step(replay, ("c", {}))
    assert (contents(third), third.reward, third.done) == (["3"], 3.0, True) and step(replay).done
    with pytest.raises(LookupError, match="no episode of problem q is recorded"):
        replay.reset(Problem(id="q", task="none", messages=()), 0)
    with pytest.raises(UserError, match="has no rows"):
        Replay(str(tmp_path / "none"))


def test_search(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason='needs the extra: pip install "opdkit[search]"')
    from opdkit.rollouts.environments.search import Search

    rows = [{"title": "Oslo", "text": "Oslo is the capital of Norway."}, {"text": "Bergen is rainy " + "very " * 99}]
    rows += [{"text": f"Document number {n} of many."} for n in range(9)]
    collection = tmp_path / "places.jsonl"
    collection.write_text("\n".join(map(json.dumps, rows)))
    search = Search(str(collection), k=2, max_characters=40)
    asked = ["Norway capital?", "rainy", "xyzzy", "many"]
    said = contents(step(search, *[("search", {"query": query}) for query in asked]))
    assert said[0] == "[1] Oslo\nOslo is the capital of Norway."
    assert said[1] == "[1] Bergen is rainy very very very very very ..." and said[2] == "nothing was found"
    assert said[3] == "[1] Document number 0 of many.\n\n[2] Document number 1 of many.", "of equal ones, the first"
    for bad, sentence in (("nothing.jsonl", "there is no file"), ("bad.jsonl", "no text in a column text")):
        (tmp_path / "bad.jsonl").write_text('{"title": "x"}')
        with pytest.raises(UserError, match=sentence):
            Search(str(tmp_path / bad))
