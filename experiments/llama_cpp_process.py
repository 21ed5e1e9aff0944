"""llama.cpp in the process that `experiments.llama_cpp` starts for it: nothing of ours is imported here."""

import concurrent.futures
import json
import os
import urllib.error
import urllib.request
from typing import Any

_MOST_LOG_BYTES = 1 << 16
# Beyond what any logits differ by, so that one token is chosen; the log-probabilities are those without it.
_FORCED = 1e6


def answer(data: bytes) -> dict[str, Any]:
    """What the job asks of a file, by the names of `LlamaCppAnswers`. data: the job, in JSON.

    Raises:
      ValueError: llama.cpp does not load the file, or refuses a request.
    """
    job = json.loads(data)
    server = _load(job)

    def ask(path: str, **request: Any) -> Any:
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(server.listening_address + path, body, headers)) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama.cpp refuses {path}: {error.read().decode(errors='replace')}") from error

    def tokenize(text: str, *, begin: bool, symbols: bool) -> list[int]:
        return ask("/tokenize", content=text, add_special=begin, parse_special=symbols)["tokens"]

    def complete(prompt: list[int], count: int, **settings: Any) -> dict[str, Any]:
        return ask("/completion", prompt=prompt, n_predict=count, temperature=0, return_tokens=True, **settings)

    def step(prompt: list[int], forced: int, count: int, **settings: Any) -> list[dict[str, Any]]:
        bias = [[forced, _FORCED]]
        return complete(prompt, 1, n_probs=count, logit_bias=bias, **settings).get("completion_probabilities", [])

    def following(prompt: list[int], **settings: Any) -> dict[int, float]:
        (chosen,) = step(prompt, letter, 1 << 20, **settings)
        return {entry["id"]: entry["logprob"] for entry in chosen["top_logprobs"]}

    def score(prompt: list[int], index: int) -> float:
        # The server says nothing of a token that is only part of a character.
        found = step(prompt, index, 1)
        return found[0]["logprob"] if found else following(prompt)[index]

    def chat(messages: list[dict[str, Any]]) -> list[int]:
        return tokenize(ask("/apply-template", messages=messages)["prompt"], begin=True, symbols=True)

    letter = tokenize("a", begin=False, symbols=False)[-1]
    with concurrent.futures.ThreadPoolExecutor(job["parallel"]) as pool:
        complete_greedily = lambda prompt: complete(prompt, job["new_tokens"], cache_prompt=False)
        continued = list(pool.map(complete_greedily, job["prompts"]))
    return {
        "ids": [tokenize(text, begin=False, symbols=job["symbols"]) for text in job["texts"]],
        "chat_ids": [chat(messages) for messages in job["chats"]],
        "log_probs": [[score(ids[:end], ids[end]) for end in range(1, len(ids))] for ids in job["scored"]],
        "next_log_probs": [_by_id(following(ids, cache_prompt=False)) for ids in job["followed"]],
        "continuations": [answered["tokens"] for answered in continued],
        "prefill_tokens_per_second": _rate(continued, "prompt"),
        "decode_tokens_per_second": _rate(continued, "predicted"),
    }


def _by_id(values: dict[int, float]) -> list[float]:
    return [values[index] for index in range(len(values))]


def _load(job: dict[str, Any]) -> Any:
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else an abort first starts a debugger
    import xllamacpp

    longest = max((len(ids) for name in ("scored", "followed", "prompts") for ids in job[name]), default=0)
    params = xllamacpp.CommonParams()
    params.model.path = job["file"]
    params.n_parallel = job["parallel"]
    params.n_ctx = job["parallel"] * (longest + job["new_tokens"] + 1)
    params.n_threads_http = job["parallel"] + 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.n_gpu_layers = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = params.warmup = False
    params.verbosity = 1  # errors, to standard error
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        said = os.pread(2, _MOST_LOG_BYTES, 0).decode(errors="replace").splitlines()
        reason = next((line for line in said if "error loading" in line), said[-1] if said else str(error))
        raise ValueError(f"llama.cpp does not load it: {reason.rpartition(' E ')[2]}") from error


def _rate(continued: list[dict[str, Any]], what: str) -> float | None:
    """Tokens per second of prompts ("prompt") or of what was generated ("predicted")."""
    seconds = sum(answered["timings"][f"{what}_ms"] for answered in continued) / 1000
    return sum(answered["timings"][f"{what}_n"] for answered in continued) / seconds if seconds else None
