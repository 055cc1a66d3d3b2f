"""The data sets `opdkit data prepare` knows: where each is published, and how its rows are read. One row each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from opdkit.data.files.sources import Row
from opdkit.data.schemas.choice_rows import gpqa_rows, sciknoweval_rows
from opdkit.data.schemas.code_rows import contest_date, humaneval_rows, livecodebench_rows, mbpp_rows
from opdkit.data.schemas.draft import Read
from opdkit.data.schemas.math_rows import first_solution, math_rows
from opdkit.data.schemas.templates import MATH_TEMPLATES
from opdkit.data.schemas.tool_rows import tool_rows
from opdkit.errors import UserError

MAIN = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """revision: what the published work names. None: it names none, so `main` is taken as it is that day; `prepare`
    writes down the commit it found, and `--revision COMMIT` takes that one again."""

    id: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"test": "test"})  # the hub's name -> ours
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    name: str
    task: str
    read: Read
    template: str  # of `templates.py`: the published one
    hub: Hub | None  # None: it is on no hub that the published work names
    split: str = "test"  # what a source is taken for whose name does not say
    test_share: float | None = None  # of the raw benchmark's rows: the published work splits it itself
    dates: Callable[[Row], str | None] | None = None  # YYYY-MM-DD of a raw row
    window: tuple[str, str] | None = None  # from, up to and without: the dates the published work takes
    raw: frozenset[str] = frozenset()  # columns by which a raw row is known that other readers cannot make sense of

    @property
    def templates(self) -> tuple[str, ...]:
        """What `--instruction` may name."""
        return MATH_TEMPLATES if self.task == "math" else (self.template, "none")


def data_set(name: str) -> DataSet:
    """Raises UserError for a name that is none."""
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name, DATA_SETS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(DATA_SETS)}"
        raise UserError(f"there is no preparer for {name!r}; {hint}")
    return DATA_SETS[name]


def raw_set_of(row: Row) -> DataSet | None:
    """The set whose raw benchmark this is a row of; None where none is known by its columns."""
    chosen = [entry for entry in DATA_SETS.values() if entry.raw and entry.raw <= row.keys()]
    if len(chosen) > 1:  # SciKnowEval's are told apart by a value
        chosen = [entry for entry in chosen if entry.name.endswith(f"_{str(row.get('domain')).lower()}")]
    return chosen[0] if chosen else None


def _math(
    name: str, hub: Hub | None, *, template: str = "boxed", read: Read | None = None, split: str = "test"
) -> DataSet:
    return DataSet(name=name, task="math", read=read or math_rows(), template=template, hub=hub, split=split)


def _sciknoweval(domain: str) -> DataSet:
    return DataSet(
        name=f"sciknoweval_{domain.lower()}",
        task="multiple_choice",
        read=sciknoweval_rows(domain),
        template="four_options",
        hub=Hub(id="hicai-zju/SciKnowEval"),
        test_share=0.1,
        raw=frozenset({"choices", "answerKey", "domain"}),
    )


_TRAIN = {"train": "train"}
_TRAIN_AS_TEST = {"train": "test"}  # a benchmark whose only split is called train

DATA_SETS: dict[str, DataSet] = {
    entry.name: entry
    for entry in (
        _math(
            "dapo_math",
            Hub(id="BytedTsinghua-SIA/DAPO-Math-17k", splits=_TRAIN),
            template="dapo",
            split="train",
        ),
        _math(
            "deepmath",
            Hub(id="zwhe99/DeepMath-103K", splits=_TRAIN),
            template="boxed_inline",
            read=math_rows({"solution": ("solution", "r1_solution_1")}),
            split="train",
        ),
        _math(
            "openthoughts_math_30k",
            Hub(id="siyanzhao/Openthoughts_math_30k_opsd", splits=_TRAIN),
            template="opsd",
            read=math_rows({"answer": ("reward_model.ground_truth", "Answer", "answer", "gold")}),
            split="train",
        ),
        _math("gsm8k", Hub(id="openai/gsm8k", config="main", splits={"train": "train", "test": "test"})),
        _math("math500", Hub(id="HuggingFaceH4/MATH-500")),
        _math("aime24", Hub(id="HuggingFaceH4/aime_2024", splits=_TRAIN_AS_TEST)),
        _math("aime25", Hub(id="yentinglin/aime_2025", splits=_TRAIN_AS_TEST)),
        _math("hmmt25", Hub(id="MathArena/hmmt_feb_2025", splits=_TRAIN_AS_TEST), template="step_boxed"),
        _math("amc23", Hub(id="math-ai/amc23")),
        _math("minerva", Hub(id="math-ai/minervamath")),
        _math(
            "olympiad",
            Hub(id="Hothan/OlympiadBench", config="OE_TO_maths_en_COMP", splits=_TRAIN_AS_TEST),
            read=math_rows(adapt=first_solution),
        ),
        *(_sciknoweval(domain) for domain in ("Biology", "Chemistry", "Material", "Physics")),
        DataSet(
            name="gpqa",
            task="multiple_choice",
            read=gpqa_rows,
            template="four_options",
            hub=Hub(id="Idavidrein/gpqa", config="gpqa_diamond", splits=_TRAIN_AS_TEST),
            raw=frozenset({"Question", "Correct Answer"}),
        ),
        DataSet(name="tooluse", task="tool_use", read=tool_rows, template="none", hub=None),
        DataSet(
            name="livecodebench",
            task="code",
            read=livecodebench_rows,
            template="coding_expert",
            hub=Hub(id="livecodebench/code_generation_lite", revision="refs/pr/6"),
            test_share=0.5,  # of 131 problems: a tenth would be 13, and measure nothing
            dates=contest_date,
            window=("2025-02-01", "2025-05-01"),
            raw=frozenset({"question_content", "private_test_cases"}),
        ),
        DataSet(
            name="humaneval",
            task="code",
            read=humaneval_rows,
            template="coding_expert",
            hub=Hub(id="openai/openai_humaneval"),
            raw=frozenset({"prompt", "entry_point", "test"}),
        ),
        DataSet(
            name="mbpp",
            task="code",
            read=mbpp_rows,
            template="coding_expert",
            hub=Hub(
                id="google-research-datasets/mbpp",
                config="full",
                splits={"train": "train", "validation": "validation", "test": "test"},
            ),
            raw=frozenset({"code", "test_list"}),
        ),
    )
}
