"""Models from nothing: a tiny causal language model, its tokenizer and its chat template, as an ordinary checkpoint.

No weights can be downloaded everywhere, so the quickstart and the tests make their own: a real Hugging Face
architecture (Qwen3), saved with `save_pretrained`, loaded afterwards like any other checkpoint. The weights are random;
training them is the trainer's job (method `sft`).

    tokenizer = char_tokenizer("0123456789+=;")             # one token a character
    make_model("runs/tiny", tokenizer=tokenizer, hidden_size=64, num_layers=2, seed=0, max_positions=64)

Two chat formats. For models that read characters, one token for a role and one for the end of an answer:
`<u>6604=<a>4+6=0;...<e>`. The byte-level BPE tokenizer has ChatML, as the Qwen models do.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdkit.engines.load import quiet_libraries
from opdkit.errors import UserError
from opdkit.types import seed_from

PAD = "<|endoftext|>"
NUM_HEADS = 4
NUM_KV_HEADS = 2
FF_MULTIPLE = 2  # feed-forward width over hidden width

NO_UNKNOWN = "<none>"  # not in the vocabulary, which is what makes WordLevel raise instead of guessing
CHAR_END = "<e>"
CHAR_ROLES = {"system": "<s>", "user": "<u>", "assistant": "<a>"}
CHAR_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{{ '<s>' + message.content }}
    {%- elif message.role == 'user' -%}{{ '<u>' + message.content }}
    {%- elif message.role == 'assistant' -%}{{ '<a>' + message.content + '<e>' }}
    {%- else -%}{{ raise_exception('this chat template knows system, user and assistant, not ' + message.role) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<a>' }}{%- endif -%}
"""

TOOL_ROLE = "<r>"
CALL_END = '"}}</tool_call>'
TRANSCRIPT = ("Assistant: ", "\nAssistant: ")  # how a peer's turns are shown, each a token
TOOL_TEMPLATE = """\
{%- if tools -%}{{ '<s>' }}{%- for tool in tools -%}{{ tool.function.name }}{%- endfor -%}{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{{ '<s>' + message.content }}
    {%- elif message.role == 'user' -%}{{ '<u>' + message.content }}
    {%- elif message.role == 'tool' -%}{{ '<r>' + message.content }}
    {%- elif message.role == 'assistant' -%}
        {{ '<a>' + message.content }}
        {%- for call in message.tool_calls or [] -%}
            {{ '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}</tool_call>' }}
        {%- endfor -%}
        {{ '<e>' }}
    {%- else -%}{{ raise_exception('this chat template knows system, user, assistant and tool, not ' + message.role) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<a>' }}{%- endif -%}
"""

CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"
CHATML_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{ raise_exception('this chat template knows system, user and assistant, not ' + message.role) }}
    {%- endif -%}
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def char_tokenizer(alphabet: str, *, digits_per_token: int = 1) -> PreTrainedTokenizerFast:
    """One token for each character of `alphabet`, one for each chat role, one for the end of an answer.

    digits_per_token: above 1, so many digits side by side are one token, from the left: "12345" is "12", "34", "5".
    A character outside the alphabet makes encoding raise: it is never dropped and there is no "unknown" token.
    """
    characters = list(dict.fromkeys(alphabet))
    if not characters:
        raise UserError("char_tokenizer needs at least one character in its alphabet.")
    specials = [PAD, *CHAR_ROLES.values(), CHAR_END]
    digits = [character for character in characters if character.isdecimal()]
    runs = [
        "".join(run) for length in range(2, digits_per_token + 1) for run in itertools.product(digits, repeat=length)
    ]
    vocab = {token: index for index, token in enumerate([*specials, *characters, *runs])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=NO_UNKNOWN))
    pattern = rf"\d{{1,{digits_per_token}}}|[\s\S]" if digits_per_token > 1 else r"[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _with_chat(tokenizer, specials, eos=CHAR_END, template=CHAR_TEMPLATE)


