"""Bytes of a step: what is there at the peak of each moment, part by part. docs/inside/performance.md has the formulas.

Only tensors: what CUDA itself and a C library take is kept apart (`devices`). Letters: V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opdkit.cost.devices import Device
from opdkit.cost.work import BYTES, TOKENS_PER_BATCH, Reader, Work

Parts = dict[str, float]  # by name, in the order of PARTS
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "bfloat16 copy",
    "teacher",
    "other views",
    "activations",
    "head",
    "cache",
    "engine",
    "hidden states",
)
VLLM_SHARE = 0.9  # of a GPU, by vLLM's own default
CACHE_SHARE = 0.5  # as `engines.memory`
LOGIT_BYTES = 512 << 20  # as `engines.slots`
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # as `losses.head`
CHUNK_OF_WEIGHTS = 8
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
BLOCKS, FEW_BLOCKS = 12, 2  # arrays of a block held at once: by a divergence of two distributions, without a second one
CODE_BYTES = 1 + 4 / 256  # of a number in 8 bits, with the scale of its block
QUANTISED = {"int8": CODE_BYTES, "fp8": CODE_BYTES, "nf4": 0.5 + 4 / 64}  # of a number of a matrix
DRAWN = 3  # arrays of [rows, V] in float32 that drawing a token holds besides the logits


def moments(work: Work, device: Device | None) -> dict[str, Parts]:
    """{moment: {part: bytes}}, of one rank."""
    resident, engine = _resident(work, _kind(device)), {"engine": _idle_engine(work, device)}
    return {
        "sampling": _together(resident, _sampling(work, resident, device)),
        "scoring": _together(resident, engine, _scoring(work, _kind(device))),
        "update": _together(resident, engine, _update(work, device)),
    }


def _together(*several: Mapping[str, float]) -> Parts:
    sums = {name: sum(parts.get(name, 0.0) for parts in several) for name in PARTS}
    return {name: size for name, size in sums.items() if size}


def _kind(device: Device | None) -> str:
    return "cpu" if device is not None and device.is_cpu else "cuda"


def _resident(work: Work, kind: str) -> Parts:
    """What is there from the first step to the last. On several ranks the float32 weights, the optimizer and an
    average are in parts; a float32 computation of gathered weights has whole ones besides."""
    on_host = hosted(work, kind)
    trained, lora, share = work.trained, work.recipe.model.lora, work.kept_share
    student, compute = work.student, BYTES[work.dtype]
    if lora is not None:
        base = student.parameters * (1 - work.layers_share + work.kept_layers if work.sharded else 1.0)
        weights = compute * (base + student.unread) + 4.0 * trained * (1.0 if work.ranks == 1 else 1 + share)
    else:
        weights = work.master_bytes * (student.parameters * share + student.unread)
        is_whole_besides = work.ranks > 1 and not work.copies
        weights += 4 * student.parameters * work.whole_share if is_whole_besides else 0
    on_host_too = work.recipe.parallel.offload and work.sharded
    return {
        "weights": 0.0 if on_host_too else weights,
        "optimizer": 0.0 if on_host_too else _optimizer(work) * share,
        "teacher": _kept_here(work, [r for r in work.readers if "teacher" in r.views], on_host),
        "other views": _kept_here(work, [r for r in work.readers if "teacher" not in r.views], on_host),
    }


def hosted(work: Work, kind: str) -> dict[str, float]:
    """{what waits in host memory: bytes} on a GPU; on a CPU host memory is all there is."""
    if kind == "cpu":
        return {}
    found = {"hidden states of teachers": payload(work)}
    if kept := sum(_kept(work, reader) for reader in work.readers if _is_on_host(reader)):
        found["weights of teachers"] = kept
    if work.recipe.parallel.offload and work.sharded:
        found["weights and optimizer"] = 4 * work.trained * work.kept_share + _optimizer(work) * work.kept_share
    if work.recipe.model.activation_offload:
        found["activations"] = _kept_a_token(work) * work.learned_at_once
    return {what: size for what, size in found.items() if size}


def loading(work: Work) -> dict[str, float]:
    """{where: bytes} of whole models of which several ranks then keep parts; no rank reads its parts alone."""
    if work.ranks == 1:
        return {}
    whole = work.master_bytes * (work.student.parameters + work.student.unread)
    if work.recipe.model.lora is not None:
        whole = BYTES[work.dtype] * (work.student.parameters + work.student.unread) + 4 * work.trained
    cut = [_loaded(reader) for reader in work.readers if reader.is_model and reader.section.placement == "sharded"]
    cut += [float(whole)] if work.sharded else []
    found = {} if work.sharded else {"on each rank": float(whole)}
    return found | ({"in each machine's host memory, of one rank after another": max(cut)} if cut else {})


def _is_on_host(reader: Reader) -> bool:
    return reader.section.weights_on == "host" or reader.section.placement == "cpu"


def _kept_here(work: Work, readers: Sequence[Reader], on_host: Mapping[str, float]) -> float:
    return sum(
        _kept(work, reader)
        for reader in readers
        if not ("weights of teachers" in on_host and _is_on_host(reader)) and reader.section.placement != "reload"
    )


def _optimizer(work: Work) -> float:
    """AdamW has two moments in float32, or in 8 bits; Muon has one of the matrices."""
    if work.recipe.train.optimizer == "adamw_8bit":
        return 2 * CODE_BYTES * work.trained
    if work.recipe.train.optimizer != "muon":
        return 8.0 * work.trained
    matrices = work.trained if work.recipe.model.lora is not None else work.student.matrices
    return 4.0 * matrices + 8.0 * (work.trained - matrices)


def _kept(work: Work, reader: Reader) -> float:
    """What a teacher keeps from step to step."""
    if reader.is_model:
        parts = (work.recipe.parallel.hsdp or work.ranks) if reader.section.placement == "sharded" else 1
        outside = 1 - reader.size.matrices / reader.size.parameters
        return _loaded(reader) * (outside + (1 - outside) / parts) if reader.is_loaded_first else 0.0
    if reader.is_elsewhere:  # of a server that sends hidden states, its head
        return float(BYTES[reader.dtype] * reader.size.head) if reader.section.payload == "hidden" else 0.0
    weights, lora = reader.section.weights, work.recipe.model.lora
    if weights == "ema":
        return 4.0 * work.trained * work.kept_share
    if weights in ("initial", "trust_region"):
        return (4.0 if lora is not None else BYTES[work.dtype]) * work.trained * work.kept_share
    return 0.0


def _loaded(reader: Reader) -> float:
    """Weights of another model; quantised are its layers' matrices."""
    size, kind = reader.size, reader.section.quantization
    rest = size.parameters + size.unread - (size.matrices if kind else 0)
    return BYTES[reader.dtype] * rest + (QUANTISED[kind] * size.matrices if kind else 0.0)


