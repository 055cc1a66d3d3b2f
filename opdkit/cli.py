"""The command line. Every command imports what it needs when it runs, so that `opdkit --help` is instant."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from opdkit import __version__
from opdkit.errors import Interrupted, UserError

app = typer.Typer(
    help="Post-train language models by on-policy distillation: the student samples its own answers, a teacher scores "
    "every token, the student learns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)
console = Console()
errors = Console(stderr=True)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. --set train.lr=1e-5."),
]


# Options of every command that samples answers to a data set.
Model = Annotated[str, typer.Option(help="A folder in Hugging Face format, a checkpoint's model/, or a hub id.")]
Task = Annotated[str, typer.Option(help="Who grades: see `opdkit tasks`.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many problems, drawn by a seed.")]
Temperature = Annotated[float, typer.Option(min=0.0)]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0)]
TopK = Annotated[int, typer.Option(min=0, help="0: off.")]
MaxAnswerTokens = Annotated[int, typer.Option(min=1)]
Seed = Annotated[int, typer.Option(min=0)]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", ...')]
ChatTemplate = Annotated[str | None, typer.Option(help='A jinja file, or "plain".')]
TemplateKwargs = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="KEY=VALUE", help="For the chat template, e.g. enable_thinking=false."),
]
Instruction = Annotated[str, typer.Option(help="auto, boxed, answer_line or none.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code")]


def main() -> None:
    """Run a command; a UserError becomes its sentences and status 2, Ctrl-C becomes status 130."""
    if not sys.stderr.isatty():  # the libraries' bars are redrawn lines; in a log file they are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except UserError as error:
        for sentence in str(error).splitlines():
            errors.print(f"[bold red]error[/bold red] {_escape(sentence)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as stop:
        errors.print(f"Stopped. {stop}", highlight=False, soft_wrap=True, markup=False)
        sys.exit(130)


@app.command()
def quickstart(
    seed: Annotated[int, typer.Option(help="Another seed makes other models, problems and samples.")] = 0,
    out: Annotated[Path, typer.Option(help="The run folder; an earlier quickstart there is replaced.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """The whole job from nothing, in minutes on a CPU.

    Makes a teacher and a student, trains the student by on-policy distillation and by its baselines, evaluates and
    reports.
    """
    from opdkit.quickstart import learned, quickstart

    try:
        summary = quickstart(out, seed=seed, console=console)
    except Interrupted:
        raise Interrupted("Run it again to start anew.") from None
    if not learned(summary):
        errors.print(
            "The student did not become measurably better: this is a bug, or an unlucky seed.", style="bold red"
        )
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of this name.")] = False,
) -> None:
    """Train the recipe's student; writes runs/<name>/."""
    from opdkit.recipe import load_recipe

    resolved = load_recipe(recipe, set_ or [])  # refused before anything heavy is imported
    from opdkit.report import write_report
    from opdkit.train.loop import train

    try:
        train(resolved, resume=resume, overwrite=overwrite, console=console)
        console.print(f"report: {write_report(resolved.run_dir)}", highlight=False, soft_wrap=True)
    except Interrupted:
        settings = [word for setting in set_ or [] for word in ("--set", setting)]
        again = shlex.join(["opdkit", "train", str(recipe), *settings, "--resume"])
        raise Interrupted(f"Everything is saved in {resolved.run_dir}; go on with:\n  {again}") from None


@app.command()
def check(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes (TOML).")],
    set_: Set = None,
) -> None:
    """Say what is wrong with recipes, and what is doubtful; loads no weights."""
    from opdkit.recipe import load_recipe, warnings

    faults: list[str] = []
    for path in recipes:
        try:
            resolved = load_recipe(path, set_ or [])
        except UserError as error:
            faults += str(error).splitlines()
        else:
            console.print(f"[green]ok[/green] {path}", highlight=False, soft_wrap=True)
            for sentence in warnings(resolved):
                console.print(f"[yellow]warning[/yellow] {_escape(sentence)}", highlight=False, soft_wrap=True)
    if faults:
        raise UserError("\n".join(faults))


@app.command()
def methods() -> None:
    """The methods and their defaults."""
    from opdkit.methods import METHODS

    table = Table(
        "method", "what it is", "teacher says", "method keys", "the paper's defaults elsewhere", show_lines=True
    )
    for name, method in METHODS.items():
        example = method.model_validate({"name": name})
        about = (sys.modules[method.__module__].__doc__ or "").splitlines()[0]
        keys = [f"{k} = {_toml(v)}" for k, v in example.model_dump().items() if k != "name"]
        paper = [f"{section}.{k} = {_toml(v)}" for section, d in method.defaults.items() for k, v in d.items()]
        table.add_row(name, about, example.needs.teacher, "\n".join(keys), "\n".join(paper))
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut cannot be copied
    console.print(table)