def tool_tokenizer(alphabet: str, *, tools: Sequence[str], arguments: Sequence[str]) -> PreTrainedTokenizerFast:
    """As `char_tokenizer`, for models that call tools as Hermes and Qwen do. What is always the same of a call is one
    token: its beginning with the name of a tool and of its (first) argument, and its end; so is the name of a tool.

        <s>calculator<u>17*23=<a><tool_call>{"name": "calculator", "arguments": {"expression": "17*23"}}</tool_call><e>
        <r>391<a>391<e>
    """
    words = [call_opening(tool, name) for tool, name in zip(tools, arguments, strict=True)]
    words += [CALL_END, *TRANSCRIPT, *(f"\nTool {tool}: " for tool in tools), *tools]
    specials = [PAD, *CHAR_ROLES.values(), TOOL_ROLE, CHAR_END]
    vocab = {token: index for index, token in enumerate([*specials, *dict.fromkeys(alphabet), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=NO_UNKNOWN))
    pattern = "|".join([*(re.escape(word) for word in sorted(words, key=len, reverse=True)), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _with_chat(tokenizer, specials, eos=CHAR_END, template=TOOL_TEMPLATE)


def call_opening(tool: str, argument: str) -> str:
    """What a call of the tool begins with, up to the text of its argument; CALL_END follows that."""
    return f'<tool_call>{{"name": "{tool}", "arguments": {{"{argument}": "'


def bpe_tokenizer(texts: Iterable[str], vocab_size: int, *, digits_per_token: int = 1) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`: all 256 bytes are tokens, so any text at all survives a round trip.

    Digits stay single, as in the Qwen tokenizers, or up to `digits_per_token` are one token (Llama 3: 3). `vocab_size`
    counts the three special tokens; fewer tokens come back when the texts hold too few pairs to merge.
    """
    specials = [PAD, CHATML_START, CHATML_END]
    byte_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(specials) + len(byte_alphabet)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}, but a byte-level tokenizer needs at least {smallest} tokens "
            f"({len(byte_alphabet)} bytes and {len(specials)} special tokens); ask for {smallest} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits_per_token}}}"), behavior="isolated")
            if digits_per_token > 1
            else pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=byte_alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_chat(tokenizer, specials, eos=CHATML_END, template=CHATML_TEMPLATE)


def make_model(
    out: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    num_layers: int,
    seed: int,
    max_positions: int,
) -> None:
    """Write a Qwen3 checkpoint with random weights to the folder `out`; the same arguments give the same bytes.

    The folder appears whole or not at all. Weights are fp32; `generation_config.json` names the stop ids.

    Raises UserError if `out` already exists, a size cannot be built, or the tokenizer lacks an end or padding token.
    """
    out = Path(out)
    _check_sizes(hidden_size, num_layers, max_positions)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError("make_model needs a tokenizer with an eos and a pad token; char_tokenizer makes one.")
    if os.path.lexists(out):
        raise UserError(f"make_model: {out} already exists; remove it or choose another folder.")

    config = _config(tokenizer, hidden_size, num_layers, max_positions)
    with torch.random.fork_rng(
        devices=[]
    ):  # the constructor draws from the global generator; nobody else should notice
        model = Qwen3ForCausalLM(config).to(torch.float32)
    _initialise(model, seed)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    tokenizer = copy.deepcopy(tokenizer)  # the caller's keeps its own limit
    tokenizer.model_max_length = max_positions

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with quiet_libraries():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        partial.chmod(0o755)  # mkdtemp makes it private
        os.rename(partial, out)
    except OSError as error:
        raise UserError(
            f"make_model could not write {out}: {error}; free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_sizes(hidden_size: int, num_layers: int, max_positions: int) -> None:
    multiple = 2 * NUM_HEADS  # rotary embeddings need an even width in each head
    if hidden_size < multiple or hidden_size % multiple:
        raise UserError(
            f"hidden_size is {hidden_size}, but must be a positive multiple of {multiple} ({NUM_HEADS} heads of even "
            f"width); try {max(multiple, round(hidden_size / multiple) * multiple)}."
        )
    if num_layers < 1:
        raise UserError(f"num_layers is {num_layers}, but a model needs at least 1.")
    if max_positions < 2:
        raise UserError(f"max_positions is {max_positions}, but a prompt and an answer need at least 2.")


def _config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, max_positions: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=FF_MULTIPLE * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=hidden_size // NUM_HEADS,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        initializer_range=1 / math.sqrt(hidden_size),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def _initialise(model: Qwen3ForCausalLM, seed: int) -> None:
    """Norms 1; matrices 1/sqrt(fan-in), those that write to the residual stream divided by sqrt(2 layers) (GPT-2).

    The embedding, tied to the head, takes 1/sqrt(width) too: the first logits have standard deviation 1. With the
    customary 0.02 a tiny model spends twice the steps on leaving the plateau. Each parameter has its own seed, so the
    bytes do not depend on the order in which the library lists them.
    """
    residual_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
            continue
        std = 1 / math.sqrt(weight.shape[1])  # for the embedding [V, H] this is the width as well
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= residual_scale
        generator = torch.Generator().manual_seed(seed_from(seed, "make_model", name))
        weight.normal_(0.0, std, generator=generator)


def _with_chat(tokenizer: Tokenizer, specials: list[str], *, eos: str, template: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=PAD,
        additional_special_tokens=[token for token in specials if token not in (eos, PAD)],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return wrapped
