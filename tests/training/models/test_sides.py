"""Student and teacher side by side: which pairs are refused, which are warned of, and which sentence shows the way out.

Models with random weights over characters. Does not show what a mismatch costs: docs/guides/fit.md says where that
was seen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from opdkit import toml
from opdkit.engines.model import LanguageModel
from opdkit.engines.tokens.stops import find_stops
from opdkit.engines.tokens.vocabulary import common_ids
from opdkit.errors import UserError
from opdkit.recipe import Recipe
from opdkit.run.rows import load_rows
from opdkit.training.loop import train
from opdkit.training.models.sides import check_models, read_sides
from opdkit.training.parts import Parts
from opdkit.training.saved.checkpoint import save_model
from opdkit.types import Asked

Make = Callable[..., Recipe]
Variant = Callable[..., Path]
PAD, END = 0, 4  # <|endoftext|> and <e>, which ends the template's assistant turn
NO_END = "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture
def variant(models: dict[str, Path], tmp_path: Path) -> Variant:
    """A copy of one of the two models with another tokenizer, chat template or generation config."""

    def make(
        of: str,
        *,
        eos: str | None = None,
        template: str | None = None,
        added: tuple[str, ...] = (),
        bos: str | None = None,
    ) -> Path:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = tmp_path / f"{of}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models[of], folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if eos is not None:  # as a base model: its end of text alone, everywhere
            tokenizer.eos_token = eos
            for name in ("generation_config.json", "config.json"):
                config = json.loads((folder / name).read_text())
                config["eos_token_id"] = tokenizer.convert_tokens_to_ids(eos)
                (folder / name).write_text(json.dumps(config))
        if template is not None:
            tokenizer.chat_template = template
        if bos is not None:
            tokenizer.bos_token = bos
        if added:
            tokenizer.add_special_tokens({"additional_special_tokens": list(added)}, replace_extra_special_tokens=False)
            module = AutoModelForCausalLM.from_pretrained(folder)
            module.resize_token_embeddings(len(tokenizer))
            module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def load(path: Path, **options: Any) -> LanguageModel:
    return LanguageModel.load(path, dtype=torch.float32, device="cpu", **options)


def sides(recipe: Make, student: Path | None = None, teacher: Path | None = None, *settings: str) -> Any:
    paths = [f"{key}={path}" for key, path in (("model.path", student), ("teacher.path", teacher)) if path is not None]
    return read_sides(recipe("opd", *paths, *settings))


def test_a_base_model_stops_where_its_template_ends_a_turn(variant: Variant, tmp_path: Path) -> None:
    """Its tokenizer and its generation config name the end of text alone; solutions are closed as the template closes
    turns; a checkpoint carries all of it to whoever serves it."""
    base = load(variant("student", eos="<|endoftext|>"))
    assert base.stop_ids == {PAD, END} and base.end_id == END
    save_model(base, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["eos_token_id"] == [PAD, END]
    assert load(variant("student", eos="<|endoftext|>"), stop_tokens=["<|endoftext|>"]).stop_ids == {PAD}
    assert load(variant("student"), stop_tokens=[END]).stop_ids == {END}


@pytest.mark.parametrize("wrong", ["<eos>", 999, "12"])
def test_a_stop_token_that_is_none_is_refused(models: dict[str, Path], wrong: str | int) -> None:
    with pytest.raises(UserError, match=r"model.stop_tokens: .* is no token of"):
        load(models["student"], stop_tokens=[wrong])


def test_an_adapter_keeps_its_stops(recipe: Make, tmp_path: Path) -> None:
    """peft saves no generation config: what was trained to stop at `<s>` stops there when it is evaluated."""
    chosen = recipe("opsd", "model.lora.r=4", "teacher.weights=adapter_off", 'model.stop_tokens=["<e>", "<s>"]')
    student = Parts(chosen, None).student
    save_model(student, tmp_path / "adapter")
    assert student.stop_ids == {1, END}
    assert load(tmp_path / "adapter").stop_ids >= {1, END}
    assert read_sides(chosen, student=tmp_path / "adapter").student.stops.ids == {1, END}


def test_a_teacher_that_ends_elsewhere_is_refused_before_weights(
    recipe: Make, variant: Variant, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's template ends no turn, so it stops at its end of text; the teacher ends with <e>. In 0.1 such a
    student learned to write <e> and went on."""
    student = variant("student", eos="<|endoftext|>", template=NO_END)

    def no_weights(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    chosen = recipe("opd", f"model.path={student}")
    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "load", no_weights)
        with pytest.raises(UserError, match=r'ends its answers with "<e>", which does not stop the student'):
            train(chosen, console=console)
    assert not chosen.run_dir.exists()
    way_out = 'model.stop_tokens=["<|endoftext|>", "<e>"]'
    with pytest.raises(UserError, match=r'set model.stop_tokens = \["<\|endoftext\|>", "<e>"\]'):
        read_sides(chosen)
    assert read_sides(recipe("opd", f"model.path={student}", way_out)).student.stops.ids == {PAD, END}
    train(recipe("opd", f"model.path={student}", way_out, "train.steps=1"), console=console)


