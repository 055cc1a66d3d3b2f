"""Every check of `opdkit doctor` has planted faults that it must catch; docs/guides/doctor.md lists them.

A fault is put into a function that the checks call, or into a model, a recipe, a row. On the same patients without it
every check is silent.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opdkit.cost import at_hand
from opdkit.doctor import resources
from opdkit.doctor.checks import CHECKS, look
from opdkit.doctor.patient import PROBE_TEMPERATURE, Patient
from opdkit.engines import causal
from opdkit.engines.base import Sampled
from opdkit.engines.forward import prefix_tree
from opdkit.engines.hf import HFEngine
from opdkit.losses import Head
from opdkit.recipe import parse_recipe
from opdkit.recipe.load import merge
from opdkit.rollouts.episode import Row
from opdkit.training import backward
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.models.teacher import ModelTeacher
from opdkit.types import AUTHORS, Asked, Example

sys.path.append(str(Path(__file__).parents[1] / "engines" / "servers"))
from fake_server import FakeServer

TALK = """
from opdkit.rollouts.environments.base import Step

class Talk:
    tools = ()
    def __init__(self, broken: bool = False):
        self.broken = broken
    def reset(self, problem, seed):
        if self.broken and int(problem.gold) % 3 == 0:
            raise RuntimeError("closed")
        self.turn = 0
        return problem.messages
    def step(self, action, seed):
        self.turn += 1
        if self.turn == 2:
            return Step(done=True, reward=0.25)
        return Step(messages=[{"role": "user", "content": str(seed % 100)}], reward=0.5)
