"""A teacher that servers hold: `[teacher] kind = "server"`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path

from opdkit.engines.base import Progress
from opdkit.engines.load import load_num_rows
from opdkit.engines.model import LanguageModel
from opdkit.engines.output_head import OutputHead
from opdkit.engines.servers.hidden_files import SharedFolder
from opdkit.engines.servers.http import Client
from opdkit.engines.servers.probe import model_of, probe
from opdkit.engines.servers.scorer import Cost, ServerScorer
from opdkit.engines.tokens.stops import find_stops
from opdkit.engines.tokens.vocabulary import num_tokens
from opdkit.errors import UserError
from opdkit.losses import Head
from opdkit.metrics import Metric
from opdkit.recipe import Recipe, TeacherSection, stages_of
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.models.other_models import Readable
from opdkit.training.models.side import read_words, teacher_reading
from opdkit.types import Asked, Signal


class ServerTeacher(Teacher):
    """Its tokenizer and template are those of `teacher.path`; nothing of its weights is loaded but, for hidden states,
    the norm and the head. Raises UserError unless every server is what the section says (`probe`: and answers rightly).
    """

    def __init__(
        self,
        recipe: Recipe,
        section: TeacherSection,
        where: str,
        student: LanguageModel,
        now: datetime | None = None,
    ) -> None:
        """where: the section, "teacher" or "views.NAME.teacher"; now: the date that its template prints."""
        assert section.path is not None and section.payload is not None
        words = read_words(section.path, section.trust_remote_code, section.chat_template)
        stops = find_stops(words.bare, words.generation_config, name=section.path)
        self.renderer = words.renderer(stops, teacher_reading(recipe, section, words.bare, now))
        self._section, self._where = section, where
        self._view = "teacher" if where == "teacher" else f"views/{where.split('.')[1]}"
        clients = [
            Client(url, key=f"{where}.url", patience_s=section.patience_s, timeout_s=section.timeout_s)
            for url in section.urls
        ]
        served = [model_of(client, section.served_name, where) for client in clients]
        if len({name for name, _, _ in served}) > 1:
            names = ", ".join(name for name, _, _ in served)
            raise UserError(f"{where}.url: the servers serve {names}; all must serve one model under one name")
        lengths = [length for _, length, _ in served if length is not None]
        shared = None if section.spool is None else SharedFolder(section.spool, f"{where}.spool")
        output = None
        if section.payload == "hidden":
            output = OutputHead(section.path, device=student.device, trust_remote_code=section.trust_remote_code)
        self._warnings = [
            f"{client.url} serves {root}, and {where}.path is {section.path}; both must be one model"
            for client, (_, _, root) in zip(clients, served, strict=True)
            if section.payload != "hidden" and Path(root).name != Path(section.path).name
        ]
        self._scorer = ServerScorer(
            clients=clients,
            payload=section.payload,
            model=served[0][0],
            at_once=section.at_once,
            shared=shared,
            output=output,
            num_rows=load_num_rows(section.path, section.trust_remote_code),
            max_positions=min(lengths) - 1 if lengths else None,
        )
        self._check_length(recipe)
        self._asked = asked_of(recipe, section)

    def probe(self) -> None:
        """Raises UserError for a server that does not answer rightly. What is compared must be known (`limit_to`)."""
        tokenizer = self.renderer.tokenizer
        for client in self._scorer.clients:
            self._warnings += probe(self._scorer, client, tokenizer, num_tokens(tokenizer), self._asked)

    @property
    def max_positions(self) -> int | None:
        return self._scorer.max_positions

    @property
    def warnings(self) -> Sequence[str]:
        return self._warnings

    def readable(self) -> Readable:
        known, rows = num_tokens(self.renderer.tokenizer), self._scorer.num_rows
        assert self._section.path is not None
        return self._section.path, self.renderer, known if rows is None else min(rows, known)

    def limit_to(self, end: int, absent: list[int]) -> None:
        self._scorer.limit_to(end, absent)

    def can_say(self, asked: Asked) -> bool:
        return self._scorer.can_say(asked)

    def head(self) -> Head:
        if self._scorer.head is None:
            raise UserError(
                f'{self._where}.payload = "{self._section.payload}" gives no whole distributions, which are compared '
                'here; use payload = "hidden"'
            )
        return self._scorer.head

    def score(
        self,
        contexts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        asked: Asked,
        *,
        temperature: float,
        progress: Progress | None = None,
        states_of: Collection[int] = (),
    ) -> list[Signal]:
        return self._scorer.score(
            contexts, answers, asked, temperature=temperature, progress=progress, states_of=states_of
        )

    def metrics(self) -> list[Metric]:
        cost, self._scorer.cost = self._scorer.cost, Cost()
        if not cost.tokens:
            return []
        return [
            Metric(f"{self._view}/server_tokens_per_s", cost.tokens / max(cost.seconds, 1e-9)),
            Metric(f"{self._view}/server_bytes", float(cost.bytes), "sum"),
            Metric(f"{self._view}/server_num_retries", float(cost.retries), "sum"),
        ]

    def _check_length(self, recipe: Recipe) -> None:
        room, answer = self._scorer.max_positions, recipe.longest_answer
        if room is None:
            return
        if room <= answer:
            raise UserError(
                f"{self._where}: its server takes {room + 1} tokens (max_model_len), and sampling.max_answer_tokens = "
                f"{answer} alone fills them; start it with a longer --max-model-len, or sample shorter answers"
            )
        if room < answer + recipe.data.max_prompt_tokens:
            self._warnings.append(
                f"{self._where}: its server takes {room + 1} tokens (max_model_len), fewer than data.max_prompt_tokens "
                "and sampling.max_answer_tokens together; answers that do not fit leave its terms of the loss, and "
                "are counted (num_rows_too_long)"
            )


def asked_of(recipe: Recipe, section: TeacherSection) -> list[Asked]:
    """What all stages of a recipe ask the views that this section reads."""
    own = {name for name, view in recipe.all_views.items() if view.teacher == section}
    found = []
    for stage in stages_of(recipe).values():
        for view, asked in stage.needs.views.items():
            readers = stage.route.readers if stage.route and view == "teacher" else (view,)
            if own & {*readers} and asked not in found:
                found.append(asked)
    return found
