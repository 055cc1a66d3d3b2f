"""A server of a tiny model on a thread of this process, which speaks as vLLM 0.32 and SGLang do where opdkit asks them.

Its numbers are a real model's: every answer comes from forward passes of a Hugging Face module, drawn and cut here by
code that shares nothing with opdkit's engine. It has the traps that the real ones have, as far as opdkit must step
around them: unknown fields are ignored, new weights leave the old prefix cache in place until it is reset, an adapter's
name cannot be used twice. It does not show that a real server behaves so; `make test-vllm` does.

    with FakeServer(folder) as server:
        server.url, server.requests          # where it is; what it was asked: (path, body)
        server.faults.append("busy")         # the next request for an answer fails so (see FAULTS)
"""

from __future__ import annotations

import base64
import copy
import fcntl
import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

FAULTS = ("busy", "half", "drop", "hang", "no_json", "error")  # 429, half a body, no answer, never, text, 500
ANSWERS = ("/inference/v1/generate", "/v1/completions", "/generate")  # the paths that faults fall on


class FakeServer:
    """name: the served model. dev: VLLM_SERVER_DEV_MODE. version: what it says it is. max_len: its max_model_len."""

    def __init__(
        self,
        folder: Path | str,
        *,
        name: str = "m",
        version: str = "0.32.0",
        max_len: int = 96,
        dev: bool = True,
        kind: str = "vllm",
        raw_logprobs: bool = False,
        spool: Path | None = None,
    ) -> None:
        self.folder, self.name, self.version, self.max_len, self.dev, self.kind = (
            Path(folder),
            name,
            version,
            max_len,
            dev,
            kind,
        )
        self.raw_logprobs = raw_logprobs  # as without --logprobs-mode processed_logprobs
        self.spool = spool  # where hidden states are written; None: they are not extracted
        self.most_logprobs = 20  # --max-logprobs
        self.scores_ids: str | None = None  # prompt_logprob_token_ids, "right" as on a GPU, "shifted"; None: 400
        self.decode: Callable[[list[int]], str] = AutoTokenizer.from_pretrained(folder).decode
        self.worker: Any = None  # an `in_vllm.opdkit_worker.Worker` that /collective_rpc calls
        self.faults: list[str] = []
        self.before_answer: Callable[[], object] | None = None  # called before every answer, e.g. to stop the server
        self.requests: list[tuple[str, Any]] = []
        self.most_at_once = self._at_once = 0
        self._base, self._adapters = self._load(folder), {}
        self._cached: dict[tuple[str, tuple[int, ...]], Any] = {}  # the weights that a prompt was first read with
        self.weight_version = "default"
        self.is_asleep = False
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self._port = 0

    def __enter__(self) -> FakeServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the port of last time if there was one."""
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._http.daemon_threads = True
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def restart(self) -> None:
        """As after a crash: the weights of the folder, no adapters, no memory of what was published."""
        self.stop()
        self._base, self._adapters, self._cached, self.weight_version = self._load(self.folder), {}, {}, "default"
        self.start()

    @staticmethod
    def _load(folder: Path | str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def asked(self, path: str) -> list[Any]:
        """The bodies of all requests of a path."""
        return [body for asked, body in self.requests if asked == path]

    # What the endpoints do: (status, body).

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, None
        if path == "/version" and self.kind == "vllm":
            return 200, {"version": self.version}
        if path in ("/get_server_info", "/server_info") and self.kind == "sglang":
            return 200, {"version": self.version, "max_total_num_tokens": 4096, "context_length": self.max_len}
        if path in ("/get_model_info", "/model_info") and self.kind == "sglang":
            return 200, {"model_path": str(self.folder), "tokenizer_path": str(self.folder), "is_generation": True}
        if path == "/v1/models":
            served = [(self.name, str(self.folder), None), *((n, p, self.name) for n, (p, _) in self._adapters.items())]
            return 200, {
                "object": "list",
                "data": [
                    {"id": n, "object": "model", "root": root, "parent": parent, "max_model_len": self.max_len}
                    for n, root, parent in served
                ],
            }
        if path == "/metrics" and self.kind == "vllm":
            return 200, f'vllm:generation_tokens_total{{model_name="{self.name}"}} {len(self.requests)}.0\n'
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        own: Mapping[str, Callable[[Any], tuple[int, Any]]] = {
            "/v1/load_lora_adapter": self._load_lora,
            "/load_lora_adapter": self._load_lora,
            "/v1/unload_lora_adapter": self._unload_lora,
            "/unload_lora_adapter": self._unload_lora,
            "/inference/v1/generate": self._generate,
            "/v1/completions": self._completions,
            "/generate": self._sglang_generate,
            "/update_weights_from_disk": self._from_disk,
            "/flush_cache": self._reset_cache,
        }
        dev: Mapping[str, Callable[[Any], tuple[int, Any]]] = {
            "/collective_rpc": self._collective_rpc,
            "/reset_prefix_cache": self._reset_cache,
            "/update_weight_version": self._new_version,
            "/sleep": self._sleep,
            "/wake_up": self._wake,
        }
        does = own.get(path.partition("?")[0]) or (dev.get(path.partition("?")[0]) if self.dev else None)
        return does(body) if does else (404, {"detail": "Not Found"})

    def _collective_rpc(self, body: Any) -> tuple[int, Any]:
        if self.worker is not None:
            return 200, {"results": [getattr(self.worker, body["method"])(*body.get("args", ()))]}
        if body["method"] != "opdkit_load":
            return 400, {"error": {"message": "no such method", "code": 400}}
        weights = load_file(Path(body["args"][0]) / "model.safetensors")
        module = copy.deepcopy(self._base)  # what is cached was computed by the old one
        module.load_state_dict(weights, strict=False)
        self._base = module
        return 200, {"results": [len(weights)]}

    def _from_disk(self, body: Any) -> tuple[int, Any]:
        self._base = self._load(body["model_path"])
        if body.get("flush_cache", True):
            self._cached.clear()
        self.weight_version = body.get("weight_version") or self.weight_version
        return 200, {"success": True, "message": "Succeeded to update model weights."}

    def _reset_cache(self, body: Any) -> tuple[int, Any]:
        self._cached.clear()
        return 200, None

    def _new_version(self, body: Any) -> tuple[int, Any]:
        self.weight_version = body["new_version"]
        return 200, {"success": True}

    def _sleep(self, body: Any) -> tuple[int, Any]:
        self.is_asleep = True
        return 200, None

    def _wake(self, body: Any) -> tuple[int, Any]:
        self.is_asleep = False
        return 200, None

    def _load_lora(self, body: Any) -> tuple[int, Any]:
        from peft import PeftModel

        name, path = body["lora_name"], body["lora_path"]
        if name in self._adapters and not body.get("load_inplace"):
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded.", "code": 400}}
        if not Path(path, "adapter_config.json").exists():
            return 404, {"error": {"message": f"No adapter found for {path}", "code": 404}}
        self._adapters[name] = (path, PeftModel.from_pretrained(self._load(self.folder), path).eval())
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload_lora(self, body: Any) -> tuple[int, Any]:
        if self._adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found.", "code": 404}}
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def _model(self, name: str | None) -> Any:
        if name in (None, self.name):
            return self._base
        return self._adapters[name][1] if name in self._adapters else None

    def _generate(self, body: Any) -> tuple[int, Any]:
        """vLLM's tokens in, tokens out."""
        params, prompt = body["sampling_params"], list(body["token_ids"])
        model = self._model(body.get("model"))
        if fault := self._refusal(model, body.get("model"), prompt, params.get("max_tokens", 16)):
            return fault
        if (wanted := params.get("prompt_logprob_token_ids")) is not None and self.scores_ids is None:
            words = "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)."
            return 400, {"error": {"message": words, "code": 400}}
        answer, finish, reason = self._answer(model, body.get("model"), prompt, params, params.get("max_tokens", 16))
        count = params.get("logprobs")
        prompts = params.get("prompt_logprobs")
        content = [{"token_id": t, "logprob": p, "rank": 1, "top_logprobs": []} for t, p in answer]
        choice = {
            "index": 0,
            "finish_reason": finish,
            "stop_reason": reason,
            "token_ids": [token for token, _ in answer],
            "weight_versions": [{"version": self.weight_version, "start": 0, "end": len(answer)}],
            "logprobs": None if count is None else {"content": content},
        }
        return 200, {
            "request_id": "r",
            "choices": [choice],
            "prompt_logprobs": None if prompts is None else self._prompt_logprobs(model, prompt, prompts),
            "prompt_token_id_logprobs": None if wanted is None else self._of_ids(model, prompt, params),
            "kv_transfer_params": None,
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(answer)},
        }

    def _of_ids(self, model: Any, prompt: list[int], params: Mapping[str, Any]) -> str:
        start = params["prompt_logprob_start"] - (self.scores_ids == "shifted")
        ids = torch.tensor(params["prompt_logprob_token_ids"])
        with torch.no_grad():
            logprob_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        file = io.BytesIO()
        np.save(file, logprob_TV[start : start + len(ids)].gather(-1, ids).numpy(), allow_pickle=False)
        return base64.b64encode(file.getvalue()).decode()

    def _completions(self, body: Any) -> tuple[int, Any]:
        """Ids in, ids out; `prompt` is one list of ids or several."""
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        model, choices = self._model(body.get("model")), []
        for prompt in prompts:
            if fault := self._refusal(model, body.get("model"), prompt, body.get("max_tokens", 16)):
                return fault
            answer, finish, reason = self._answer(model, body.get("model"), prompt, body, body.get("max_tokens", 16))
            count = body.get("prompt_logprobs")
            if count is not None and count > self.most_logprobs:
                words = f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.most_logprobs}"
                return 400, {"error": {"message": words, "code": 400}}
            choices.append(
                {
                    "index": len(choices),
                    "text": "",
                    "finish_reason": finish,
                    "stop_reason": reason,
                    "token_ids": [token for token, _ in answer],
                    "prompt_token_ids": list(prompt),
                    "prompt_logprobs": None if count is None else self._prompt_logprobs(model, prompt, count),
                    "logprobs": {"token_logprobs": [p for _, p in answer]} if "logprobs" in body else None,
                }
            )
        said = {"id": "c", "object": "text_completion", "model": body.get("model"), "choices": choices}
        return 200, said | ({"kv_transfer_params": self._hidden(model, prompts)} if self.spool else {})

    def _hidden(self, model: Any, prompts: list[list[int]]) -> dict[str, str]:
        """The states behind the last layer, before the norm, in a file of the spool: of several prompts one path."""
        seen: list[Tensor] = []
        own = copy.deepcopy(model)  # other requests go through the model at the same time
        own.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        with torch.no_grad():
            own(torch.tensor([prompts[-1]]))
        assert self.spool is not None
        path = self.spool / f"cmpl-{uuid.uuid4()}.safetensors"
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            save_file({"hidden_states": seen[0][:, None].contiguous(), "token_ids": torch.tensor(prompts[-1])}, path)
        return {"hidden_states_path": str(path)}

    def _sglang_generate(self, body: Any) -> tuple[int, Any]:
        params, prompt = body["sampling_params"], list(body["input_ids"])
        limit = params.get("max_new_tokens", 128)
        model = self._model(body.get("lora_path"))
        if fault := self._refusal(model, body.get("lora_path"), prompt, limit):
            return fault
        seeded = params | {"seed": params.get("sampling_seed")}
        answer, finish, reason = self._answer(model, body.get("lora_path"), prompt, seeded, limit)
        why = (
            {"type": "stop", "matched": reason or answer[-1][0]}
            if finish == "stop"
            else {"type": "length", "length": limit}
        )
        meta = {
            "finish_reason": why,
            "weight_version": self.weight_version,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(answer),
        }
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[p, token, None] for token, p in answer]
        return 200, {"text": "", "output_ids": [token for token, _ in answer], "meta_info": meta}

    def _refusal(self, model: Any, name: Any, prompt: list[int], limit: int) -> tuple[int, Any] | None:
        if model is None:
            return 404, {"error": {"message": f"The model `{name}` does not exist.", "code": 404}}
        if limit < 1 or not prompt or len(prompt) + limit > self.max_len:
            words = f"maximum context length is {self.max_len} tokens, asked {len(prompt)} + {limit}"
            return 400, {"error": {"message": words, "code": 400}}
        if not all(0 <= token < model.config.vocab_size for token in prompt):
            return 400, {"error": {"message": "token id is out of vocabulary", "code": 400}}
        return None

    def _answer(
        self, model: Any, name: Any, prompt: list[int], params: Mapping[str, Any], limit: int
    ) -> tuple[list[tuple[int, float]], str, int | None]:
        """[(token, log-prob)], finish reason, stop reason. A row is the same whoever else is asked for."""
        rng = np.random.default_rng(params.get("seed") & (2**64 - 1) if params.get("seed") is not None else None)
        model = self._cached.setdefault((str(name), tuple(prompt)), model)
        stops = set(params.get("stop_token_ids") or ())
        ids, answer = list(prompt), []
        for _ in range(limit):
            with torch.no_grad():
                logits_V = model(torch.tensor([ids])).logits[0, -1].double()
            raw_V = logits_V.log_softmax(-1)
            bias = {int(k): float(v) for k, v in (params.get("logit_bias") or {}).items()}
            for token, added in bias.items():
                logits_V[token] += added
            temperature = params.get("temperature", 1.0)
            if temperature == 0:
                token, said_V = int(logits_V.argmax()), raw_V
            else:
                said_V = _cut(logits_V / temperature, params)
                token = int(np.searchsorted(said_V.exp().cumsum(0).numpy(), rng.random() * (1 - 1e-12), side="right"))
            answer.append((token, float((raw_V if self.raw_logprobs else said_V)[token])))
            ids.append(token)
            if token in stops:
                return answer, "stop", token
        return answer, "length", None

    def _prompt_logprobs(self, model: Any, prompt: list[int], count: int) -> list[Any]:
        """As vLLM writes them: at temperature 1; the first token has none; its own token, then the likeliest."""
        with torch.no_grad():
            logprob_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        said: list[Any] = [None]
        for place, token in enumerate(prompt[1:]):
            row_V = logprob_TV[place]
            rank = int((row_V > row_V[token]).sum()) + 1
            entry = {str(token): {"logprob": float(row_V[token]), "rank": rank, "decoded_token": self.decode([token])}}
            likeliest = row_V.topk(min(count, len(row_V))).indices.tolist() if count > 0 else []
            for number, likely in enumerate(likeliest, 1):
                words = self.decode([likely])
                entry.setdefault(str(likely), {"logprob": float(row_V[likely]), "rank": number, "decoded_token": words})
            said.append(entry)
        return said


