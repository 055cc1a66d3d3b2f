"""What every command shares: the application, its two consoles, and the options of commands that sample answers."""

from __future__ import annotations

import functools
import inspect
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from opdkit.errors import UserError
from opdkit.run.console import Terminal

app = typer.Typer(
    help="Post-train language models by on-policy distillation: the student samples its own answers, a teacher scores "
    "every token, the student learns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)
console = Terminal()
errors = Terminal(stderr=True)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. --set train.lr=1e-5."),
]


MANY = 2**16  # answers to one problem
MOST = 2**31 - 1

Ranks = Annotated[
    int, typer.Option(min=1, max=MANY, help="Processes that share the work on this machine; one for each GPU.")
]


def finite(number: float | None) -> float | None:
    """A float option's callback: "nan" passes every bound, and "inf" those of one side."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is no finite number")
    return number


# For other programs: results on standard output, what is said on the way on standard error.
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")]

# Options of every command that samples answers to a data set.
Model = Annotated[str, typer.Option(help="A folder in Hugging Face format, a checkpoint's model/, or a hub id.")]
Task = Annotated[str, typer.Option(help='Who grades: see `opdkit tasks`; with options: "code time_limit_s=2".')]
Limit = Annotated[int | None, typer.Option(min=1, max=MOST, help="Only so many problems, drawn by a seed.")]
Temperature = Annotated[float, typer.Option(min=0.0, callback=finite)]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, callback=finite)]
TopK = Annotated[int, typer.Option(min=0, max=MOST, help="0: off.")]
MaxAnswerTokens = Annotated[int, typer.Option(min=1, max=MOST)]
MaxTokensPerBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        help="Rows times length in memory together; moves time, not answers. Default: 65536; on CUDA what fits.",
    ),
]
Engine = Annotated[
    str, typer.Option(help="What samples: hf (this process), vllm (started and ended by opdkit) or server (--url).")
]
Url = Annotated[str | None, typer.Option(help="Of a running server, as http://HOST:PORT; with --engine server.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", ...')]
ChatTemplate = Annotated[str | None, typer.Option(help='A jinja file, or "plain".')]
TemplateKwargs = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="KEY=VALUE", help="For the chat template, e.g. enable_thinking=false."),
]
CloseThinking = Annotated[
    bool, typer.Option("--close-thinking", help="Close the <think> that the template opens, as model.close_thinking.")
]
System = Annotated[str | None, typer.Option(help="A system prompt, in place of the data's own; as model.system.")]
StopToken = Annotated[
    list[str] | None,
    typer.Option("--stop-token", help="What ends an answer, as model.stop_tokens; may be given again."),
]
Instruction = Annotated[str, typer.Option(help="auto, boxed, answer_line or none.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The options that every command that samples answers has, under one name each and with one default."""

    limit: Limit = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    max_answer_tokens: MaxAnswerTokens = 1024
    max_tokens_per_batch: MaxTokensPerBatch = None
    engine: Engine = "hf"
    url: Url = None
    instruction: Instruction = "auto"
    seed: Seed = 0
    dtype: Dtype = "bfloat16"
    device: Device = "auto"
    chat_template: ChatTemplate = None
    template: TemplateKwargs = None
    close_thinking: CloseThinking = False
    system: System = None
    stop_token: StopToken = None
    trust_remote_code: TrustRemoteCode = False


def on_ranks(num_ranks: int, folder: Path, came_of_it: Callable[[], bool], *, timeout_minutes: float) -> None:
    """This very command in so many processes that share its work and write to the folder. Ends the command where they
    fail, as they did."""
    from opdkit.launch import Logs, launch
    from opdkit.ranks.join import is_rank

    if is_rank():
        raise UserError("--ranks starts the ranks itself; under torchrun leave it out")
    words = sys.argv[1:]
    place = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--ranks")
    rest = [*words[:place], *words[place + (1 if "=" in words[place] else 2) :]]
    again = shlex.join(["opdkit", *words])
    logs = Logs(folder, came_of_it=came_of_it)
    status = launch(rest, num_ranks, logs, again=again, errors=errors, timeout_minutes=timeout_minutes)
    if status:
        raise typer.Exit(status)


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """The command's parameter `asked: Sampling` is asked for as the options of `Sampling`, after the command's own."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "asked"]
    shared = inspect.signature(Sampling, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        asked = Sampling(**{name: given.pop(name) for name in shared})
        command(**given, asked=asked)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *shared.values())]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
