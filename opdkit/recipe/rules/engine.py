"""What an engine beside the trainer cannot do, and what answers of an older student need, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from opdkit.recipe.sections import Recipe, SamplingSection, VllmSection

# Options of vLLM's server that opdkit sets, and that nothing works without.
OURS = ("--host", "--port", "--model", "--served-model-name", "--logprobs-mode", "--generation-config")


def engine_faults(recipe: Recipe) -> Iterator[str]:
    sampling, model = recipe.sampling, recipe.model
    own = sampling.engine == "vllm"
    yield from _unread(sampling)
    if sampling.engine == "server" and sampling.url is None:
        yield 'sampling.engine = "server" needs sampling.url: where it runs, as http://HOST:PORT'
    if sampling.engine != "hf":
        yield from _cut_faults(sampling)
    if sampling.when_idle == "sleep" and sampling.lag:
        yield (
            f'sampling.when_idle = "sleep" with sampling.lag = {sampling.lag}: the engine samples while the trainer '
            'works, so it is never idle; set when_idle = "keep", or lag = 0'
        )
    if sampling.when_idle == "sleep" and model.device == "cpu":
        yield 'sampling.when_idle = "sleep" frees a GPU\'s memory, and model.device = "cpu" has none; remove it'
    for option in sampling.vllm.extra_args if own else ():
        if option.partition("=")[0] in OURS:
            yield f"sampling.vllm.extra_args: {option} is set by opdkit; remove it"
    if sampling.vllm.quantization is not None and model.lora is None:
        yield (
            f'sampling.vllm.quantization = "{sampling.vllm.quantization}" quantises once, and full weights arrive anew '
            "at every step; add [model] lora = {}, or remove it"
        )
    shared, spread = sampling.vllm.ranks_per_engine, sampling.vllm.tensor_parallel_size
    if shared is not None and spread > shared:
        yield (
            f"sampling.vllm.tensor_parallel_size = {spread} GPUs for the engine of ranks_per_engine = {shared} ranks, "
            "which have one each; lower the first, or raise the second"
        )
    room = sampling.vllm.max_model_len
    if own and room is not None and room <= recipe.longest_turn:
        yield (
            f"sampling.vllm.max_model_len = {room} leaves no room for a prompt beside sampling.max_answer_tokens = "
            f"{recipe.longest_turn}; raise it"
        )
    if sampling.lag and recipe.saved_run is not None:
        yield f"sampling.lag = {sampling.lag}: the answers of a saved run are read as they were; remove it"
    if sampling.lag >= recipe.train.steps:
        yield (
            f"sampling.lag = {sampling.lag} with train.steps = {recipe.train.steps}: every answer would come from the "
            "first weights; lower it"
        )


def _unread(sampling: SamplingSection) -> Iterator[str]:
    """Keys that the chosen engine does not read."""
    if sampling.engine != "server" and sampling.url is not None:
        yield f'sampling.url = "{sampling.url}" is only read with sampling.engine = "server"; set that, or remove it'
    if sampling.engine != "server" and sampling.server_kind != "vllm":
        yield f'sampling.server_kind = "{sampling.server_kind}" is only read with sampling.engine = "server"'
    if sampling.engine != "vllm" and sampling.vllm != VllmSection():
        yield '[sampling.vllm] is only read with sampling.engine = "vllm"; set that, or remove it'
    if sampling.engine != "vllm" and sampling.when_idle != "keep":
        yield f'sampling.when_idle = "{sampling.when_idle}" is only read with sampling.engine = "vllm"; remove it'


def _cut_faults(sampling: SamplingSection) -> Iterator[str]:
    """min-p and top-k keep the same tokens in either order; top-p counts the mass of what was kept before it."""
    if sampling.server_kind == "sglang" and (sampling.top_p < 1 or sampling.top_k or sampling.min_p):
        yield (
            "SGLang reports log-probs from before top_p, top_k and min_p cut, which are not those of what it sampled; "
            "leave them off (1, 0 and 0), or use vLLM"
        )
    elif sampling.min_p and sampling.top_p < 1:
        yield (
            f"sampling.min_p = {sampling.min_p:g} and sampling.top_p = {sampling.top_p:g} cut in another order in vLLM "
            '(min-p first) than here, to other distributions; use one of the two, or sampling.engine = "hf"'
        )


def lag_faults(recipe: Recipe) -> Iterator[str]:
    """Of every stage of a schedule."""
    lag, method = recipe.sampling.lag, recipe.method
    if not lag:
        return
    if method.answer_source != "student":
        yield (
            f"sampling.lag = {lag} is how old the student is that answers, but the answers of method.name = "
            f'"{method.name}" come from the {method.answer_source}; set lag = 0'
        )
    elif _estimates(recipe) and not _corrected(recipe):
        yield (
            f'sampling.lag = {lag}: method.name = "{method.name}" estimates its loss from the sampled tokens, which an '
            "older student drew, and is biased without a ratio; add [weights] importance = {}, or set lag = 0"
        )


def lag_warnings(recipe: Recipe) -> Iterator[str]:
    lag, method = recipe.sampling.lag, recipe.method
    if not lag or method.answer_source != "student":
        return
    how = "the loss is computed under the current student, so what is older is only which beginnings are read"
    if _corrected(recipe):
        how = "the ratio of the student to its older sampler corrects for it"
    yield (
        f"sampling.lag = {lag}: answers come from weights of {lag} steps before; {how} (metrics rollout/lag, "
        "rollout/ess)"
    )


def _estimates(recipe: Recipe) -> bool:
    return bool(getattr(recipe.method, "estimates_from_samples", False))


def _corrected(recipe: Recipe) -> bool:
    method = recipe.method
    corrects = getattr(method, "is_corrected", None)
    return method.corrects_for_sampler or recipe.weights.importance is not None or bool(corrects and corrects(recipe))