"""
THINKING = "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a><think>{% endif %}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ward:
    """What a fault is planted with."""

    patch: pytest.MonkeyPatch
    clean: Patient
    copied: Callable[..., Patient]
    admitted: Callable[..., Patient]
    raw: dict[str, Any]
    models: dict[str, Path]
    folder: Path

    def of(self, **sections: Any) -> Patient:
        """A patient of another recipe."""
        return self.admitted(parse_recipe(merge(self.raw, sections)))

    def rewritten(self, change: Callable[[Sampled, list[int]], Sampled]) -> Patient:
        """One whose engine changes what it has sampled."""
        sample = HFEngine.sample

        def changed(engine: HFEngine, prompts: Any, seeds: Any, params: Any, *rest: Any) -> list[Sampled]:
            found = sample(engine, prompts, seeds, params)
            found = [change(one, list(prompt)) for one, prompt in zip(found, prompts, strict=True)]
            if len(rest) > 1 and rest[1] is not None:
                rest[1](dict(enumerate(found)))
            return found

        self.patch.setattr(HFEngine, "sample", changed)
        return self.copied()

    def rows(self, change: Callable[[Example], Example]) -> Patient:
        """One whose rows are changed behind the engine."""
        patient = self.copied("gradients", "table", "states")
        rows, said = self.clean.heard
        patient.made["heard"] = ([change(row) for row in rows], said)
        return patient

    def model(self, name: str, change: Callable[[dict[str, torch.Tensor]], None], of: str = "student") -> Path:
        """A copy of a model with other weights."""
        folder = self.folder / name
        shutil.copytree(self.models[of], folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder


@dataclass(frozen=True, slots=True)
class Fault:
    check: str
    planted: str
    level: str
    words: str  # of the sentence
    plant: Callable[[Ward], Patient]


FAULTS: list[Fault] = []


def fault(check: str, planted: str, level: str, words: str) -> Callable[..., Any]:
    def add(plant: Callable[[Ward], Patient]) -> Callable[[Ward], Patient]:
        FAULTS.append(Fault(check, planted, level, words, plant))
        return plant

    return add


# Words


@fault("templates", "a teacher's chat template that opens answers in other words", "warned", "answers open with")
def _(ward: Ward) -> Patient:
    other = ward.model("other", lambda weights: None, of="teacher")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ '<a>' }}", "{{ ';<a>' }}"))
    return ward.of(teacher={"path": str(other)})


@fault("templates", "a system prompt that the teacher alone reads without being told", "warned", "in other words")
def _(ward: Ward) -> Patient:
    patient = ward.copied("sides")
    sides = ward.clean.sides
    tutor = sides.teachers["teacher"]
    other = replace(tutor, renderer=replace(tutor.renderer, system="1+1"))
    patient.made["sides"] = replace(sides, teachers={"teacher": other})
    return patient


@fault("stop tokens", "a student that does not stop where the teacher ends its answers", "failed", "does not stop the")
def _(ward: Ward) -> Patient:
    return ward.of(model={"stop_tokens": ["<|endoftext|>"]})


@fault("think tags", "a teacher that is asked inside a thought, a student that is not", "warned", "inside a thought")
def _(ward: Ward) -> Patient:
    other = ward.model("thinker", lambda weights: None, of="teacher")
    (other / "chat_template.jinja").write_text(THINKING)
    return ward.of(teacher={"path": str(other)})


@fault("think tags", "prompts that open a thought which answers never close", "warned", "never closed")
def _(ward: Ward) -> Patient:
    patient, sides = ward.copied("sides"), ward.clean.sides
    thinker = replace(sides.student, renderer=replace(sides.student.renderer, chat_template=THINKING))
    patient.made["sides"] = replace(sides, student=thinker)
    return patient


@fault("vocabulary", "an engine that draws ids which no tokenizer knows", "failed", "which no tokenizer knows")
def _(ward: Ward) -> Patient:
    patient = ward.rewritten(lambda one, prompt: replace(one, answer_ids=(21, *one.answer_ids[1:])))
    student = patient.state.student
    ward.patch.setattr(student, "num_tokens", student.num_rows - 1)
    patient.made["heard"] = ward.clean.heard
    return patient


@fault("vocabulary", "a server whose model puts weight on rows of no token", "warned", "of its probability there")
def _(ward: Ward) -> Patient:
    patient = ward.copied("drawn")
    patient.made |= {"drawn": replace(ward.clean.drawn, sampled=[]), "heard": ([], {}), "states": ward.clean.states}
    ward.patch.setattr(patient.state.student, "num_tokens", 12)
    server = merge(ward.raw, {"teacher": {"kind": "server", "url": "http://127.0.0.1:1", "payload": "hidden",
                                          "spool": str(ward.folder)}})  # fmt: skip
    patient.made["recipe"] = parse_recipe(server)
    return patient


# Parts


@fault("models and data", "a checkpoint with a NaN in it", "failed", "not finite numbers")
def _(ward: Ward) -> Patient:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        next(iter(weights.values())).view(-1)[0] = torch.nan

    return ward.of(model={"path": str(ward.model("damaged", damage))})


@fault("models and data", "prompts that are longer than the data may have", "failed", "every prompt is longer")
def _(ward: Ward) -> Patient:
    return ward.of(data={"max_prompt_tokens": 3})


@fault("models and data", "something that `train` itself would warn of", "warned", "train would warn")
def _(ward: Ward) -> Patient:
    patient = ward.copied("nothing")
    ward.patch.setattr(patient.run.warn, "said", ["3 rows of a.jsonl cannot be used"])
    return patient


@fault("answers", "a grader that crashes", "failed", "no brackets")
def _(ward: Ward) -> Patient:
    patient = ward.copied()

    def crash(items: Any) -> Any:
        raise ValueError("no brackets")

    ward.patch.setattr(patient.run.task._task, "grade", crash)
    return patient


@fault("answers", "an engine that stops at once", "failed", "all of them empty")
def _(ward: Ward) -> Patient:
    none = np.zeros(0, dtype=np.float32)
    return ward.rewritten(lambda one, prompt: replace(one, answer_ids=(), logprobs_T=none))


@fault("answers", "answers that never end", "warned", "none of which ended")
def _(ward: Ward) -> Patient:
    return ward.rewritten(lambda one, prompt: replace(one, finish="length"))


@fault("what views read", "a prompt that holds the solution", "warned", "holds its solution")
def _(ward: Ward) -> Patient:
    ids = ward.clean.run.parts.renderer.encode(ward.clean.rows[0].problem.solution or "")
    return ward.rows(lambda row: replace(row, rollout=replace(row.rollout, prompt_ids=(*row.rollout.prompt_ids, *ids))))


@fault("what views read", "a view without the question", "failed", "does not read the question")
def _(ward: Ward) -> Patient:
    return ward.rows(
        lambda row: replace(row, views={"teacher": replace(row.view, context_ids=row.rollout.prompt_ids[-1:])})
    )


@fault("what views read", "a context that shows nothing", "failed", "reads what the student reads")
def _(ward: Ward) -> Patient:
    views = Teacher.views

    def blind(teacher: Teacher, groups: Any, *rest: Any) -> Any:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        read = zip(views(teacher, groups, *rest), rollouts, strict=True)
        return [view and replace(view, context_ids=rollout.prompt_ids) for view, rollout in read]

    ward.patch.setattr(Teacher, "views", blind)
    return ward.of(method={"name": "opsd"}, **SELF)


@fault("what views read", "rows that a view cannot read, for their length", "warned", "longer than the view")
def _(ward: Ward) -> Patient:
    return ward.rows(lambda row: replace(row, signals={}))


# Rows


def _rollout(change: Callable[[Any], dict[str, Any]]) -> Callable[[Ward], Patient]:
    return lambda ward: ward.rows(lambda row: replace(row, rollout=replace(row.rollout, **change(row.rollout))))


_LENGTH = lambda r: len(r.answer_ids)  # noqa: E731
ROW_FAULTS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "tokens of a tool that are counted": (
        "tool or the environment",
        lambda r: {"author": np.full(_LENGTH(r), AUTHORS.index("tool"), dtype=np.uint8)},
    ),
    "a row of which nothing is counted": ("no token is counted", lambda r: {"answer_mask": r.answer_mask & False}),
    "a stop token that is masked out": (
        "whose stop token is not learned",
        lambda r: {"answer_mask": np.arange(_LENGTH(r)) < max(1, _LENGTH(r) - 1)},
    ),
    "a stop token inside a turn": (
        "inside a turn",
        lambda r: {"answer_ids": (r.answer_ids[-1], *r.answer_ids), **_longer(r)},
    ),
    "turns that go backwards": (
        "do not count up",
        lambda r: {"turn": np.arange(_LENGTH(r), 0, -1, dtype=np.int16)},
    ),
    "log-probs above 0": ("log-probs of counted tokens", lambda r: {"answer_logprobs": np.abs(r.answer_logprobs) + 1}),
    "a cut answer with a stop token": ("that was cut", lambda r: {"finish": "length"}),
}


def _longer(r: Any) -> dict[str, Any]:
    return {
        "answer_mask": np.ones(_LENGTH(r) + 1, dtype=np.bool_),
        "answer_logprobs": np.append(r.answer_logprobs, np.float32(-1)),
    }


for _planted, (_words, _change) in ROW_FAULTS.items():
    FAULTS.append(Fault("masks and turns", _planted, "failed", _words, _rollout(_change)))


@fault("masks and turns", "tokens of the student that are masked out", "failed", "the student wrote is not counted")
def _(ward: Ward) -> Patient:
    change = _rollout(
        lambda r: {
            "author": np.zeros(_LENGTH(r), dtype=np.uint8),
            "answer_mask": np.arange(_LENGTH(r)) == _LENGTH(r) - 1,
        }
    )
    return change(ward)


# Sampler


@fault("episodes", "turns whose log-probs stand one token off", "failed", "not scored as it was sampled")
def _(ward: Ward) -> Patient:
    say = Row.say
    ward.patch.setattr(Row, "say", lambda row, ids, logprobs_T, *rest: say(row, ids, np.roll(logprobs_T, 1), *rest))
    return _playing(ward)


@fault("episodes", "an environment that fails", "warned", "whose environment failed")
def _(ward: Ward) -> Patient:
    return _playing(ward, broken=True)


def _playing(ward: Ward, *, broken: bool = False) -> Patient:
    file = ward.folder / "talk.py"
    file.write_text(TALK)
    environment = {"name": str(file), "broken": broken}
    episode = {"environment": environment, "max_turn_tokens": 8, "max_observation_tokens": 6, "workers": 1}
    return ward.of(episode=episode)


@fault("token ids", "an engine whose ids are one too high", "failed", "not the trainer's likeliest")
def _(ward: Ward) -> Patient:
    stops = ward.clean.state.student.stop_ids
    higher = {token: token + 1 for token in range(20) if not {token, token + 1} & stops}
    return ward.rewritten(
        lambda one, prompt: replace(one, answer_ids=tuple(higher.get(token, token) for token in one.answer_ids))
    )


@fault("token ids", "an engine that reads a prompt without its first token", "failed", "not the trainer's likeliest")
def _(ward: Ward) -> Patient:
    sample = HFEngine.sample
    ward.patch.setattr(HFEngine, "sample", lambda e, prompts, *rest: sample(e, [p[1:] for p in prompts], *rest))
    return ward.copied()


@fault("token ids", "an engine that goes on behind a stop token", "failed", "has stop tokens at")
def _(ward: Ward) -> Patient:
    return ward.rewritten(lambda one, prompt: replace(one, finish="length"))


@fault("off by one", "an engine that gives each token its neighbour's log-prob", "failed", "of the next token")
def _(ward: Ward) -> Patient:
    return ward.rewritten(lambda one, prompt: replace(one, logprobs_T=np.roll(one.logprobs_T, -1)))


@fault("temperature", "log-probs from before the temperature", "failed", "from those of temperature 1")
def _(ward: Ward) -> Patient:
    return _relabelled(ward, drawn_at=None, said_at=1.0)


@fault("temperature", "draws at another temperature than was asked for", "failed", "draws tokens that are likelier")
def _(ward: Ward) -> Patient:
    return _relabelled(ward, drawn_at=0.3, said_at=PROBE_TEMPERATURE)


def _relabelled(ward: Ward, *, drawn_at: float | None, said_at: float) -> Patient:
    sample = HFEngine.sample

    def other(engine: HFEngine, prompts: Any, seeds: Any, params: Any, *rest: Any) -> list[Sampled]:
        found = sample(engine, prompts, seeds, replace(params, temperature=drawn_at or params.temperature))
        answers = [one.answer_ids for one in found]
        said = engine.score(prompts, answers, Asked("sampled"), temperature=said_at)
        return [replace(one, logprobs_T=s.sampled_logprob_T) for one, s in zip(found, said, strict=True)]

    ward.patch.setattr(HFEngine, "sample", other)
    return ward.copied()


@fault("sampler and trainer", "a sampler with weights that are 2 % off", "failed", "are not the trainer's")
def _(ward: Ward) -> Patient:
    patient = ward.copied("groups", "heard", "states")
    engine = ward.clean.engine
    stale = {name: 1.02 * weight.detach() for name, weight in patient.state.optimizer.weights.items()}
    ward.patch.setattr(patient.run, "answers", replace(patient.run.answers))
    ward.patch.setattr(type(patient.run.answers), "student_engine", lambda *_: HFEngine(engine.model, weights=stale))
    return patient


@fault("server and local", "a server of other weights than `teacher.path`", "failed", "says other log-probs")
def _(ward: Ward) -> Patient:
    def scale(weights: dict[str, torch.Tensor]) -> None:
        for tensor in weights.values():
            tensor.mul_(1.3)

    return _at_server(ward, ward.model("scaled", scale, of="teacher"))


def _at_server(ward: Ward, served: Path) -> Patient:
    server = FakeServer(served)
    server.start()
    ward.patch.setattr(FakeServer, "__del__", lambda self: None, raising=False)
    patient = ward.of(
        teacher={"kind": "server", "url": server.url, "payload": "sampled"}, method={"support": "sampled"}
    )
    patient._opened.callback(server.stop)
    return patient


# Numbers


@fault("head precision", "logits that are rounded to bfloat16", "failed", "are allowed")
def _(ward: Ward) -> Patient:
    logits = Head.logits
    ward.patch.setattr(Head, "logits", lambda head, out, t: logits(head, 8 * out.bfloat16().float(), t) / 8)
    return ward.copied("nothing")


@fault("nothing to learn", "a temperature that only the teacher's side hears", "failed", "as its own teacher has a")
def _(ward: Ward) -> Patient:
    score = HFEngine.score

    def colder(engine: HFEngine, *args: Any, **how: Any) -> Any:
        return [replace(s, hidden_TH=s.hidden_TH * 1.5) for s in score(engine, *args, **how)]

    ward.patch.setattr(HFEngine, "score", colder)
    return ward.copied("nothing")


# Learning


@fault("gradients", "a layer that is cut off from the loss", "failed", "get no gradient")
def _(ward: Ward) -> Patient:
    patient = ward.copied("gradients")
    patient.dose = ward.clean.dose
    layer = next(m for m in patient.state.student.body.modules() if type(m).__name__.endswith("MLP"))
    forward = layer.forward
    ward.patch.setattr(layer, "forward", lambda hidden: forward(hidden).detach())
    return patient


@fault("gradients", "a gradient that is not finite", "failed", "not finite")
def _(ward: Ward) -> Patient:
    patient = ward.copied("gradients")
    weight = next(iter(patient.state.optimizer.weights.values()))
    handle = weight.register_hook(lambda grad: grad * torch.nan)
    patient._opened.callback(handle.remove)
    look(CHECK["gradients"], patient)
    handle.remove()
    return patient


@fault("gradients", "weights that a checkpoint's code has frozen", "warned", "are not trained")
def _(ward: Ward) -> Patient:
    patient = ward.copied("gradients")
    weights = patient.state.optimizer.weights
    name = next(iter(weights))
    ward.patch.setattr(weights[name], "requires_grad", False)
    ward.patch.setattr(patient.state.optimizer, "weights", {n: w for n, w in weights.items() if n != name})
    return patient


@fault("micro-batches", "a loss that is divided in each micro-batch", "failed", "one by one")
def _(ward: Ward) -> Patient:
    read = backward.read

    def divided(state: Any, batch: Any, part: Any, *rest: Any) -> Any:
        out = read(state, batch, part, *rest)
        return replace(out, loss=out.loss / len(part.rows))

    ward.patch.setattr(backward, "read", divided)
    return ward.copied("gradients")


@fault("packing", "packed rows that read the rows before them", "failed", "packed one behind the other have other")
def _(ward: Ward) -> Patient:
    def leaking(body: Any, ids_1T: Any, forest: Any, way: Any) -> Any:
        position_1T = torch.from_numpy(forest.position_T)[None]
        mask = torch.ones_like(ids_1T)
        return body(input_ids=ids_1T, position_ids=position_1T, attention_mask=mask, use_cache=False)[0][0]

    ward.patch.setattr(causal, "states", leaking)
    return ward.copied("nothing")


@fault("prefix sharing", "a common beginning that is taken for one token longer", "failed", "read once have other")
def _(ward: Ward) -> Patient:
    common = prefix_tree._common
    ward.patch.setattr(prefix_tree, "_common", lambda a, b: min(common(a, b) + 1, len(a) - 1, len(b) - 1))
    return ward.copied("nothing")


@fault("LoRA", "adapters on the queries alone", "warned", "of the layers' matrices")
def _(ward: Ward) -> Patient:
    return ward.of(model={"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}})


# Resources


@fault("disk", "a disk with a megabyte left", "failed", "of 0.00 GiB free")
def _(ward: Ward) -> Patient:
    usage = shutil.disk_usage("/")
    ward.patch.setattr(resources.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    return ward.copied("nothing")


@fault("disk", "a file system with room for few files", "failed", "more files")
def _(ward: Ward) -> Patient:
    few = SimpleNamespace(f_files=100, f_favail=1, f_bavail=1 << 30, f_blocks=1 << 30, f_bfree=1 << 30, f_frsize=4096)
    ward.patch.setattr(resources.os, "statvfs", lambda path: few)
    return ward.copied("nothing")


@fault("memory", "a machine that is too small", "failed", "this machine has")
def _(ward: Ward) -> Patient:
    ward.patch.setattr(at_hand, "machine_bytes", lambda: 1 << 20)
    return ward.copied("nothing")


@fault("time", "a run of years", "warned", "hours for 100000000 steps")
def _(ward: Ward) -> Patient:
    patient = ward.copied("nothing")
    patient.made["recipe"] = parse_recipe(merge(ward.raw, {"train": {"steps": 10**8}}))
    return patient


# Lately


@fault("stop disagreement", "a teacher that ends by another of the stop tokens", "warned", "it would rather end by")
def _(ward: Ward) -> Patient:
    return _biased(ward, stop=0, other=8.0)


@fault("stop disagreement", "a teacher that goes on where the student ends", "warned", "it would go on")
def _(ward: Ward) -> Patient:
    return _biased(ward, stop=None, other=-9.0)


def _biased(ward: Ward, *, stop: int | None, other: float) -> Patient:
    """The teacher's logits of one stop token, or of all, are moved."""
    patient = ward.copied("heard", "table")
    patient.made |= {"groups": ward.clean.groups}
    ended = [row for row in ward.clean.rows if row.rollout.finish == "stop" and row.rollout.answer_ids[-1] != stop]
    assert len(ended) > 1
    model = patient.state.teachers[0].loaded_model
    assert model is not None
    bias_V = torch.zeros(model.num_rows)
    bias_V[[stop] if stop is not None else sorted(model.stop_ids)] = other
    head = model.head
    ward.patch.setattr(model, "head", lambda weights=None: replace(head(weights), bias_V=bias_V))
    rows, said = patient.heard
    keys = {row.rollout.key for row in ended}
    patient.made["heard"] = ([row for row in rows if row.rollout.key in keys], said)
    return patient


