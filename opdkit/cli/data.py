"""Commands that make and examine data sets: `opdkit data ...`. None of them needs a model, or torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdkit.cli.base import ChatTemplate, Device, TemplateKwargs, app, console, finite
from opdkit.errors import UserError
from opdkit.hub import asked_once, may_be_on_hub
from opdkit.run.console import counting, say

if TYPE_CHECKING:
    from opdkit.contexts.render import Renderer
    from opdkit.data.dedup import Against
    from opdkit.data.inspection import Inspection
    from opdkit.data.prepare import Card
    from opdkit.types import Message, Problem

data_app = typer.Typer(
    help="Prepare, compare and examine data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)
app.add_typer(data_app, name="data")

_SHOWN = 3  # rows of each kind of finding; the card has all
_SHOWN_CHARACTERS = 20_000  # of the row that is shown


@data_app.command("list")
def list_sets() -> None:
    """The data sets that can be prepared, and where they are published."""
    from opdkit.data.sets import DATA_SETS, MAIN

    for entry in DATA_SETS.values():
        hub = entry.hub
        where = "no hub; give --source" if hub is None else hub.id + (f":{hub.config}" if hub.config else "")
        revision = "" if hub is None else f" @ {hub.revision or f'{MAIN} (not pinned)'}"
        _say(f"{entry.name:<24}{entry.task:<17}{entry.template:<15}{where}{revision}")


@data_app.command("prepare")
def prepare_set(
    name: Annotated[str, typer.Argument(help="See `opdkit data list`.")],
    source: Annotated[str, typer.Option(help='A file or folder in the published format, or "hub".')],
    out: Annotated[Path, typer.Option(help="Folder for <split>.parquet and prepared.json.")],
    instruction: Annotated[
        str, typer.Option(help="auto: as published. For mathematics also boxed, answer_line, none, dapo, ...")
    ] = "auto",
    format_: Annotated[str, typer.Option("--format", help="opdkit or verl.")] = "opdkit",
    revision: Annotated[str | None, typer.Option(help="A commit, branch or tag of the hub.")] = None,
    split: Annotated[str, typer.Option(help="Of a raw benchmark: problem, or shared (code).")] = "problem",
    test_share: Annotated[
        float | None, typer.Option(callback=finite, help="Of a raw benchmark that is split by problem.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the split; 42 is the published one.")] = 42,
    since: Annotated[str | None, typer.Option(metavar="DATE", help="First day of its problems.")] = None,
    until: Annotated[str | None, typer.Option(metavar="DATE", help="The day after the last one.")] = None,
    drop_repeats: Annotated[
        bool,
        typer.Option("--drop-repeats", help="One row of each question; none where its answers contradict each other."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was prepared there before.")] = False,
) -> None:
    """A published data set as training and evaluation files, with one prompt for both."""
    from opdkit.data.prepare import PrepareOptions, prepare

    options = PrepareOptions(
        instruction=instruction,
        format=format_,
        revision=revision,
        split=split,
        test_share=test_share,
        seed=seed,
        since=since,
        until=until,
        drop_repeats=drop_repeats,
        overwrite=overwrite,
    )
    with counting(console, "rows read") as progress:
        card = prepare(name, source=source, out=out, options=options, progress=progress)
    _show_card(card, out)


@data_app.command("dedup")
def dedup_file(
    source: Annotated[str, typer.Argument(help="The file to remove rows from.")],
    against: Annotated[list[str], typer.Option(help="A file, a hub name, or a folder of evaluation files.")],
    out: Annotated[Path | None, typer.Option(help="What is left of the file, in its own format.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report.")] = False,
    method: Annotated[str, typer.Option(help="exact, normalised, ngram, containment or embedding.")] = "ngram",
    threshold: Annotated[
        float | None, typer.Option(callback=finite, help="From which similarity on a row goes: 0.5, of embeddings 0.9.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of --method embedding: a sentence encoder.")] = None,
    device: Device = "cpu",
    ngram: Annotated[int, typer.Option(min=1, max=1000, help="Tokens of a shingle.")] = 3,
    examples: Annotated[int, typer.Option(min=0, help="Pairs to show for each set; the report has all.")] = 3,
    report: Annotated[Path | None, typer.Option(help="JSON file for every pair.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out and --report.")] = False,
) -> None:
    """Remove from a file what is, or nearly is, in other sets; --dry-run only says what is (contamination)."""
    from opdkit.data.dedup import DedupOptions, check_report, dedup, write_report
    from opdkit.data.files.sources import files_left_out
    from opdkit.data.similar import DEFAULT_THRESHOLD

    if (out is None) != dry_run:
        raise UserError("give either --out FILE, to write what is left, or --dry-run, to write nothing")
    if report is not None:
        check_report(report, overwrite=overwrite)
        if overwrite and report.resolve() in {Path(source).resolve(), *([out.resolve()] if out else [])}:
            raise UserError(f"--report {report} is also the file to compare or --out; name another")
    if threshold is None:
        threshold = DEFAULT_THRESHOLD.get(method, 0.5)
    options = DedupOptions(method=method, threshold=threshold, n=ngram)  # type: ignore[arg-type]
    embed = None
    if method == "embedding" and model is not None:
        from opdkit.engines.embed import embedder

        embed = embedder(model, device=device)
    elif model is not None:
        raise UserError(f"--model {model} is only read with --method embedding; leave it out")
    with counting(console, "questions compared") as progress:
        found = dedup(source, against, out=out, options=options, overwrite=overwrite, progress=progress, embed=embed)
    for other in (source, *against):
        for sentence in files_left_out(other):
            _warn(sentence)
    if report is not None:
        write_report(found, report)
    if found.num_not_compared:
        _warn(f"{found.num_not_compared} of the {found.num_rows} rows of {source} have no question, and stay")
    for entry in found.against:
        _show_against(entry, examples)
    left = found.num_rows - found.num_removed
    said = "would be left" if out is None else f"left in {out}"
    _say(f"{found.num_removed} of {found.num_rows} rows of {source} are in another set; {left} {said}")


@data_app.command("inspect")
def inspect_file(
    source: Annotated[str, typer.Argument(help="A file, a folder or a hub name.")],
    task: Annotated[str | None, typer.Option(help="Who grades; default: what the rows say, or math.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer counts and whose template renders.")] = None,
    chat_template: ChatTemplate = None,
    template: TemplateKwargs = None,
    row: Annotated[int, typer.Option(min=1, help="The row to show, of those that can be used.")] = 1,
    problems: Annotated[int, typer.Option(min=0, help="Findings to show of each kind.")] = 10,
    no_grade: Annotated[bool, typer.Option("--no-grade", help="Do not grade the gold answers.")] = False,
) -> None:
    """What is in a data set, and what is wrong with it, by line; one row as student and teacher read it."""
    from opdkit.contexts.render import Renderer, read_chat_template
    from opdkit.data.inspection import by_kind, grade_golds, inspect_data
    from opdkit.recipe import key_values
    from opdkit.tasks.guard import make_task, task_named

    if model is None and (chat_template or template):
        raise UserError("--chat-template and --template render with a tokenizer: give --model as well")
    renderer = None
    if model is not None:
        kwargs = key_values(template or [], flag="--template")
        renderer = Renderer(_tokenizer(model), read_chat_template(chat_template), kwargs)
    options = None if task is None else task_named(task, may_be_none=True)
    with counting(console, "rows read") as progress:
        found = inspect_data(source, task=None if options is None else options.name, progress=progress)
    guess = " (a guess: nothing in it says so; --task)" if found.is_guessed else ""
    _say(f"{source}: {found.num_rows} rows, {len(found.problems)} of them problems for the task {found.task}{guess}")
    for entry in found.columns:
        _say(f"  {entry.num_rows} rows of the schema {entry.name!r}: {', '.join(entry.columns)}")
    if found.problems:
        _show_lengths(found, renderer)
        grades = options or task_named(found.task, may_be_none=True)
        if not no_grade and not grades.is_none:
            grader = make_task(grades)
            try:
                num_graded = grade_golds(found, grader)
            finally:
                grader.close()
            _show_grades(found, num_graded)
        _show_row(found, row, renderer)
    for kind, members in by_kind(found.findings).items():
        _warn(f"{kind}: {len(members)} times")
        for finding in members[:problems]:
            _say(f"  {finding.where}: {finding.what}")
        if len(members) > problems:
            _say(f"  ... and {len(members) - problems} more (--problems)")
    if not found.findings:
        _say("no problem found")


def _show_lengths(found: Inspection, renderer: Renderer | None) -> None:
    from opdkit.data.inspection import HUGE_CHARACTERS, lengths

    def num_tokens(text: str | None, ids: Callable[[Renderer], Sequence[int]]) -> int | None:
        if text is None or renderer is None:
            return None if text is None else len(text)
        return len(ids(renderer)) if len(text) <= HUGE_CHARACTERS else None  # it would take minutes and gigabytes

    def of_solution(problem: Problem) -> int | None:
        text = problem.solution
        return num_tokens(text, lambda reader: reader.encode(str(text)))

    def of_prompt(problem: Problem) -> int | None:
        text = "".join(turn["content"] for turn in problem.messages)
        return num_tokens(text, lambda reader: reader.prompt_ids(problem.messages))

    unit = "characters" if renderer is None else "tokens"
    for name, measure in (("prompt", of_prompt), ("solution", of_solution)):
        seen = lengths(found, measure)
        if seen is not None:
            _say(
                f"  {name}, {unit}: {seen.least} to {seen.most} (median {seen.median}, 95 % up to {seen.p95}), "
                f"in {seen.num} rows; the longest is {seen.longest}"
            )


def _show_grades(found: Inspection, num_graded: int) -> None:
    wrong = sum(finding.kind == "gold is not right" for finding in found.findings)
    rest = len(found.problems) - num_graded
    ungraded = f"; {rest} have no gold or solution to grade" if rest else ""
    _say(f"  gold graded against itself: {num_graded - wrong} of {num_graded} right{ungraded}")


def _show_row(found: Inspection, number: int, renderer: Renderer | None) -> None:
    from opdkit.data.inspection import teacher_messages

    if number > len(found.problems):
        raise UserError(f"--row {number}: only {len(found.problems)} rows can be used")
    problem = found.problems[number - 1]

    def rendered(messages: Sequence[Message]) -> str:
        text = "\n".join(f"[{turn['role']}] {turn['content']}" for turn in messages)
        if renderer is not None:
            text = renderer.prompt_text(messages)
        more = len(text) - _SHOWN_CHARACTERS
        return text if more <= 0 else f"{text[:_SHOWN_CHARACTERS]}... ({more:,} characters more)"

    _say(f"--- {found.where[number - 1]}, id {problem.id}, as the student reads it")
    say(console, *rendered(problem.messages).split("\n"))
    privileged = teacher_messages(problem, renderer)
    if privileged is None:
        _say("--- the teacher reads the same: the row has no solution to show it")
    else:
        _say("--- as a teacher with the reference solution reads it (context.kind = reference_solution)")
        say(console, *rendered(privileged).split("\n"))
    gold = "none: an answer to it has no reward" if problem.gold is None else _beginning(problem.gold, 1000)
    _say(f"--- gold: {'its tests' if problem.gold is None and problem.has_gold else gold}")


def _tokenizer(model: str) -> Any:
    is_folder = Path(model).is_dir()
    if not is_folder and not may_be_on_hub(model):
        raise UserError(f"--model {model}: there is no such folder; give one in Hugging Face format, or a hub id")
    from transformers import AutoTokenizer

    said = None
    try:
        with nullcontext() if is_folder else asked_once(model, "model") as said:
            return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # libraries raise many kinds for a bad folder; every one of them is about the input
        reason = said or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {model} has no tokenizer that can be loaded: {reason}") from None


def _show_against(entry: Against, examples: int) -> None:
    if entry.num_not_compared:
        _warn(f"{entry.num_not_compared} rows of {entry.source} have no question, and were not compared")
    other = sum(not pair.same_numbers for pair in entry.pairs)
    numbers = f", {other} of them with other numbers" if other else ""
    _say(f"{entry.source}: {entry.num_questions} questions; {len(entry.pairs)} rows are alike{numbers}")
    for pair in entry.pairs[:examples]:
        _say(f"  {pair.similarity:.2f}  {pair.where} and {pair.other}")
        _say(f"        {_beginning(pair.question)}")
        _say(f"        {_beginning(pair.other_question)}")


def _show_card(card: Card, out: Path) -> None:
    for sentence in card.files_left_out:
        _warn(sentence)
    for split, written in card.splits.items():
        _say(f"{written.path}: {written.rows} problems ({split}), prompt {card.template!r}")
        if written.num_repeated_rows:
            done = f"{written.num_dropped_as_repeats} rows dropped" if card.options["drop_repeats"] else "all rows kept"
            again = f"{written.num_repeated_questions} questions come again, in {written.num_repeated_rows} rows"
            _warn(f"{split}: {again}; {done} (--drop-repeats)")
        for found in written.contradictions[:_SHOWN]:
            golds = " and ".join(repr(gold) for gold in dict.fromkeys(found["golds"]))
            _warn(f"{split}: contradictory answers {golds} to: {_beginning(found['question'])}")
        _more(len(written.contradictions), "contradictory answers", out)
        if written.num_renamed_ids:
            _warn(f"{split}: {written.num_renamed_ids} ids came more than once, and were renamed to id#2, id#3, ...")
    if card.num_unfilled_boxes:
        _say(f"mended {card.num_unfilled_boxes} prompts that asked for a literal \\boxed{{{{}}}}")
    if card.num_left_out or card.num_outside_dates:
        _say(f"left out as published: {card.num_left_out} of other kinds, {card.num_outside_dates} of other dates")
    if card.num_shared_questions:
        _warn(f"{card.num_shared_questions} questions are in more than one split: their evaluation measures memory")
    for where, why in card.dropped[:_SHOWN]:
        _warn(f"not usable: {where}: {why}")
    _more(len(card.dropped), "unusable rows", out)
    if card.commit is not None:
        _say(f"from commit {card.commit}; --revision {card.commit} takes the same one again")


def _more(count: int, what: str, out: Path) -> None:
    if count > _SHOWN:
        _warn(f"{count} {what} in all: see {out / 'prepared.json'}")


def _beginning(text: str, characters: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 3] + "..."


def _say(sentence: str) -> None:
    say(console, sentence)


def _warn(sentence: str) -> None:
    say(console, sentence, mark="warning")
