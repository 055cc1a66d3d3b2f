"""vLLM 0.32's interface: token ids in and out at /inference/v1/generate, every field sent (unknown ones are ignored
with status 200, and a missing one may be filled in by a generation config)."""

from __future__ import annotations

import re
from typing import Any

from opdkit.engines.base import SamplingParams
from opdkit.engines.servers.base import Aborted, About, Row, Vocabulary, Written, as_mapping, read_ids, read_logprobs
from opdkit.engines.servers.http import Client, Refused, Unreachable
from opdkit.errors import UserError

OLDEST, NEWEST = (0, 32), (0, 32)  # versions that `make test-vllm` was run with
UPDATE_S = 1800.0  # loading weights
BANNED = -100.0  # added to a logit: the least that vLLM takes, and exp(-100) of the mass


class Vllm:
    path = "/inference/v1/generate"

    def __init__(self, client: Client) -> None:
        self.client = client
        self._served: str | None = None

    def about(self) -> About:
        """Raises UserError where the server is no vLLM that takes token ids."""
        version = as_mapping(self._get("/version"), self.client.url).get("version", "")
        models = as_mapping(self._get("/v1/models"), self.client.url).get("data")
        own = [m for m in models or () if isinstance(m, dict) and not m.get("parent")]
        if not own or not isinstance(version, str):
            raise UserError(f"{self.client.url} names no model that it serves; check the address")
        self._served = str(own[0]["id"])
        length = own[0].get("max_model_len")
        return About(
            version=version,
            models=tuple(str(m["id"]) for m in own),
            root=str(own[0].get("root", "")),
            max_model_len=length if isinstance(length, int) else None,
        )

    def body(self, row: Row, params: SamplingParams, vocabulary: Vocabulary, model: str | None) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "n": 1,
            "max_tokens": params.max_answer_tokens,
            "min_tokens": 0,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "seed": row.seed,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(params.stop),
            "stop_token_ids": sorted(vocabulary.stop_ids),
            "ignore_eos": True,  # the stops are those above, and no others
            "logprobs": 0,
            "detokenize": bool(params.stop),
            "skip_special_tokens": False,
            "logit_bias": {str(token): BANNED for token in vocabulary.banned} or None,
        }
        return {
            "model": model or self._served,
            "token_ids": list(row.prompt),
            "sampling_params": asked,
            "stream": False,
        }

    def written(self, answer: Any) -> Written:
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise Aborted(str(choice["finish_reason"]))
        ids = read_ids(choice["token_ids"])
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]] if ids else []
        spans = choice.get("weight_versions") or ()
        return Written(
            ids=ids,
            logprobs_T=read_logprobs(logprobs),
            stopped=choice["finish_reason"] == "stop",
            versions=tuple(str(span["version"]) for span in spans),
        )

    def progress(self) -> float | None:
        try:
            text = self.client.ask("/metrics", timeout_s=20.0, patience_s=0).decode("utf-8", "replace")
        except Refused:
            return None
        counts = re.findall(r"^vllm:(?:generation|prompt)_tokens_total\S*\s+(\S+)", text, re.MULTILINE)
        return sum(map(float, counts)) if counts else None

    def load_weights(self, folder: str, version: str) -> None:
        try:
            said = self._dev("/collective_rpc", {"method": "opdkit_load", "args": [folder]}, UPDATE_S)
        except Unreachable as error:
            raise UserError(
                f"the engine could not load the weights in {folder} ({error}); does it see this folder, and was it "
                "started with --worker-extension-cls opdkit_worker.Worker?"
            ) from None
        self._loaded(said, version)

    def gpu(self) -> str:
        said = self._dev("/collective_rpc", {"method": "opdkit_device"})
        names = said.get("results") if isinstance(said, dict) else None
        return str(names[0]) if isinstance(names, list) and len(names) == 1 else ""

    def load_shared(self, layout: str, version: str) -> None:
        self._loaded(
            self._dev("/collective_rpc", {"method": "opdkit_load_shared", "args": [layout]}, UPDATE_S), version
        )

    def _loaded(self, said: Any, version: str) -> None:
        if not isinstance(said, dict) or not said.get("results"):
            raise UserError(f"{self.client.url} did not say that it has loaded the new weights")
        self.forget(version)

    def forget(self, version: str) -> None:
        """What was computed with older weights; the new ones are of this version."""
        # What was cached belongs to the old weights, and would give wrong numbers without an error.
        said = self._dev("/reset_prefix_cache", {})
        if isinstance(said, dict) and said.get("success") is False:
            raise UserError(
                f"{self.client.url} cannot forget what it computed with the old weights: it is answering somebody "
                "else's requests; let nobody else use it"
            )
        self._dev("/update_weight_version", {"new_version": version})

    def load_adapter(self, name: str, folder: str) -> None:
        try:
            body = {"lora_name": name, "lora_path": folder}
            self.client.ask("/v1/load_lora_adapter", body, timeout_s=UPDATE_S, patience_s=5.0)
        except Refused as error:
            if error.status == 404 and "Not Found" in error.said:
                raise UserError(
                    f"{self.client.url} takes no adapters; start it with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
                ) from None
            raise UserError(f"vLLM refuses the adapter {folder}: {error}") from None

    def drop_adapter(self, name: str) -> None:
        self.client.ask("/v1/unload_lora_adapter", {"lora_name": name})

    def sleep(self, keep_weights: bool) -> None:
        self._dev(f"/sleep?level={1 if keep_weights else 2}", {}, UPDATE_S)

    def wake(self) -> None:
        self._dev("/wake_up", {}, UPDATE_S)

    def _get(self, path: str) -> Any:
        try:
            return self.client.json(path, timeout_s=30.0)
        except Refused as error:
            if error.status == 404:
                raise UserError(
                    f"{self.client.url} has no {path}, so it is no vLLM; check the address, or set "
                    'sampling.server_kind = "sglang"'
                ) from None
            raise

    def _dev(self, path: str, body: Any, timeout_s: float = 120.0) -> Any:
        try:
            return self.client.json(path, body, timeout_s=timeout_s)
        except Refused as error:
            if error.status == 404:
                raise UserError(
                    f"{self.client.url} has no {path.partition('?')[0]}; start it with VLLM_SERVER_DEV_MODE=1 in its "
                    "environment, so that its weights can be replaced"
                ) from None
            if "opdkit_load" in error.said or "attribute" in error.said:
                raise UserError(
                    f"{self.client.url} cannot load new weights; start it with --worker-extension-cls "
                    "opdkit_worker.Worker (docs/guides/vllm.md has the whole command)"
                ) from None
            raise