@fault("privileged teacher", "a context that makes right answers less likely", "warned", "pulls the student away")
def _(ward: Ward) -> Patient:
    return _with_context(ward, moved=-0.5)


@fault("agreement on failures", "a teacher that agrees with every wrong answer", "warned", "few tokens say what is")
def _(ward: Ward) -> Patient:
    return ward.of(teacher={"path": str(ward.models["student"])})


@fault("starving domains", "a domain of [route] without a problem", "warned", "code: hardly a problem")
def _(ward: Ward) -> Patient:
    return _routed(ward, "math")


@fault("starving domains", "a domain whose answers are a few tokens beside long ones", "warned", "code: hardly a")
def _(ward: Ward) -> Patient:
    patient = _routed(ward, "math", "code")
    rows, said = patient.heard
    mask = lambda row: np.arange(len(row.rollout.answer_ids)) < 1  # noqa: E731
    short = [
        replace(row, rollout=replace(row.rollout, answer_mask=mask(row)))
        if row.problem.columns["domain"] == "code"
        else row
        for row in rows
    ]
    patient.made["heard"] = (short, said)
    return patient


def _routed(ward: Ward, *domains: str) -> Patient:
    teacher = {"kind": "model", "path": str(ward.models["teacher"])}
    raw = {key: value for key, value in ward.raw.items() if key != "teacher"}
    sets = [
        {"path": f"arithmetic:merge-{3 + number}:train", "share": 1 / len(domains), "domain": name}
        for number, name in enumerate(domains)
    ]
    raw |= {
        "route": {"column": "domain", "views": {"math": "one", "code": "two"}},
        "views": {"one": {"teacher": teacher}, "two": {"teacher": teacher}},
        "data": {**ward.raw["data"], "train": sets},
    }
    return ward.admitted(parse_recipe(raw))