def test_a_teacher_that_knows_the_student_s_end_as_no_end_is_warned_of(recipe: Make, variant: Variant) -> None:
    teacher = variant("teacher", eos="<|endoftext|>", template=NO_END)
    (said,) = [s for s in sides(recipe, None, teacher).warnings if "ends its answers" in s]
    assert 'with "<e>", the teacher with "<|endoftext|>"' in said


def test_equal_sides_say_nothing(recipe: Make) -> None:
    found = sides(recipe)
    assert found.warnings == ()
    assert sides(recipe, None, None, "teacher.template_kwargs={}").warnings == ()


def test_how_answers_open(recipe: Make, variant: Variant) -> None:
    """Another opening, and another mode of thinking, unless [teacher] names it."""
    thinks = NO_END.replace("<a>", "<a><think>\n")
    teacher = variant("teacher", template=thinks)
    (said,) = [s for s in sides(recipe, None, teacher).warnings if "open with" in s]
    assert "'<a>', for the teacher with '<a><think>\\n'" in said
    assert "the student begins without a thought, the teacher inside a thought" in said
    assert not [s for s in sides(recipe, None, teacher, "teacher.close_thinking=false").warnings if "open with" in s]


def test_the_teacher_closes_thinking_as_the_student_does(recipe: Make, variant: Variant) -> None:
    """OPSD's asymmetry is a choice by name; a self-teacher reads as the student too."""
    thinks = variant("student", template=NO_END.replace("<a>", "<a><think>\n") + "{# <e> #}")
    path, asks = f"model.path={thinks}", [{"role": "user", "content": "1+1="}]
    for setting, opening in (((), "<think>\n</think>\n\n"), (("teacher.close_thinking=false",), "<think>\n")):
        chosen = recipe("opsd", path, "model.close_thinking=true", *setting)
        parts = Parts(chosen, None)
        assert parts.renderer.prompt_text(asks).endswith("<think>\n</think>\n\n")
        assert parts.teacher is not None and parts.teacher.renderer.prompt_text(asks).endswith(opening)
    assert any("closes nothing" in s for s in sides(recipe, None, None, "model.close_thinking=true").warnings)


def test_a_system_prompt_for_each_side(recipe: Make) -> None:
    asks = [{"role": "user", "content": "1+1="}]
    for settings, theirs in (((), "<s>7<u>"), (('teacher.system="8"',), "<s>8<u>"), (('teacher.system=""',), "<u>")):
        parts = Parts(recipe("opd", 'model.system="7"', *settings), None)
        assert parts.renderer.prompt_text(asks).startswith("<s>7<u>1+1=")
        assert parts.teacher is not None and parts.teacher.renderer.prompt_text(asks).startswith(theirs)
    with pytest.raises(UserError, match="drops the system turn"):
        sides(
            recipe, None, None, 'model.system="7"', "model.chat_template=" + _file(recipe, "{{ messages[-1].content }}")
        )


def _file(recipe: Make, text: str) -> str:
    path = Path(recipe("opd").runs_dir).parent / "template.jinja"
    path.write_text(text)
    return str(path)


def test_keywords(recipe: Make, variant: Variant, console: Console) -> None:
    """A misspelt one is refused before anything is written; one the teacher inherits and cannot read is told."""
    switch = NO_END.replace("<a>", "<a>{% if enable_thinking %}0{% endif %}") + "<e>"
    knows = variant("student", template=switch)
    misspelt = recipe("opd", f"model.path={knows}", "model.template_kwargs={ enable_thinkin = true }")
    with pytest.raises(UserError, match='did you mean "enable_thinking"'):
        train(misspelt, console=console)
    assert not misspelt.run_dir.exists()
    found = sides(recipe, knows, None, "model.template_kwargs={ enable_thinking = true }")
    assert any("teacher's chat template reads no enable_thinking" in s for s in found.warnings)
    with pytest.raises(UserError, match="reads no enable_thinking"):
        sides(recipe, knows, None, "teacher.template_kwargs={ enable_thinking = true }")