def _cut(scores_V: Tensor, params: Mapping[str, Any]) -> Tensor:
    """Log-probs after min-p, then top-k, then top-p: vLLM's order."""
    logprob_V = scores_V.log_softmax(-1)
    if params.get("min_p"):
        logprob_V[logprob_V < logprob_V.max() + np.log(params["min_p"])] = -torch.inf
    if params.get("top_k") and params["top_k"] > 0:
        logprob_V[logprob_V < logprob_V.topk(params["top_k"]).values[-1]] = -torch.inf
    if params.get("top_p", 1.0) < 1:
        sorted_V, order_V = logprob_V.log_softmax(-1).sort(descending=True)
        before_V = sorted_V.exp().cumsum(0) - sorted_V.exp()
        logprob_V[order_V[before_V >= params["top_p"]]] = -torch.inf
    return logprob_V.log_softmax(-1)


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.fake.requests.append((self.path, None))
        self._reply(*self.fake.get(self.path))

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        fake = self.fake
        fake.requests.append((self.path, body))
        if self.path not in ANSWERS:
            return self._reply(*fake.post(self.path, body))
        if fake.before_answer is not None:
            fake.before_answer()
        fault = fake.faults.pop(0) if fake.faults else None
        if fault == "busy":
            return self._reply(429, {"error": {"message": "too many requests", "code": 429}}, {"Retry-After": "0"})
        if fault == "error":
            return self._reply(500, {"error": {"message": "EngineCore encountered an issue", "code": 500}})
        if fault == "drop":
            return self.connection.close()
        if fault == "hang":
            time.sleep(3600)
        with fake._lock:
            fake._at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake._at_once)
        try:
            status, answer = fake.post(self.path, body)
        finally:
            with fake._lock:
                fake._at_once -= 1
        if fault == "no_json":
            return self._reply(200, "<html>a proxy</html>")
        self._reply(status, answer, half=fault == "half")

    def _reply(self, status: int, body: Any, headers: Mapping[str, str] | None = None, *, half: bool = False) -> None:
        data = (
            b""
            if body is None
            else (body if isinstance(body, str) else json.dumps(body, separators=(",", ":"))).encode()
        )
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if half else data)
        except OSError:
            pass  # nobody waits for it any more
        self.close_connection = True