SELF = {
    "teacher": {"kind": "self", "weights": "initial", "path": None},
    "context": {"kind": "reference_solution", "template": "prefix"},
}
CHECK = {check.name: check for check in CHECKS}


# Nothing is wrong with these.


def _with_context(ward: Ward, moved: float = 0.5) -> Patient:
    """Every answer is right, and the context moves a token's log-prob by so much besides."""
    patient = ward.of(method={"name": "opsd"}, **SELF)
    rows, said = patient.heard
    patient.made["heard"] = ([replace(row, rollout=replace(row.rollout, reward=1.0)) for row in rows], said)
    score = ModelTeacher.score

    def other(teacher: ModelTeacher, contexts: Sequence[Any], *rest: Any, **how: Any) -> Any:
        longest = max(map(len, contexts))
        return [
            replace(s, sampled_logprob_T=s.sampled_logprob_T + moved * (len(context) == longest))
            for s, context in zip(score(teacher, contexts, *rest, **how), contexts, strict=True)
        ]

    ward.patch.setattr(ModelTeacher, "score", other)
    return patient


def _sampled_at_server(ward: Ward) -> Patient:
    server = FakeServer(ward.models["student"])
    server.start()
    patient = ward.of(sampling={"engine": "server", "url": server.url})
    patient._opened.callback(server.stop)
    return patient


HEALTHY: dict[str, Callable[[Ward], Patient]] = {
    "LoRA": lambda ward: ward.of(model={"lora": {"r": 4, "alpha": 8}}),
    "server and local": lambda ward: _at_server(ward, ward.models["teacher"]),
    "privileged teacher": _with_context,
    "what views read": _with_context,
    "starving domains": lambda ward: _routed(ward, "math", "code"),
    "episodes": _playing,
    "nothing to learn": lambda ward: ward.of(method={"name": "eopd"}, **SELF),
    "sampler and trainer": _sampled_at_server,
}