def _sampling(work: Work, resident: Mapping[str, float], device: Device | None) -> Parts:
    student, compute, kind = work.student, BYTES[work.dtype], _kind(device)
    if work.recipe.sampling.engine != "hf":
        return {"bfloat16 copy": work.copies, "engine": engine_bytes(work, device)}
    rows = cache_rows(work, resident, device)
    cache = rows * student.cached_in(work.row) * compute
    logits = (1 + DRAWN) * 4.0 * rows * student.vocabulary
    prompts = min(rows, work.recipe.train.problems_per_step) * work.prompt
    return {
        "bfloat16 copy": work.copies,
        "activations": student.passes[work.pass_name].read * min(prompts, TOKENS_PER_BATCH),
        "head": logits + _head_copy(student.head, work.dtype, kind),
        "cache": cache,
    }


def engine_bytes(work: Work, device: Device | None) -> float:
    """Of a vLLM on the trainer's GPU: the share of its memory that it is told to take, or its weights and a cache."""
    sampling = work.recipe.sampling
    if sampling.engine != "vllm":
        return 0.0  # a server is elsewhere
    if device is not None:
        return (sampling.vllm.gpu_memory_utilization or VLLM_SHARE) * device.capacity
    compute = BYTES[work.dtype]
    return compute * (work.student.parameters + work.rows * work.student.cached_in(work.row))


def _idle_engine(work: Work, device: Device | None) -> float:
    return engine_bytes(work, device) if work.recipe.sampling.when_idle == "keep" else 0.0


