"""The steps that need the teacher: whose answers, what is read beside them, and what the teacher says of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch

from opdkit.analysis.signal.answers import (
    ROLLOUTS,
    Template,
    complete,
    find_answers,
    limited,
    usable_groups,
    vocabulary_digest,
)
from opdkit.analysis.signal.conditions import (
    CHOSEN_BY_CONDITION,
    Condition,
    conditions_of,
    counts_of,
    peers_of,
    show,
    showable,
)
from opdkit.analysis.signal.options import SignalOptions
from opdkit.analysis.signal.parts import (
    CONTEXTS_FILE,
    SCORES_FILE,
    as_json,
    check_part,
    file_digest,
    read_part,
    read_whole,
    write_part,
)
from opdkit.analysis.signal.sampling import SamplingOptions, load_data, sample_into
from opdkit.analysis.signal.scores import pairs_of, score
from opdkit.contexts.peers import Peers
from opdkit.contexts.render import Renderer, read_chat_template, read_kwargs
from opdkit.engines.base import Sampler
from opdkit.engines.hf import HFEngine
from opdkit.engines.load import model_digest, pick_device
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError
from opdkit.evaluation.answering import AskedEngine, served
from opdkit.evaluation.identity import own_files
from opdkit.run.console import Bar, Console, Interrupt, say
from opdkit.run.jsonl import open_lines
from opdkit.run.stored_answers import clock_of
from opdkit.tasks.guard import task_named
from opdkit.training.models.student_server import vocabulary_of
from opdkit.types import Message


class ModelSteps:
    """Each method is a step: it does what is missing in the folder, and raises UserError for what does not fit."""

    def __init__(self, options: SignalOptions, console: Console, interrupt: Interrupt) -> None:
        self.options = options
        self.folder = options.folder
        self._console = console
        self._interrupt = interrupt

    def rollouts(self) -> None:
        path = self.folder / ROLLOUTS
        if self.options.sampling is not None:
            self._sample(path, self.options.sampling)
        elif self.options.rollouts is not None:
            self._take(path, self.options.rollouts)
        _, lines = read_part(path, "rollouts")
        self._say(f"{path.name}: {len(lines)} answers to {len({line['problem_id'] for line in lines})} problems")

    def contexts(self) -> None:
        path = self.folder / CONTEXTS_FILE
        header, lines = read_whole(self.folder / ROLLOUTS, "rollouts")
        peers, conditions, missing = self._asked(header["context"])
        self._check_vocabulary(header["vocabulary"])
        groups, counts = usable_groups(lines)
        template = self._template(Template(**header["template"]) if header["template"] else None)
        for reason, names in missing.items():
            say(self._console, f"{', '.join(names)}: {reason}", mark="left out")
        identity = {
            "rollouts": file_digest(self.folder / ROLLOUTS),
            "conditions": [condition.name for condition in conditions],
            "design": self.options.design,
            "context": peers.model_dump(mode="json", exclude=CHOSEN_BY_CONDITION),
            "seed": self.options.seed,
            "template": self._reading(template),
        }
        if self._is_there(path, identity):
            return
        renderer = self._teacher.renderer(template)
        shown = show(groups, conditions, peers, renderer, design=self.options.design, seed=self.options.seed)
        counts.update(counts_of(shown, groups))
        said = {
            "identity": as_json(identity),
            "num_lines": len(shown),
            "template": template.as_dict(),
            "shows": {condition.name: condition.shows for condition in conditions},
            "answers": header["identity"],
            "counts": {**header["counts"], **counts},
        }
        with self._rendering(renderer, len(shown)) as render:  # what cannot be rendered shows here
            lengths = [len(render(one.messages)) for one in shown]
        rows = [{**asdict(one), "num_tokens": length} for one, length in zip(shown, lengths, strict=True)]
        write_part(path, said, rows)
        self._say(f"{path.name}: {len(shown)} contexts of {len(groups)} problems under {len(conditions)} conditions")

    def scores(self) -> None:
        path, before = self.folder / SCORES_FILE, self.folder / CONTEXTS_FILE
        rollouts, lines = read_whole(self.folder / ROLLOUTS, "rollouts")
        header, contexts = read_whole(before, "contexts")
        self._check_vocabulary(rollouts["vocabulary"])
        template = Template(**header["template"])
        made_of = {"rollouts": file_digest(self.folder / ROLLOUTS), "template": self._reading(template)}
        check_part(before, header, {**header["identity"], **made_of})
        identity = {"contexts": file_digest(before), **self._teacher.identity}
        num_lines = sum(len(context["sample_ids"]) for context in contexts)
        if self._is_there(path, identity) and len(open_lines(path)) == num_lines + 1:
            return
        peers = peers_of(header["identity"]["context"])
        with self._rendering(self._teacher.renderer(template), len(contexts)) as render:
            texts = {(line["problem_id"], line["sample_id"]): line["text"] for line in lines}
            pairs = pairs_of(contexts, usable_groups(lines)[0], texts, render, peers.is_success)
        with Bar(self._console, "scoring", len(pairs)) as bar:
            score(
                path,
                {"identity": as_json(identity), "num_lines": num_lines, "contexts": header},
                pairs,
                scorer=HFEngine(self._teacher.model, max_tokens_per_batch=self.options.max_tokens_per_batch),
                max_positions=self._teacher.model.max_positions,
                progress=self._heard(bar),
            )
        self._say(f"{path.name}: {num_lines} scores, of {len(pairs)} pairs of a context and an answer")

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def _take(self, path: Path, source: Path) -> None:
        """Saved answers, all at once."""
        found = limited(find_answers(source), self.options.limit, self.options.seed)
        self._asked(found.context)
        identity = {**found.origin, "limit": self.options.limit, "vocabulary": self._teacher.vocabulary}
        if self._is_there(path, identity):
            return
        if found.vocabulary is None and any(row["answer_ids"] for _, row in found.answers):
            why = "so it could not be compared with the teacher's"
            say(self._console, f"the tokenizer that wrote these ids was not found, {why}", mark="warning")
        else:
            self._check_vocabulary(found.vocabulary or self._teacher.vocabulary)
        template = self._template(found.template)
        lines, counts = complete(found, self._teacher.renderer(template), self._teacher.model.stop_ids)
        header = {
            "identity": as_json(identity),
            "num_lines": len(lines),
            "vocabulary": self._teacher.vocabulary,
            "template": template.as_dict(),
            "context": as_json(found.context),
            "counts": dict(counts),
        }
        write_part(path, header, lines)

    def _sample(self, path: Path, sampling: SamplingOptions) -> None:
        options = self.options
        self._asked({})
        data = load_data(sampling, limit=options.limit, seed=options.seed)
        student = self._teacher if sampling.student is None else Model(sampling.student, options)
        template = self._template(None)
        if begun := open_lines(path):  # the date it was begun on
            template = replace(template, clock=begun[0].get("template", {}).get("clock"))
        identity = {
            "rollouts": "sampled",
            **asdict(sampling),
            **own_files(task_named(sampling.task)),
            **student.identity,
            **({} if options.engine == "hf" else {"engine": options.engine}),
            "fingerprint": data.fingerprint,
            "limit": options.limit,
            "seed": options.seed,
            "template": student.reading(template),
        }
        num_lines = len(data.problems) * sampling.num_samples
        if self._is_there(path, identity) and len(open_lines(path)) == num_lines + 1:
            return
        header = {
            "identity": as_json(identity),
            "num_lines": num_lines,
            "vocabulary": student.vocabulary,
            "template": template.as_dict(),
            "context": {},
            "counts": {"rows_dropped_by_the_reader": len(data.dropped)},
        }
        self._check_vocabulary(student.vocabulary)
        with (
            self._sampler(student, path.parent) as sampler,
            Bar(self._console, f"sampling {sampling.data}", num_lines) as bar,
        ):
            sample_into(
                path,
                header,
                data,
                sampling,
                sampler=sampler,
                renderer=student.renderer(template),
                seed=options.seed,
                progress=self._heard(bar),
            )

    @contextmanager
    def _sampler(self, student: Model, folder: Path) -> Iterator[Sampler]:
        """What answers for the student. An engine beside this process takes its words from the model that is loaded."""
        options, model = self.options, student.model
        if options.engine == "hf":
            yield HFEngine(model, max_tokens_per_batch=options.max_tokens_per_batch)
            return
        asked = AskedEngine(student.name, options.engine, options.url, options.dtype, options.trust_remote_code)
        with served(asked, vocabulary_of(model), self._console, folder) as one:
            yield one.engine()

    # --- what steps share -------------------------------------------------------------------------------------------

    @cached_property
    def _teacher(self) -> Model:
        assert self.options.model is not None  # `_check` has seen to it
        return Model(self.options.model, self.options)

    def _asked(self, saved: Mapping[str, Any]) -> tuple[Peers, list[Condition], Mapping[str, list[str]]]:
        """How peers are shown (saved: the [context] of the answers' run), the conditions, and why others are left out.

        Asked before anything is loaded or sampled. Raises UserError for keys and conditions that cannot be.
        """
        settings = {key: value for key, value in saved.items() if key not in CHOSEN_BY_CONDITION}
        peers = peers_of({**settings, **self.options.context})
        conditions, missing = showable(conditions_of(self.options.conditions), peers)
        if missing and self.options.conditions != "all":
            raise UserError(*(f"{', '.join(names)}: {reason}" for reason, names in missing.items()))
        return peers, conditions, missing

    def _template(self, saved: Template | None) -> Template:
        """What was asked for, else what the answers were sampled or trained on, else the tokenizer's own."""
        asked, found = self.options, saved or Template()
        chat_template = read_chat_template(asked.chat_template) if asked.chat_template else found.chat_template
        dated = Renderer(self._teacher.model.tokenizer, chat_template).reads_clock
        return Template(
            chat_template=chat_template,
            template_kwargs=as_json(dict(asked.template_kwargs or found.template_kwargs)),
            close_thinking=asked.close_thinking or found.close_thinking,
            system=found.system if asked.system is None else asked.system,
            clock=(found.clock or clock_of(None).isoformat()) if dated else None,
        )

    def _reading(self, template: Template) -> dict[str, Any]:
        return self._teacher.reading(template)

    def _check_vocabulary(self, vocabulary: str) -> None:
        if vocabulary != self._teacher.vocabulary:
            raise UserError(
                f"--model {self.options.model}: its tokenizer is not the one the answers were written with, and a "
                "teacher scores their token ids; choose a teacher of the same family"
            )

    def _is_there(self, path: Path, identity: Mapping[str, Any]) -> bool:
        """Raises UserError if it is there and says something else."""
        if not path.exists():
            return False
        header, _ = read_part(path, path.stem)
        check_part(path, header, identity)
        return True

    def _heard(self, bar: Bar) -> Callable[[int], None]:
        def heard(done: int) -> None:
            bar.update(done)
            self._interrupt.check()

        return heard

    @contextmanager
    def _rendering(self, renderer: Renderer, total: int) -> Iterator[Callable[[Sequence[Message]], tuple[int, ...]]]:
        """The renderer's `prompt_ids`, heard by a bar: long contexts take a while."""
        done = count(1)
        with Bar(self._console, "rendering contexts", total) as bar:
            heard = self._heard(bar)

            def render(messages: Sequence[Message]) -> tuple[int, ...]:
                ids = renderer.prompt_ids(messages)
                heard(next(done))
                return ids

            yield render

    def _say(self, text: str) -> None:
        say(self._console, text)


class Model:
    """A model by name: loaded when it is first asked for, and what makes its words."""

    def __init__(self, name: str, options: SignalOptions) -> None:
        self.name = name
        self._options = options

    @cached_property
    def model(self) -> LanguageModel:
        return LanguageModel.load(
            self.name,
            dtype=getattr(torch, self._options.dtype),
            device=pick_device(self._options.device),
            trust_remote_code=self._options.trust_remote_code,
            stop_tokens=self._options.stop_tokens,
        )

    @cached_property
    def vocabulary(self) -> str:
        return vocabulary_digest(self.model.tokenizer.get_vocab())

    @property
    def identity(self) -> dict[str, Any]:
        return {"model": self.name, "model_files": model_digest(Path(self.name)), "dtype": self._options.dtype}

    def renderer(self, template: Template) -> Renderer:
        kwargs, bare = template.template_kwargs, Renderer(self.model.tokenizer, template.chat_template)
        return replace(
            bare,
            # What was found beside the answers was for another model's template, which may read more.
            template_kwargs=kwargs if self._options.template_kwargs else read_kwargs(bare, kwargs),
            close_thinking=template.close_thinking,
            system=template.system,
            now=None if template.clock is None else datetime.fromisoformat(template.clock),
            stop_ids=self.model.stop_ids,
        )

    def reading(self, template: Template) -> dict[str, Any]:
        """What makes token ids of chat turns."""
        text = template.chat_template or self.model.tokenizer.chat_template or ""
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        how = {"close_thinking": template.close_thinking, "system": template.system}
        chosen = {key: value for key, value in how.items() if value}  # what opdkit 0.1 wrote has neither
        return {"text": digest, "kwargs": dict(template.template_kwargs), "vocabulary": self.vocabulary, **chosen}
