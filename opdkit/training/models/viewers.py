"""Who reads each view of a recipe. A teacher that several views name alike is one object, a model is loaded once."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from torch import Tensor

from opdkit.engines.model import LanguageModel
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import Recipe
from opdkit.training.models.aligned import AlignedTeacher
from opdkit.training.models.base_teacher import Teacher
from opdkit.training.models.optimizer import Optimizer
from opdkit.training.models.other_models import OtherModel, common_limit
from opdkit.training.models.saved_teacher import SavedTeacher
from opdkit.training.models.server_teacher import ServerTeacher
from opdkit.training.models.side import teacher_reading
from opdkit.training.models.side_doubts import check_lists
from opdkit.training.models.teacher import make_teacher
from opdkit.training.saved.saved_run import SavedRun
from opdkit.training.state import Viewer


def make_viewers(
    recipe: Recipe,
    student: LanguageModel,
    optimizer: Optimizer,
    now: datetime | None = None,
    run: SavedRun | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Viewer]:
    """By view. now: the date that chat templates print; run: whose teachers are read again; ranks: that may keep
    a model's layers in parts. The models of a route's
    views are loaded when their first rows come, all others now. Raises UserError for a teacher that cannot be compared.
    """
    viewers: dict[str, Viewer] = {}
    teachers: list[tuple[object, Teacher]] = []  # sections cannot be hashed
    models: dict[object, OtherModel] = {}
    servers: list[ServerTeacher] = []
    for name, view in recipe.all_views.items():
        teacher = next((known for section, known in teachers if section == view.teacher), None)
        if run is not None and view.teacher.kind == "saved":
            teacher = SavedTeacher(run, name, student.renderer())
        if teacher is None and view.teacher.kind == "server":
            where = "teacher" if name == "teacher" else f"views.{name}.teacher"
            servers.append(ServerTeacher(recipe, view.teacher, where, student, now))
            teacher = servers[-1]
            teachers.append((view.teacher, teacher))
        if teacher is None:
            other = None
            if view.teacher.kind == "model":
                key = OtherModel.key(view.teacher)
                other = models.setdefault(key, OtherModel(recipe, view.teacher, student, ranks))
            if other is not None and view.teacher.tokens == "align":
                own = other.renderer(**teacher_reading(recipe, view.teacher, other.renderer(), now))
                teacher = AlignedTeacher(other, own, student, view.teacher, recipe.sampling.max_tokens_per_batch)
                check_lists(recipe, teacher.alignment, "teacher" if name == "teacher" else f"views.{name}.teacher")
            else:
                teacher = make_teacher(recipe, view.teacher, student, optimizer, now, other)
            teachers.append((view.teacher, teacher))
        viewers[name] = Viewer(teacher, view.context, view.count)
    routed = recipe.answering if recipe.route else {}
    for name, viewer in viewers.items():
        if name not in routed:
            viewer.teacher.load()
    others: list[OtherModel | ServerTeacher] = [m for m in models.values() if m.reads_students_ids]
    others += servers
    if others or run is not None:
        end, absent = common_limit(student, [other.readable() for other in others])
        if run is not None:
            end, absent = run.common(end, absent)
        student.limit_to(end, absent)
        for each in others:
            each.limit_to(end, absent)
    for server in servers:
        server.probe()
    return viewers


def state_of(viewers: Mapping[str, Viewer]) -> dict[str, Tensor]:
    """What the teachers keep between steps, for a checkpoint: of "teacher" under plain names."""
    saved: dict[str, Tensor] = {}
    for view, teacher in _keepers(viewers).items():
        saved |= {_prefix(view) + name: tensor for name, tensor in teacher.state().items()}
    return saved


def load_state(viewers: Mapping[str, Viewer], saved: Mapping[str, Tensor]) -> None:
    """Raises UserError for tensors that are not exactly theirs."""
    keepers = _keepers(viewers)
    prefixes = {view: _prefix(view) for view in keepers}
    for view, teacher in keepers.items():
        others = tuple(prefix for prefix in prefixes.values() if prefix and prefix != prefixes[view])
        own = {
            name.removeprefix(prefixes[view]): tensor
            for name, tensor in saved.items()
            if name.startswith(prefixes[view]) and not (others and name.startswith(others))
        }
        teacher.load_state(own)


def _keepers(viewers: Mapping[str, Viewer]) -> dict[str, Teacher]:
    """Every teacher under the first view that it reads."""
    first: dict[int, str] = {}
    for view, viewer in viewers.items():
        first.setdefault(id(viewer.teacher), view)
    return {view: viewers[view].teacher for view in first.values()}


def _prefix(view: str) -> str:
    return "" if view == "teacher" else f"views.{view}/"
