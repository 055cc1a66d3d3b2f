"""The adapters with the packages themselves, in an environment that has them: `make test-agents`."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opdkit.rollouts.environments.base import Action, Call, Transcript
from opdkit.rollouts.environments.options import resolve_environment
from opdkit.rollouts.environments.workers import Pool, Reply
from opdkit.types import Problem

pytestmark = pytest.mark.agents

SERVER = '''
import sys
import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Guess(Action):
    """Guesses a digit."""
    number: int

class Said(Observation):
    text: str = ""

class Digits(Environment[Guess, Said, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True
    def reset(self, seed=None, episode_id=None, **given):
        self.secret, self.kept = (seed or 0) % 10, State(episode_id=episode_id, step_count=0)
        return Said(text="Guess a digit.", done=False)
    def step(self, action, timeout_s=None, **given):
        right = action.number == self.secret
        return Said(text="right" if right else "wrong", done=right, reward=1.0 if right else -0.25)
    @property
    def state(self):
        return self.kept

uvicorn.run(create_fastapi_app(Digits, Guess, Said, max_concurrent_envs=8), port=int(sys.argv[1]), log_level="error")
'''

TOOLS = '''
import verifiers as vf
from datasets import Dataset

def multiply(a: int, b: int) -> int:
    """Multiplies.

    Args:
        a: one
        b: other
    """
    return a * b

def correct(completion, answer, **given):
    return float(str(answer) in str(completion[-1].content))

def load_environment(max_turns: int = 5):
    data = Dataset.from_list([{"question": "17*23?", "answer": "391"}])
    rubric = vf.Rubric(funcs=[correct])
    return vf.ToolEnv(dataset=data, tools=[multiply], rubric=rubric, max_turns=max_turns, system_prompt="Use tools.")
'''


def last(pool: Pool) -> Reply:
    (reply,) = pool.replies(120)
    return reply


def call(name: str, **arguments: Any) -> Action:
    return Action(text="", calls=(Call(name, arguments, None, "c0"),))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("openenv")
    (tmp_path / "server.py").write_text(SERVER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"import sys, runpy, json; sys.path[:] = json.loads(sys.argv.pop()); sys.argv = ['', '{port}']; "
    code += f"runpy.run_path('{tmp_path / 'server.py'}', run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(sys.path)])
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.5)
    yield url
    process.kill()
    process.wait()


def test_openenv(server: str) -> None:
    pool = Pool(resolve_environment({"name": "openenv", "url": server}), workers=1, tool_timeout_s=30)
    assert [tool["function"]["name"] for tool in pool.tools] == ["act"] and pool.grades
    pool.reset(0, Problem(id="p", task="none", messages=({"role": "user", "content": "Play."},)), 13)
    started = last(pool)
    assert started.prompt is not None and started.prompt[-1]["content"] == "Play.\n\nGuess a digit."
    said = []
    for number in (5, 3):
        pool.step(0, call("act", number=number), 1)
        said.append(last(pool).step)
    assert [(s.messages[0]["content"], s.reward, s.done) for s in said] == [
        ("wrong", -0.25, False), ("right", 1.0, True)
    ]  # fmt: skip
    pool.grade(0, Transcript(prompt=(), turns=(), ended="done"))
    assert last(pool).grade.score == 0.0  # its rewards are those of the turns, and count once
    pool.close()


def test_verifiers(tmp_path: Path) -> None:
    verifiers = pytest.importorskip("verifiers")
    if not hasattr(verifiers, "MultiTurnEnv"):
        pytest.skip("version 1 has no MultiTurnEnv")
    file = tmp_path / "my_vf.py"
    file.write_text(TOOLS)
    chosen = {"name": "verifiers", "environment": f"{file}:load_environment", "args": {"max_turns": 3}}
    pool = Pool(resolve_environment(chosen), workers=1, tool_timeout_s=60)
    assert [tool["function"]["name"] for tool in pool.tools] == ["multiply"] and pool.grades
    question = Problem(id="p", task="none", gold="391", messages=({"role": "user", "content": "17*23?"},))
    pool.reset(0, question, 1)
    assert [message["role"] for message in last(pool).prompt] == ["system", "user"]
    pool.step(0, call("multiply", a=17, b=23), 1)
    said = last(pool).step
    assert [(m["name"], m["content"]) for m in said.messages] == [("multiply", "391")] and not said.done
    pool.step(0, Action(text="It is 391."), 1)
    assert last(pool).step.done
    pool.grade(0, Transcript(prompt=(), turns=(), ended="answer"))
    assert last(pool).grade.score == 1.0
    pool.close()