def test_a_prompt_without_its_beginning_of_text(recipe: Make, variant: Variant) -> None:
    """A tokenizer that begins every text with it, and a template that does not write it."""
    student = variant("student", bos="<|endoftext|>")
    file = student / "tokenizer.json"
    parsed = json.loads(file.read_text())
    special = {"id": "<|endoftext|>", "ids": [PAD], "tokens": ["<|endoftext|>"]}
    parsed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": special},
    }
    file.write_text(json.dumps(parsed))
    (said,) = [s for s in sides(recipe, student).warnings if "begins every text" in s]
    assert said.startswith("model: its tokenizer begins every text with '<|endoftext|>'")


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_unused_token_more_is_no_other_family(
    who: str, recipe: Make, variant: Variant, models: dict[str, Path], console: Console
) -> None:
    """A pad token that a fine-tuning tool added: both sides are limited to the ids that both have, and told so."""
    paths = {"model": models["student"], "teacher": models["teacher"]}
    paths["model" if who == "student" else who] = variant(who, added=("<pad>", "<more>"))
    chosen = recipe("opd", *(f"{key}.path={path}" for key, path in paths.items()), "train.steps=1")
    num = load(models["student"]).num_tokens
    counts = (num + 2, num) if who == "student" else (num, num + 2)
    (said,) = read_sides(chosen).warnings
    assert f"have {num} token ids in common, of {counts[0]} and {counts[1]}: the others (e.g. '<pad>'" in said
    parts = Parts(chosen, None)
    assert parts.teacher is not None
    for model in (parts.student, parts.teacher.model):
        assert model.num_tokens == model.head().num_tokens == num and model.head().absent_ids is None
    assert said in train(chosen, console=console)["warnings"]
    rows = load_rows(chosen.run_dir / "rows/step_000001.parquet")
    assert max(max(row.rollout.answer_ids) for row in rows) < num


def test_ids_in_the_middle_that_only_one_side_has(recipe: Make, variant: Variant, console: Console) -> None:
    """Each side has another token behind the vocabulary both know, then one they share: the hole is never sampled,
    scored or taught, and what is left is a distribution."""
    student, teacher = variant("student", added=("<mine>", "<both>")), variant("teacher", added=("<theirs>", "<both>"))
    chosen = recipe("opd", f"model.path={student}", f"teacher.path={teacher}", "train.steps=1")
    parts = Parts(chosen, None)
    assert parts.teacher is not None
    both = parts.student.tokenizer.convert_tokens_to_ids("<both>")
    hole = both - 1
    for model in (parts.student, parts.teacher.model):
        head, hidden_NH = model.head(), model.hidden([[5, 9]], [[11, 12]])
        assert head.num_tokens == both + 1 and head.absent_ids is not None and head.absent_ids.tolist() == [hole]
        logprob_NV = head.logits(head.trimmed(torch.float32).project(hidden_NH), 1.0).log_softmax(-1)
        whole_NV = (hidden_NH @ head.weight_VH[: both + 1].T).detach()
        whole_NV[:, hole] = -torch.inf
        kept = [index for index in range(both + 1) if index != hole]
        torch.testing.assert_close(logprob_NV[:, kept], whole_NV.log_softmax(-1)[:, kept])
        assert (logprob_NV[:, hole].exp() == 0).all()
    (signal,) = parts.teacher.score([[5, 9]], [[11, 12]], Asked("topk", both), temperature=1.0)
    assert signal.topk_ids_TK is not None and hole not in signal.topk_ids_TK
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        shared = ["method.teacher_share=0.5"] if divergence == "jsd" else []
        name = f"name={divergence}"
        run = recipe("opd", f"model.path={student}", f"teacher.path={teacher}", "train.steps=1", name,
                     f"method.divergence={divergence}", *shared)  # fmt: skip
        train(run, console=console)
        before, after = load(student), load(run.run_dir / "checkpoints/step_000001/model")
        moved = (before.head().weight_VH != after.head().weight_VH).any(-1)
        assert moved[both] and after.head().weight_VH.isfinite().all()


