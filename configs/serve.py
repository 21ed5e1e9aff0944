"""A trained model behind an HTTP API that OpenAI's clients speak; a page to chat with it at its address.

    python run.py --config=configs/serve.py --workdir=workdirs/serve --config.init_from=workdirs/quickstart

`init_from` is the workdir of a run, or a Hugging Face folder, whose chat template is used if it has one. It says its address
when it is ready, and ends by Ctrl-C or SIGTERM when what is under way has been answered.

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"prompt": "import ", "max_tokens": 32, "temperature": 0, "logprobs": 2, "return_token_ids": true}'

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    stream = client.chat.completions.create(model="quickstart", messages=[{"role": "user", "content": "Hello"}], stream=True)
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)

Beside OpenAI's fields: `top_k`, `min_p`, `repetition_penalty`, `return_token_ids` (`prompt_token_ids` and `token_ids` in each
choice), and `stop_loops`: a text that has come to repeat itself ends, with `finish_reason` "stop" and `finish_detail` "loop".
On a CPU with many requests at a time small models may be faster with a device for each core (docs/benchmarks/generation.md): set
JAX_NUM_CPU_DEVICES=2 in the environment, and `--config.mesh.tensor=2`. For others than this machine: `--config.host=0.0.0.0
--config.api_key_file=FILE`, behind a proxy that speaks TLS.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "serve"})
