"""verl's `rollout.multi_turn`: [episode], where it is on and says which tools there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.recipe.imported.lines import Fate, Imported, Line
from opdkit.recipe.imported.unlike import MOVES

_PREFIX = "rollout.multi_turn."
_FORMATS = {"hermes": "hermes", "llama3_json": "llama3", "mistral": "mistral", "gpt-oss": "harmony"}
# Key -> ours, and what is to be said of it.
_LIMITS = {
    "max_parallel_calls": ("max_calls_per_turn", "further calls are refused here, and dropped there"),
    "max_tool_response_length": ("max_observation_tokens", f"{MOVES}: it counts characters there, and tokens here"),
}
_LEFT_OUT = {
    "tokenization_sanity_check_mode": "sampled ids never go through text here",
    "use_inference_chat_template": "choose episode.history",
    "tool_response_truncate_side": f"{MOVES}: the middle is left out here",
    "interaction_config_path": f"{MOVES}: write the other side as an environment (docs/guides/agents.md)",
}


def multi_turn(known: Mapping[str, Any], imported: Imported) -> None:
    """Writes [episode]; nothing where several turns are off, or nothing says in which environment."""
    given = {key.removeprefix(_PREFIX): value for key, value in known.items() if key.startswith(_PREFIX)}
    environment = _environment(given, known)
    if not given.get("enable") or environment is None:
        return
    key, chosen, note = environment
    imported.put("episode.environment", chosen)
    imported.lines.append(Line(key, known[key], "same", "episode.environment", note))
    imported.lines.append(Line(f"{_PREFIX}enable", True, "same", "[episode]", ""))
    turns = {name: given[name] for name in ("max_assistant_turns", "max_user_turns", "max_turns") if given.get(name)}
    for name, value in turns.items():
        imported.put("episode.max_turns", min(turns.values()))
        note = "the smaller of the two" if len(turns) > 1 else ""
        imported.lines.append(Line(f"{_PREFIX}{name}", value, "same", "episode.max_turns", note))
    for name, (ours, note) in _LIMITS.items():
        if given.get(name) is not None:
            imported.put(f"episode.{ours}", given[name])
            imported.lines.append(Line(f"{_PREFIX}{name}", given[name], "same", f"episode.{ours}", note))
    if given.get("format") is not None:
        calls = _FORMATS.get(str(given["format"]))
        if calls is not None:
            imported.put("episode.calls", calls)
        note = "" if calls else "choose episode.calls"
        fate: Fate = "same" if calls else "left out"
        imported.lines.append(Line(f"{_PREFIX}format", given["format"], fate, calls and "episode.calls", note))
    for name, note in _LEFT_OUT.items():
        if given.get(name) is not None:
            imported.lines.append(Line(f"{_PREFIX}{name}", given[name], "left out", None, note))
    length = known.get("data.max_response_length")
    if length is not None:
        imported.put("episode.max_episode_tokens", length)
        note = "it bounds a whole episode there, and each of its turns"
        imported.lines.append(Line("(episode)", length, "default", "episode.max_episode_tokens", note))
    told = {line.key for line in imported.lines}
    for key in [key for key in known if key.startswith(_PREFIX) and key not in told]:
        empty = known[key] in (None, "", False)
        note = "as here" if empty else f"{MOVES}: [episode] has no such key"
        imported.lines.append(Line(key, known[key], "left out", None, note))
    if known.get("rollout.agent.default_agent_loop") == "tool_agent":
        imported.lines.append(Line("rollout.agent.default_agent_loop", "tool_agent", "same", "[episode]", ""))


def _environment(given: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[str, Any, str] | None:
    """(their key, our environment, what is said of it)"""
    for key in (f"{_PREFIX}tool_config_path", "data.tool_config_path"):
        if known.get(key):
            return key, {"name": "verl", "config": str(known[key])}, "needs verl beside opdkit"
    if given.get("function_tool_path"):
        note = "write TOOLS = [your, functions] at the end of that file"
        return f"{_PREFIX}function_tool_path", f"{given['function_tool_path']}:TOOLS", note
    return None