@app.command()
def tasks() -> None:
    """The tasks that can be graded."""
    from opdkit.tasks import TASKS

    table = Table("task", "what it grades")
    for name, task in TASKS.items():
        table.add_row(name, (sys.modules[task.__module__].__doc__ or "").splitlines()[0])
    console.print(table)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[list[str], typer.Option(help="A file, folder, hub name or built-in world; may be given again.")],
    task: Task,
    n: Annotated[int, typer.Option("-n", min=1, help="Answers per problem.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json and the answers.")] = None,
    limit: Limit = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_answer_tokens: MaxAnswerTokens = 1024,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    chat_template: ChatTemplate = None,
    template: TemplateKwargs = None,
    instruction: Instruction = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Sample, grade, count; resumes.

    avg@n, pass@k and maj@n with 95 % intervals over problems. Answers are kept as they come: run the same command
    again to go on.
    """
    from opdkit.recipe import key_values
    from opdkit.train.evaluate import EvaluateOptions, evaluate_model

    options = EvaluateOptions(
        model=model,
        data=tuple(data),
        task=task,
        num_samples=n,
        limit=limit,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_answer_tokens=max_answer_tokens,
        seed=seed,
        dtype=dtype,
        device=device,
        chat_template=chat_template,
        template_kwargs=key_values(template or [], flag="--template"),
        instruction=instruction,
        trust_remote_code=trust_remote_code,
    )
    try:
        evaluate_model(options, out=out, console=console)
    except Interrupted:
        raise Interrupted("The answers so far are kept; run the same command to go on.") from None


@app.command()
def sample(
    model: Model,
    data: Annotated[str, typer.Option(help="A file, folder, hub name or built-in world.")],
    task: Task,
    out: Annotated[Path, typer.Option(help="JSONL to write; `data.train` reads it as it is.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Answers wanted per problem.")] = 1,
    reject: Annotated[str, typer.Option(help="Rules, in commas: truncated,no_answer,wrong,repetition; or none.")] = (
        "truncated,no_answer,repetition"
    ),
    attempts: Annotated[int, typer.Option(min=1, help="For each wanted answer.")] = 3,
    limit: Limit = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_answer_tokens: MaxAnswerTokens = 1024,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    chat_template: ChatTemplate = None,
    template: TemplateKwargs = None,
    instruction: Instruction = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """A model's answers as training data; resumes.

    Answers are graded and rejected by named rules, and tried again. Run the same command again to go on.
    """
    from opdkit.recipe import key_values
    from opdkit.train.evaluate import EvaluateOptions
    from opdkit.train.sample import SampleOptions, rules_of
    from opdkit.train.sample import sample as sample_answers

    options = EvaluateOptions(
        model=model,
        data=(data,),
        task=task,
        num_samples=n,
        limit=limit,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_answer_tokens=max_answer_tokens,
        seed=seed,
        dtype=dtype,
        device=device,
        chat_template=chat_template,
        template_kwargs=key_values(template or [], flag="--template"),
        instruction=instruction,
        trust_remote_code=trust_remote_code,
    )
    try:
        sample_answers(
            SampleOptions(model=options, reject=rules_of(reject), attempts=attempts), out=out, console=console
        )
    except Interrupted:
        raise Interrupted("The answers so far are kept; run the same command to go on.") from None


@app.command("make-model")
def make_model(
    out: Annotated[Path, typer.Argument(help="Folder to write, in Hugging Face format.")],
    data: Annotated[str, typer.Option(help="What its tokenizer and its first lessons come from: a world or a file.")],
    hidden_size: Annotated[int, typer.Option(min=16)] = 64,
    num_layers: Annotated[int, typer.Option(min=1)] = 3,
    vocab_size: Annotated[int, typer.Option(min=300, help="For text; worlds use their characters.")] = 2048,
    steps: Annotated[
        int, typer.Option(min=0, help="SFT steps on the data's solutions; 0 leaves random weights.")
    ] = 300,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a tiny test model from nothing.

    Qwen3 architecture, its own tokenizer and chat template, trained a little on the data's solutions.
    """
    from opdkit.train.make_model import make_model

    make_model(
        out, data=data, hidden_size=hidden_size, num_layers=num_layers, vocab_size=vocab_size, steps=steps, seed=seed,
        console=console,
    )  # fmt: skip


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html anew from the run folder's files."""
    from opdkit.report import write_report

    console.print(f"wrote {write_report(run)}", highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        console.print(__version__, highlight=False, soft_wrap=True)
        raise typer.Exit


def _toml(value: Any) -> str:
    return "-" if value is None else json.dumps(value)


def _escape(text: Any) -> str:
    from rich.markup import escape

    return escape(str(text))


if __name__ == "__main__":
    main()
