"""The student behind an engine of its own: the weights of every step published there, and proved before they answer.

Of several ranks the first of a machine (`sampling.vllm.ranks_per_engine`: of so many neighbours) has the engine, or the
first of all where it is somebody else's server. All ranks gather the weights and, where layers are in parts, make the
pass of the proof; each asks for its own rows. What fails on one rank is raised on all.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from opdkit.engines.base import Sampled, SamplingParams
from opdkit.engines.hf import HFEngine
from opdkit.engines.load import quiet_libraries
from opdkit.engines.model import LanguageModel
from opdkit.engines.servers.base import Vocabulary
from opdkit.engines.servers.engine import ServerEngine
from opdkit.engines.servers.gpu_memory import gpu_name, layout_of
from opdkit.engines.servers.process import VllmOptions, VllmProcess, Waiting
from opdkit.engines.servers.served import Served, Weights
from opdkit.engines.servers.shared import Asker, Keeper, Told
from opdkit.engines.stand_ins import slots, swapped
from opdkit.errors import UserError
from opdkit.metrics import Metric
from opdkit.ranks.base import ALONE, Ranks
from opdkit.recipe import Recipe
from opdkit.training.models.optimizer import Optimizer
from opdkit.types import Asked, Signal, seed_from

# Largest difference, or mean and 99.9th percentile of its absolute value, in nats, between the log-probs of vLLM and of
# Hugging Face: several times what was measured (5e-5; 0.04 and 0.31). A wrong weight is off by whole nats.
EXACT = 1e-3
LOW = (0.06, 0.5)
QUANTISED = 5.0  # so many times that for an engine that quantises; not measured
PROBE_ROWS, PROBE_TOKENS = 4, 16
PROBE_PROMPT = 160  # tokens: longer than a block of vLLM's prefix cache, so that a stale one shows
PROBE_TEMPERATURE = 0.7  # not 1: an engine that reports log-probs from before the temperature shows
SHARED_MEMORY = Path("/dev/shm")


@dataclass(slots=True)
class StudentServer:
    """open() first, close() at the end; engine(version) between. Of several ranks all call everything together."""

    recipe: Recipe
    student: LanguageModel
    optimizer: Optimizer
    served: Served
    folder: Path  # where weights are handed over
    ranks: Ranks = ALONE
    version: int | None = None  # of the weights that are published
    _run: str = field(default_factory=lambda: secrets.token_hex(4))  # two runs on one server have two names
    _metrics: list[Metric] = field(default_factory=list)
    _told: int = 0  # starts of the engine that metrics have counted
    _keeper: Keeper | None = None  # of several ranks, on the host
    _asker: Asker | None = None  # of several ranks

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        student: LanguageModel,
        optimizer: Optimizer,
        run_dir: Path,
        doubts: Callable[[str], object],
        ranks: Ranks = ALONE,
    ) -> StudentServer:
        """As sampling.engine asks. Raises UserError where there is no vLLM that could be started."""
        sampling = recipe.sampling
        folder = (run_dir / "sampler").resolve()  # a server has another working directory
        process = None

        def find() -> Sequence[None]:
            nonlocal folder, process
            if sampling.engine == "vllm" and host_of(recipe, ranks) == ranks.rank:
                room = str(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
                folder = Path(tempfile.mkdtemp(prefix="opdkit-", dir=room))
                log = run_dir / ("vllm.log" if ranks.is_first else f"ranks/vllm_{ranks.rank}.log")
                process = VllmProcess(vllm_options(recipe, student, ranks), log=log, folder=folder)
            return ()

        ranks.from_all(find)
        served = Served(
            vocabulary=vocabulary_of(student),
            process=process,
            url=sampling.url,
            kind=sampling.server_kind,
            doubts=doubts,
        )
        return cls(recipe, student, optimizer, served, folder, ranks)

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.student.module, "peft_config")

    def open(self, waiting: Waiting) -> None:
        """Start or find the server. waiting: hears the seconds while it starts."""

        def begin() -> Sequence[None]:
            if self.is_host:
                self.served.waiting = waiting
                self.served.open()
                self.served.waiting = lambda seconds: None  # a step that has begun is ended, as with any engine
                self._told = self.served.num_starts
                if self.ranks.size > 1:
                    self._keeper = Keeper(self.served, self.folder)
            return ()

        self.ranks.from_all(begin)

    @property
    def is_host(self) -> bool:
        """Whether the engine is this rank's."""
        return host_of(self.recipe, self.ranks) == self.ranks.rank

    def engine(self, version: int) -> ServerEngine:
        """With the student's weights of this moment, which are of this version: sent there unless they are already.

        Raises UserError where the engine's log-probs then are not the trainer's.
        """
        if version != self.version:
            started = time.monotonic()
            self._hand_over(version)
            if self.is_host:
                self._metrics.append(Metric("time/publish_s", time.monotonic() - started, "sum"))
        return self.served.engine() if self._asker is None else self._asker.engine()

    def _hand_over(self, version: int) -> None:
        weights = self.optimizer.all_as_read(self.is_host)
        answered: list[Sampled] = []

        def publish() -> Sequence[None]:
            if self.is_host:
                with nullcontext() if self._keeper is None else self._keeper.changing():
                    self._wake()
                    self._publish(version, weights)
                    answered[:] = self._answers_to_probe()
            return ()

        self.ranks.from_all(publish)
        said = self._scores(answered)
        hosts = self.ranks.from_all(lambda: [self._proved(version, answered, said) if self.is_host else None])
        self.version = version
        if self.ranks.size > 1:
            told = hosts[host_of(self.recipe, self.ranks)]
            assert told is not None
            self._asker = Asker(told, self.served.vocabulary, self.served.kind, self.ranks.rank)

    def _wake(self) -> None:
        if self.version is None and self.recipe.sampling.when_idle == "sleep" and self.served.num_starts:
            with suppress(UserError):  # it was never asleep
                self.served.api.wake()

    def rest(self) -> None:
        """Sampling is over for this step: free the accelerator, if the recipe says so. The next engine() wakes it."""
        if self.recipe.sampling.when_idle == "sleep" and self.version is not None:
            self.ranks.from_all(self._sleep)
            self.version = None

    def _sleep(self) -> Sequence[None]:
        if self.is_host:
            self.served.sleep()
        return ()

    def drain(self) -> list[Metric]:
        """What happened since the last call."""
        if not self.is_host:
            return []
        told, self._metrics = self._metrics, []
        restarts, self._told = self.served.num_starts - self._told, self.served.num_starts
        return [*told, Metric("rollout/num_engine_restarts", float(restarts), "sum")]

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
        self.served.close()
        if self.is_host:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _publish(self, version: int, weights: Mapping[str, Tensor] | None) -> None:
        name = f"{self._run}-{version}"
        if self._is_beside():
            self.served.publish(Weights(name, layout=self._layout))
            return
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            write_weights(self.student, weights, self.optimizer.compute_dtype, folder)
        except OSError as error:
            raise UserError(f"the student's weights could not be written to {folder} ({error}); make room") from None
        # An engine caches what a prompt was read as by an adapter's name: one name and one folder a version.
        self.served.publish(Weights(name, str(folder), f"opdkit-{name}" if self.is_adapter else None))
        for older in self.folder.iterdir():
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)

    def _is_beside(self) -> bool:
        """Whether the engine can read the weights out of this process's memory: it is on the same GPU, and they stay
        as they are while it answers (with lag they are learned from meanwhile, and a restarted engine needs the old).
        """
        if (
            self.is_adapter
            or self.recipe.sampling.lag
            or self.served.process is None
            or self.student.shards is not None
        ):
            return False
        own = gpu_name(self.student.device)
        return own != "" and self.served.api.gpu() == own

    @contextmanager
    def _layout(self) -> Iterator[str]:
        with torch.no_grad(), self.student.using(self.optimizer.compute_weights()):
            state = checkpoint_state(self.student, self.optimizer)
            torch.cuda.synchronize(self.student.device)
            yield layout_of(state)

    def _answers_to_probe(self) -> list[Sampled]:
        params = SamplingParams(temperature=PROBE_TEMPERATURE, max_answer_tokens=PROBE_TOKENS)
        seeds = [seed_from("probe", row) for row in range(PROBE_ROWS)]
        return self.served.engine().sample([self._probe(row) for row in range(PROBE_ROWS)], seeds, params)

    def _scores(self, sampled: Sequence[Sampled]) -> list[Signal]:
        """What the trainer says of answers to the probe; none on ranks that are there for their parts of layers."""
        with torch.no_grad():
            weights = self.optimizer.compute_weights()
        prompts, answers = [self._probe(row) for row in range(len(sampled))], [one.answer_ids for one in sampled]
        scorer = HFEngine(self.student, weights=weights)
        return scorer.score(prompts, answers, Asked("sampled"), temperature=PROBE_TEMPERATURE)

    def _proved(self, version: int, sampled: Sequence[Sampled], said: Sequence[Signal]) -> Told | None:
        """What other ranks are told. Raises UserError unless the engine gives the trainer's log-probs to answers of its
        own."""
        ours_N = np.concatenate([np.asarray(one.sampled_logprob_T) for one in said])
        gap_N = np.abs(np.concatenate([one.logprobs_T for one in sampled]) - ours_N)
        mean, p999 = float(gap_N.mean()), float(np.quantile(gap_N, 0.999))
        self._metrics += [
            Metric("rollout/probe_gap_mean", mean),
            Metric("rollout/probe_gap_p999", p999, "max"),
        ]
        exact = self.recipe.model.dtype == "float32"
        more = 1.0 if self.recipe.sampling.vllm.quantization is None else QUANTISED
        most_mean, most = (EXACT, EXACT) if exact else LOW
        if not (mean <= more * most_mean and p999 <= more * most):  # NaN is over every limit
            raise UserError(
                f"the engine's log-probs are not the student's of step {version}: over {len(gap_N)} tokens they differ "
                f"by {mean:.2g} nats in the mean and {p999:.2g} at the 99.9th percentile, where {more * most_mean:g} "
                f"and {more * most:g} are allowed in {self.recipe.model.dtype}; is another model served there, in "
                "another dtype, without --logprobs-mode processed_logprobs, or does another run update it?"
            )
        return None if self._keeper is None else self._keeper.tell()

    def _probe(self, row: int) -> list[int]:
        """A prompt of ordinary ids, the same at every update."""
        plain = [i for i in range(self.student.num_tokens) if i not in self.student.stop_ids]
        room = self.served.max_model_len or PROBE_PROMPT + PROBE_TOKENS
        length = max(1, min(PROBE_PROMPT, room - PROBE_TOKENS))
        return [plain[seed_from("probe", row, place) % len(plain)] for place in range(length)]