def test_ids_that_mean_something_else_are_refused(recipe: Make, variant: Variant) -> None:
    """Two added tokens under swapped ids: unused, they are left out; spoken of in a template, they are refused."""
    student, teacher = variant("student", added=("<x>", "<y>")), variant("teacher", added=("<y>", "<x>"))
    found = sides(recipe, student, teacher)
    common = common_ids(found.student.renderer, found.teacher.renderer, names=("a", "b"))
    assert common is not None and common.num_common == common.num_student - 2 and common.sentence in found.warnings
    speaks = variant("teacher", added=("<y>", "<x>"), template=NO_END + "<x>")
    with pytest.raises(UserError, match=r"1 tokens have other ids, e.g. '<x>'"):
        sides(recipe, student, speaks)


def test_an_end_that_the_teacher_lacks_is_refused(recipe: Make, variant: Variant) -> None:
    template = NO_END.replace("{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %}<stop>{% endif %}")
    student = variant("student", added=("<stop>",), template=template)
    with pytest.raises(UserError, match=r'ends its answers with "<stop>", which the teacher\'s vocabulary lacks'):
        sides(recipe, student)
    way_out = 'model.stop_tokens=["<|endoftext|>", "<e>"]'
    assert sides(recipe, student, None, way_out).student.stops.end == END


def test_strangers_that_share_a_few_tokens(models: dict[str, Path], variant: Variant) -> None:
    """No token has two ids, and yet there is nothing to compare."""
    student = load(models["student"]).renderer()

    class Other:
        name_or_path, chat_template, special_tokens_map, added_tokens_encoder = "other", None, {}, {}  # type: ignore[var-annotated]

        def get_vocab(self) -> dict[str, int]:
            return {"<|endoftext|>": 0} | {f"w{index}": index for index in range(5, 90)}

    from opdkit.contexts.render import Renderer

    with pytest.raises(UserError, match="only 1 of the student's"):
        common_ids(student, Renderer(Other()), names=("a", "b"))


def test_the_date_stays_in_a_run_folder(recipe: Make, variant: Variant, console: Console) -> None:
    """A run that is resumed on another day asks in the same words; one that is begun anew takes today's."""
    dated = NO_END.replace("<u>", "<s>{{ strftime_now('%d%H%M%S')}}<u>") + "<e>"
    student = variant("student", template=dated)
    settings = (f"model.path={student}", "train.save_every=1", "sampling.group_size=2", "data.max_prompt_tokens=60")
    chosen = recipe("grpo", *settings, "train.steps=1")
    warnings = train(chosen, console=console)["warnings"]
    record = json.loads((chosen.run_dir / "environment.json").read_text())
    assert any("prints the date, which stays" in s for s in warnings)
    record["clock"] = "2020-02-29T23:59:58"
    (chosen.run_dir / "environment.json").write_text(json.dumps(record))
    longer = recipe("grpo", *settings, "train.steps=2")
    train(longer, console=console, resume=True)
    (row, *_) = load_rows(longer.run_dir / "rows/step_000002.parquet")
    text = load(student).tokenizer.decode(row.rollout.prompt_ids)
    assert text.startswith("<s>29235958<u>")
    train(chosen, console=console, overwrite=True)
    assert json.loads((chosen.run_dir / "environment.json").read_text())["clock"] > "2021"


def test_check_models(recipe: Make, variant: Variant, tmp_path: Path) -> None:
    """Without --models nothing of a model is read, and that is said; with it, the sentences are train's."""
    from opdkit.cli.base import app

    def check(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "500"})

    base = variant("student", eos="<|endoftext|>", template=NO_END)
    file = tmp_path / "recipe.toml"
    file.write_text(toml.dumps(recipe("opd", f"model.path={base}").as_dict()))
    plain = check(str(file))
    assert plain.exit_code == 0 and "no model was read" in plain.output
    with pytest.raises(UserError, match=r"recipe\.toml: the teacher ends its answers with"):
        check_models(file)
    looked = check(str(file), "--models")
    assert looked.exit_code != 0 and "no model was read" not in looked.output
    assert check(str(file), "--models", "--set", 'model.stop_tokens=["<|endoftext|>", "<e>"]').exit_code == 0


def test_stops_of_nothing() -> None:
    class Bare:
        eos_token_id, chat_template, name_or_path = None, None, "bare"

    from opdkit.contexts.render import Renderer

    with pytest.raises(UserError, match=r"bare names no end-of-text token.*set model.stop_tokens"):
        find_stops(Renderer(Bare()), None, name="bare")
