"""SGLang's own interface: token ids in and out at /generate. Written from its sources and run against a fake server;
never run against SGLang.

Its log-probs are of the whole distribution at the temperature, before top-k, top-p and min-p cut, and per-request seeds
are heard only with --enable-deterministic-inference.
"""

from __future__ import annotations

from typing import Any

from opdkit.engines.base import SamplingParams
from opdkit.engines.servers.base import Aborted, About, Row, Vocabulary, Written, as_mapping, read_ids, read_logprobs
from opdkit.engines.servers.http import Client, Refused
from opdkit.errors import UserError

OLDEST, NEWEST = (0, 5), (0, 5)  # whose sources were read
UPDATE_S = 1800.0
BANNED = -100.0


class Sglang:
    path = "/generate"

    def __init__(self, client: Client) -> None:
        self.client = client

    def about(self) -> About:
        model = as_mapping(self._first("/model_info", "/get_model_info"), self.client.url)
        server = as_mapping(self._first("/server_info", "/get_server_info"), self.client.url)
        length = server.get("context_length")
        root = str(model.get("model_path", ""))
        return About(
            version=str(server.get("version", "")),
            models=(root,),
            root=root,
            max_model_len=length if isinstance(length, int) else None,
        )

    def body(self, row: Row, params: SamplingParams, vocabulary: Vocabulary, model: str | None) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "n": 1,
            "max_new_tokens": params.max_answer_tokens,
            "min_new_tokens": 0,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": params.min_p,
            "sampling_seed": row.seed & 0x7FFFFFFF,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(params.stop),
            "stop_token_ids": sorted(vocabulary.stop_ids),
            "ignore_eos": False,  # true would switch the stops off too
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "logit_bias": {str(token): BANNED for token in vocabulary.banned} or None,
        }
        body: dict[str, Any] = {"input_ids": list(row.prompt), "sampling_params": asked, "return_logprob": True}
        return body | {"logprob_start_len": -1, "stream": False, **({"lora_path": model} if model else {})}

    def written(self, answer: Any) -> Written:
        meta = answer["meta_info"]
        kind = meta["finish_reason"]["type"]
        if kind not in ("stop", "length"):
            raise Aborted(str(kind))
        said = meta["output_token_logprobs"]
        ids = read_ids([token for _, token, *_ in said])
        version = meta.get("weight_version")
        return Written(
            ids=ids,
            logprobs_T=read_logprobs([logprob for logprob, *_ in said]),
            stopped=kind == "stop",
            versions=() if version is None else (str(version),),
        )

    def progress(self) -> float | None:
        return None

    def load_weights(self, folder: str, version: str) -> None:
        body = {"model_path": folder, "flush_cache": True, "abort_all_requests": False, "weight_version": version}
        said = as_mapping(self.client.json("/update_weights_from_disk", body, timeout_s=UPDATE_S), self.client.url)
        if not said.get("success"):
            raise UserError(f"SGLang refuses the new weights: {str(said.get('message', ''))[:300]}")

    def gpu(self) -> str:
        return ""

    def load_shared(self, layout: str, version: str) -> None:
        raise AssertionError("SGLang reads weights from files")

    def load_adapter(self, name: str, folder: str) -> None:
        try:
            body = {"lora_name": name, "lora_path": folder}
            self.client.ask("/load_lora_adapter", body, timeout_s=UPDATE_S, patience_s=5.0)
        except Refused as error:
            raise UserError(f"SGLang refuses the adapter {folder}: {error}; start it with --enable-lora") from None

    def drop_adapter(self, name: str) -> None:
        self.client.ask("/unload_lora_adapter", {"lora_name": name})

    def sleep(self, keep_weights: bool) -> None:
        tags = ["kv_cache"] if keep_weights else ["kv_cache", "weights"]
        self.client.ask("/release_memory_occupation", {"tags": tags}, timeout_s=UPDATE_S)

    def wake(self) -> None:
        self.client.ask("/resume_memory_occupation", {"tags": ["weights", "kv_cache"]}, timeout_s=UPDATE_S)

    def _first(self, *paths: str) -> Any:
        """Of the paths of newer and older releases, the first that is there."""
        for path in paths:
            try:
                return self.client.json(path, timeout_s=30.0)
            except Refused as error:
                if error.status != 404:
                    raise
        raise UserError(
            f"{self.client.url} has no {paths[0]}, so it is no SGLang; check the address, or set "
            'sampling.server_kind = "vllm"'
        )
