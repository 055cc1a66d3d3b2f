"""What must hold of a teacher's server before a step is trained on its word. Each fault is one sentence, and ends it.

the model's name      it serves it                        tokenizer   its ids mean what the student's mean
off by one            the log-prob of a token that it has just written, read again as a prompt's, is the same: so a
                      number belongs to its token, and is of the whole distribution at temperature 1
length, top-k cap     what the run will ask for is answered
chosen ids            where the server answers for them, it says what its prompt log-probs say
hidden states         norm and head of `path`, applied to them, give the server's own prompt log-probs
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from opdkit.engines.model import Ids
from opdkit.engines.servers import chosen_ids
from opdkit.engines.servers.http import Client, HalfError, Refused
from opdkit.engines.servers.prompt_logprobs import Loaded, read_any, signal_of
from opdkit.engines.servers.scorer import COMPLETIONS, ServerScorer
from opdkit.errors import UserError
from opdkit.losses import head_stats
from opdkit.types import Asked

WRITTEN = 12  # tokens that the server is asked to write
NUM_IDS = 192  # of the vocabulary, whose meaning is compared
MOST_OTHER = 0.05  # share of them that may be written otherwise (spaces, bytes)
# Nats between two numbers that a right server gives of one token: the mean and the largest of a few. vLLM against
# itself on a CPU: 1e-5 in float32, 0.1 in bfloat16 (spec of the server's own rounding).
LIMITS = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.1, 0.75), torch.float16: (0.1, 0.75)}


def model_of(client: Client, served_name: str | None, where: str) -> tuple[str, int | None, str]:
    """(name, max_model_len, root) of the model that is asked. Raises UserError where it does not serve it."""
    said = client.json("/v1/models")
    try:
        served = {str(one["id"]): one for one in said["data"] if not one.get("parent")}
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{client.url} does not say which models it serves; is it a vLLM server?") from None
    names = ", ".join(served) or "none"
    if served_name is not None and served_name not in served:
        raise UserError(f"{client.url} serves {names}, not {where}.served_name = {served_name}; correct the name")
    if served_name is None and len(served) != 1:
        raise UserError(f"{client.url} serves {len(served)} models ({names}); choose one with {where}.served_name")
    name = served_name or next(iter(served))
    length = served[name].get("max_model_len")
    return name, length if isinstance(length, int) else None, str(served[name].get("root") or name)


def probe(scorer: ServerScorer, client: Client, tokenizer: Any, num_ids: int, asked: Sequence[Asked]) -> list[str]:
    """What is doubtful of a server, in sentences. num_ids: of the tokenizer; asked: what the run will want. Raises
    UserError for the first fault; settles how lists are read, and what the states of a server are computed in."""
    try:
        return _probe(scorer, client, tokenizer, num_ids, asked)
    except UserError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{client.url} does not answer as a vLLM server does: its prompt_logprobs are not whole "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from None


def _probe(scorer: ServerScorer, client: Client, tokenizer: Any, num_ids: int, asked: Sequence[Asked]) -> list[str]:
    room = NUM_IDS if scorer.max_positions is None else min(NUM_IDS, scorer.max_positions - 2)
    ids = [number * (num_ids - 1) // max(1, room - 1) for number in range(room)]
    whole = _plain_answer(client, scorer, ids)
    if read_any(whole)[1] is Loaded:  # of one server is enough: what reads all of them is the same
        scorer.entries = Loaded
    _check_meaning(client, json.loads(whole), ids, tokenizer)
    prompt = ids[1 :: max(1, len(ids) // 24)][:24]
    _check_alignment(client, scorer, prompt)
    if scorer.payload == "hidden":
        _check_states(client, scorer, prompt)
    if scorer.payload == "sampled":
        _try_chosen_ids(client, scorer, prompt)
    for one in asked:
        if scorer.payload == "topk" and one.answer == "topk":
            _check_cap(client, scorer, prompt, one.k or 1)
    if scorer.shared is not None or not isinstance(json.loads(whole).get("kv_transfer_params"), dict):
        return []
    return [
        f"{client.url} writes hidden states for whatever it is asked, and with payload = "
        f'"{scorer.payload}" nobody reads or deletes them; use payload = "hidden", or start it without them'
    ]


def _plain_answer(client: Client, scorer: ServerScorer, ids: Ids) -> bytes:
    try:
        return _ask(client, scorer, {**scorer.body(ids), "prompt_logprobs": 0})
    except Refused as error:
        raise UserError(
            f"{client.url} refuses a prompt of {len(ids)} ids of the student's vocabulary ({error.said}); its model "
            "must have the student's tokenizer"
        ) from None


def _ask(client: Client, scorer: ServerScorer, body: dict[str, Any]) -> bytes:
    """A server of hidden states writes a file for whatever it is asked: of these nobody reads them."""
    data = client.ask(COMPLETIONS, body)
    if scorer.shared is not None:
        told = json.loads(data).get("kv_transfer_params")
        if isinstance(told, dict):
            scorer.shared.drop(told.get("hidden_states_path"), client.timeout_s)
    return data


def _check_meaning(client: Client, whole: Any, ids: Ids, tokenizer: Any) -> None:
    told = whole["choices"][0]["prompt_logprobs"]
    pairs = []
    for token, entries in list(zip(ids, told, strict=True))[1:]:
        theirs, ours = (entries or {}).get(str(token), {}).get("decoded_token"), tokenizer.decode([token])
        if theirs and ours and "\ufffd" not in theirs + ours:
            pairs.append((token, theirs, ours))
    other = [pair for pair in pairs if pair[1] != pair[2]]
    if len(pairs) < len(ids) / 4:
        raise UserError(
            f"{client.url} does not say what its tokens are (decoded_token), so whether its ids mean the student's "
            "tokens cannot be known; use a vLLM server with its tokenizer (no --skip-tokenizer-init)"
        )
    if len(other) > MOST_OTHER * len(pairs):
        token, theirs, ours = other[0]
        raise UserError(
            f"{client.url} has another tokenizer than teacher.path: {len(other)} of {len(pairs)} ids mean something "
            f"else (id {token} is {theirs!r} there, {ours!r} here); serve the model that teacher.path names"
        )


def _check_alignment(client: Client, scorer: ServerScorer, prompt: Ids) -> None:
    body = {**scorer.body(prompt), "max_tokens": WRITTEN, "ignore_eos": True}
    said = json.loads(_ask(client, scorer, {**body, "logprobs": 0, "return_token_ids": True, "seed": 1}))
    try:
        choice = said["choices"][0]
        tokens = [int(token) for token in choice["token_ids"]]
        written = [float(number) for number in choice["logprobs"]["token_logprobs"]]
    except (LookupError, TypeError, ValueError, OverflowError):
        tokens, written = [], []
    if not tokens or len(tokens) != len(written):
        raise UserError(
            f"{client.url} does not give the ids of what it writes (return_token_ids), so its log-probs cannot be "
            "checked; use a newer vLLM"
        )
    read = _own_logprobs(client, scorer, [*prompt, *tokens])[-len(tokens) :]
    mean, most = _gap(read, written)
    if _is_wide(mean, most, scorer):
        raise UserError(
            f"{client.url} says {written[0]:.4f} of a token that it writes and {read[0]:.4f} of the same token in a "
            f"prompt (off by {mean:.3g} nats in the mean of {len(tokens)}): its prompt log-probs belong to other "
            "tokens, another temperature or another distribution; start it with --generation-config vllm and no logits "
            "processors"
        )


def _check_states(client: Client, scorer: ServerScorer, prompt: Ids) -> None:
    output, num = scorer.output, len(prompt)
    assert output is not None
    try:
        states_TH = scorer.ask_states(client, prompt)
    except UserError as error:
        raise UserError(
            f"{client.url} gives no hidden states ({error}); start it with --speculative-config and "
            '--kv-transfer-config as docs/guides/teachers_on_servers.md has them, or use payload = "topk"'
        ) from None
    output.to(states_TH.dtype)
    whole = output.head(output.weight_VH.shape[0])
    ids = torch.tensor(prompt[1:], device=whole.weight_VH.device)
    normed = output.states(states_TH)[: num - 1].to(whole.weight_VH.device)
    ours = head_stats(normed, whole, sampled_ids_N=ids).sampled_logprob_N
    assert ours is not None
    mean, most = _gap(ours.tolist(), _own_logprobs(client, scorer, prompt))
    if _is_wide(mean, most, scorer):
        raise UserError(
            f"the norm and head of {output.path}, applied to the hidden states of {client.url}, give other log-probs "
            f"than the server (off by {mean:.3g} nats in the mean, {most:.3g} at most): it serves "
            "another model than teacher.path, or hands out another layer (eagle_aux_hidden_state_layer_ids must be "
            f"[{output.num_layers}])"
        )


def _try_chosen_ids(client: Client, scorer: ServerScorer, prompt: Ids) -> None:
    """Ask by them from now on, if the server can; that it cannot is no fault."""
    context, answer = prompt[:2], prompt[2:]
    try:
        said = client.json(chosen_ids.PATH, chosen_ids.body(scorer.model, context, answer))
    except Refused:
        return
    if not chosen_ids.offered(said):
        return
    try:
        found_T = chosen_ids.read(said, len(answer))
    except HalfError as error:
        raise UserError(f'{client.url} answers for chosen ids, but {error}; use payload = "topk"') from None
    mean, most = _gap(found_T.tolist(), _own_logprobs(client, scorer, prompt)[1:])
    if _is_wide(mean, most, scorer):
        raise UserError(
            f"{client.url} says other log-probs of chosen ids (prompt_logprob_token_ids) than of its prompts (off by "
            f"{mean:.3g} nats in the mean): is --kv-sharing-fast-prefill on?"
        )
    scorer.by_ids.add(client.url)


def _check_cap(client: Client, scorer: ServerScorer, prompt: Ids, k: int) -> None:
    count = scorer.num_listed(min(k, scorer.end or k))
    try:
        _ask(client, scorer, {**scorer.body(prompt), "prompt_logprobs": count})
    except Refused as error:
        raise UserError(
            f"{client.url} does not list {count} tokens ({error.said}), which the method asks for; start it with "
            f"--max-logprobs {count}, or lower k"
        ) from None


def _own_logprobs(client: Client, scorer: ServerScorer, prompt: Ids) -> list[float]:
    """Of each token but the first, over the server's whole vocabulary."""
    found, _ = read_any(_ask(client, scorer, {**scorer.body(prompt), "prompt_logprobs": 0}))
    said = signal_of(found, prompt, 1, None).sampled_logprob_T
    assert said is not None
    return [float(number) for number in said]


def _gap(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """(mean, largest) difference; NaN is none."""
    gaps = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    return sum(gaps) / len(gaps), max(gaps)


def _is_wide(mean: float, most: float, scorer: ServerScorer) -> bool:
    """Written so that what is no number is wide."""
    dtype = scorer.output.weight_VH.dtype if scorer.output is not None else torch.bfloat16
    return not (mean <= LIMITS[dtype][0] and most <= LIMITS[dtype][1])