def cache_rows(work: Work, resident: Mapping[str, float], device: Device | None) -> float:
    """Rows that are decoded together."""
    if work.recipe.sampling.engine != "hf":
        room = engine_bytes(work, device) - BYTES[work.dtype] * work.student.parameters
        a_row = work.student.cached_in(work.row) * BYTES[work.dtype]
        return max(1.0, min(work.rows, room // a_row)) if room else float(work.rows)
    budget = work.recipe.sampling.max_tokens_per_batch
    if budget is None:
        budget = TOKENS_PER_BATCH
        if device is not None and not device.is_cpu:
            free = max(0.0, device.usable - sum(resident.values()) - work.copies) * CACHE_SHARE
            a_token = work.student.cached_in(work.row) / work.row * BYTES[work.dtype]
            times = int(free // max(1.0, a_token)) // TOKENS_PER_BATCH
            budget <<= max(0, times.bit_length() - 1)
    most = max(1, LOGIT_BYTES // (4 * work.student.vocabulary))
    return max(1.0, min(work.rows, budget // max(1.0, work.row), most))


def _head_copy(numbers: int, dtype: str, kind: str) -> float:
    """A CPU samples in float32; a GPU's heads are filled up to a multiple of 64 rows, most of them in a copy."""
    if kind == "cpu":
        return 4.0 * numbers if dtype == "bfloat16" else 0.0
    return float(BYTES[dtype] * numbers)


def payload(work: Work) -> float:
    """Bytes of hidden states that teachers hand over for a whole step; on CUDA they wait in host memory."""
    states = [
        reading.share * reader.size.hidden * BYTES[reader.dtype]
        for reader in work.readers
        for reading in reader.readings
        if reading.asked.answer == "distribution"
    ]
    return sum(states) * work.rows * work.answer


def _scoring(work: Work, kind: str) -> Parts:
    most: Parts = {}
    for reader in work.readers:
        own = {} if reader.is_elsewhere else _scored_by(work, reader, kind)
        own["hidden states"] = payload(work) if kind == "cpu" else 0.0
        if sum(own.values()) > sum(most.values()):
            most = own
    return most


def _moves_in(reader: Reader, kind: str) -> bool:
    placement = reader.section.placement
    return reader.is_model and (placement == "reload" or (placement == "cpu" and kind != "cpu"))


def _scored_by(work: Work, reader: Reader, kind: str) -> Parts:
    size, compute = reader.size, BYTES[reader.dtype]
    name = reader.dtype if reader.is_model else work.pass_name
    tokens = max(
        (work.tokens_at_once(work.scoring_budget, r.context + work.answer, work.rows) for r in reader.readings),
        default=0,
    )
    own_copy = work.copies * work.whole_share if reader.section.weights in ("ema", "live", "trust_region") else 0.0
    if kind != "cpu" and reader.section.weights_on == "host":  # brought for the time that it reads
        own_copy = float((4 if work.recipe.model.lora else BYTES[work.dtype]) * work.trained)
    brought = _loaded(reader) if _moves_in(reader, kind) else 0.0
    return {
        "bfloat16 copy": own_copy,
        "other views" if "teacher" not in reader.views else "teacher": brought,
        "activations": size.passes[name].read * tokens + size.hidden * compute * tokens,
    }


def _update(work: Work, device: Device | None) -> Parts:
    """The larger of the end of a forward pass, where the head is at work, and of a backward pass."""
    student, recipe, kind = work.student, work.recipe, _kind(device)
    compute = BYTES[work.dtype]
    one = student.passes[work.pass_name]
    beyond = {1.0: one.beyond_checkpointed, 0.0: one.beyond}.get(
        work.checkpointed, max(one.beyond, one.beyond_checkpointed)
    )
    kept = _kept_a_token(work) if kind == "cpu" or not recipe.model.activation_offload else 0.0
    tokens = work.learned_at_once
    has_more = work.rows / recipe.train.updates_per_step * work.row > tokens * 1.01
    gradients = float(work.master_bytes * work.trained) * (work.whole_share + work.kept_layers if work.sharded else 1.0)
    copies = work.copies * work.whole_share
    states = (
        sum(reader.gives_states * reader.size.hidden * BYTES[reader.dtype] for reader in work.readers)
        * tokens
        * work.answer
        / work.row
    )
    on_cpu = payload(work) if kind == "cpu" else 0.0
    grad_head = 0.0 if recipe.model.lora is not None else compute * student.head
    forward = {
        "gradients": gradients if has_more else 0.0,
        "bfloat16 copy": copies,
        "activations": kept * tokens,
        "head": _head_at_work(work, kind),
        "hidden states": states + on_cpu,
    }
    backward = {
        "gradients": gradients + copies,  # those of the copies stay until the last of them is there
        "bfloat16 copy": 0.0 if not has_more else copies,
        "activations": (kept + beyond) * tokens if has_more else beyond * tokens,
        "head": grad_head,
        "hidden states": on_cpu,
    }
    started = forward | {"activations": (kept + beyond) * tokens, "head": grad_head, "bfloat16 copy": copies}
    return max(forward, backward, started, key=lambda parts: sum(parts.values()))


def _kept_a_token(work: Work) -> float:
    """Bytes from a token's forward pass to its backward pass."""
    one, share = work.student.passes[work.pass_name], work.checkpointed
    return share * one.kept_checkpointed + (1 - share) * one.kept


def _head_at_work(work: Work, kind: str) -> float:
    """A chunk of logits of each side, the arrays of a block, and grad_head; on a GPU copies of the heads, and a chunk's
    gradient as the products take it in."""
    student, compute = work.student, BYTES[work.dtype]
    sides = [(reader.size.head, reader.dtype) for reader in work.readers for _ in range(reader.gives_states)]
    tokens = work.answer / work.row * work.learned_at_once
    chunk = min(max(CHUNK_BYTES[kind], 4.0 * student.head / CHUNK_OF_WEIGHTS), 4.0 * student.vocabulary * tokens)
    total = chunk * (1 + len(sides)) + (BLOCKS if sides else FEW_BLOCKS) * BLOCK_BYTES[kind]
    if kind != "cpu":
        total += chunk * compute / 4 + sum(_head_copy(*side, kind) for side in [(student.head, work.dtype), *sides])
    if work.recipe.model.lora is None:
        total += 4.0 * student.head
    return total