def host_of(recipe: Recipe, ranks: Ranks) -> int:
    """The rank whose engine this one asks."""
    if recipe.sampling.engine == "server":
        return 0
    return ranks.rank - ranks.local_rank % (recipe.sampling.vllm.ranks_per_engine or ranks.local_size)


def write_weights(
    student: LanguageModel, weights: Mapping[str, Tensor] | None, dtype: torch.dtype, folder: Path
) -> None:
    """A checkpoint as the engine reads it, in the dtype of the computation; of a LoRA student its adapter. weights:
    whole, where the module does not hold them."""
    with torch.no_grad(), quiet_libraries(), swapped(slots(student.module, weights or {})):
        if hasattr(student.module, "peft_config"):
            student.module.save_pretrained(folder)
            return
        state = _computed(student.module.state_dict(), dtype)
        student.module.save_pretrained(folder, state_dict=state, max_shard_size="1000GB")


def checkpoint_state(student: LanguageModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """What `write_weights` would write, as tensors; of what the student uses at the moment."""
    state = _computed(student.module.state_dict(), optimizer.compute_dtype)
    state = remove_tied_weights_from_state_dict(state, student.module)
    found: dict[str, Tensor] = revert_weight_conversion(student.module, state)
    return found


def _computed(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def vocabulary_of(student: LanguageModel) -> Vocabulary:
    return Vocabulary(
        num_tokens=student.num_tokens,
        num_rows=student.num_rows,
        stop_ids=frozenset(token for token in student.stop_ids if token < student.num_tokens),
        absent=student.absent_ids,
        max_positions=student.max_positions,
        tokenizer=student.tokenizer,
    )


def vllm_options(recipe: Recipe, student: LanguageModel, ranks: Ranks = ALONE) -> VllmOptions:
    own, model = recipe.sampling.vllm, recipe.model
    end = min(ranks.local_rank + (own.ranks_per_engine or ranks.local_size), ranks.local_size)
    peft = getattr(student.module, "peft_config", None)
    adapter = None if peft is None else peft["default"]
    return VllmOptions(
        model=model.path if adapter is None else str(adapter.base_model_name_or_path or model.path),
        dtype=model.dtype,
        python=own.python,
        gpu_memory_utilization=own.gpu_memory_utilization,
        tensor_parallel_size=own.tensor_parallel_size,
        max_model_len=own.max_model_len,
        quantization=own.quantization,
        extra_args=own.extra_args,
        lora_rank=None if adapter is None else adapter.r,
        sleeps=recipe.sampling.when_idle == "sleep",
        trust_remote_code=model.trust_remote_code,
        gpus=range(ranks.local_rank, end) if end - ranks.local_rank < ranks.local_size else None,
        reads_text=recipe.episode is not None and bool(recipe.episode.stop),
    )
