"""The benchmark of generation: what it makes of the seconds that engines say, with fakes in their places."""

import json

import jax
import pytest
from etils import epath

from experiments.benchmarks import generation
from lfm_jax.configuration import ConfigError
from lfm_jax.interop import export_folder
from lfm_jax.models import Decoder, ModelConfig, functional

MODEL = ModelConfig(
    vocab_size=16, embed_dim=8, layer_types=("full_attention",), num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12,
)  # fmt: skip
# Heads, channels and vocabulary for two cores or four.
SMALL = ModelConfig(
    vocab_size=64, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64,
    context_length=64,
)  # fmt: skip
# embedding, queries and output, keys and values, feed-forward, norms: of q and k, of the two branches, and the last
PARAMETERS = 16 * 8 + 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12 + 2 * 4 + 3 * 8
# With 6 tokens of 12 read and 6 to come, the average one sees 9, of which a causal query of a sequence as long sees 5 on average.
CACHE = 9 * 2 * 4 * 4
FLOPS = 2 * (PARAMETERS - 2 * 4 - 3 * 8) + 4 * 8 * 5
# By round, the first of which does not count: seconds for the prompts, and for the tokens behind the first, of a batch of 1.
SECONDS = {"ours": ((90, 90), (1, 0.8), (2, 1.2), (9, 0.4)), "transformers": ((0.1, 0.1), (4, 1.6), (3, 9), (5, 1))}


class FakeEngine:
    open = 0

    def __init__(self, name, model, platform, dtype):
        assert (model, platform, dtype) == (f"{name} of nano", "cpu", "float32")
        self._name, self._calls = name, 0
        FakeEngine.open += 1

    def generate(self, prompts, new_tokens):
        assert {len(prompt) for prompt in prompts} == {6} and new_tokens == (7 if self._calls % 2 else 1)
        prefill, decode = SECONDS[self._name][self._calls // 2 % 4]
        self._calls += 1
        batch = len(prompts)
        tokens = [[row] * new_tokens for row in range(batch)]
        if self._name == "transformers":
            tokens[0] = [99] * new_tokens
        seconds = batch * (prefill + (decode if new_tokens > 1 else 0))
        return {"seconds": seconds, "tokens": tokens, "peak_bytes": 1000 * batch + new_tokens}

    def close(self):
        FakeEngine.open -= 1


def test_ratios_and_the_floor_are_those_of_the_seconds(tmp_path, monkeypatch):
    """One prompt is as fast as its bytes can be read, eight as their products can be computed."""
    engines = tuple(SECONDS)
    monkeypatch.setattr(generation, "_Engine", FakeEngine)
    monkeypatch.setattr(generation, "_models", lambda *_: {name: f"{name} of nano" for name in engines})
    monkeypatch.setattr(generation, "preset", lambda name: MODEL)
    read = {(4 * PARAMETERS, "float32"): 10 * (4 * PARAMETERS + CACHE)}
    monkeypatch.setattr(generation, "read_bytes_per_second", lambda size, dtype: read[size, dtype])
    monkeypatch.setattr(generation, "matmul_flops_per_second", lambda size, dtype: {"float32": 20 * FLOPS}[dtype])
    config = generation.Config(presets=("nano",), engines=engines, batches=(1, 8), prompt=6, new_tokens=6, rounds=4)
    generation.main(config, epath.Path(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    # Medians: 2 and 0.8 seconds of ours, 4 and 1.6 of the other; a batch of 8 takes 8 times as long.
    assert {name: value for name, value in results.items() if "_over_" in name} == pytest.approx(
        {f"nano_batch_{batch}_{what}_ours_over_transformers": 2 for batch in (1, 8) for what in ("prefill", "decode")}
    )
    every = lambda field: [row[field] for row in results["generation"]]
    assert list(zip(every("batch"), every("engine"), strict=True)) == [(batch, name) for batch in (1, 8) for name in engines]
    assert every("prefill_tokens_per_second") == pytest.approx([3, 1.5] * 2)
    assert every("decode_tokens_per_second") == pytest.approx([7.5, 3.75] * 2)
    # Of 0.8 and of 1.6 seconds, 6 tokens need 6 times 0.1 for the bytes; of 6.4 and of 12.8, 6 times 8 times 0.05 for the FLOPs.
    assert every("decode_limit") == ["bandwidth"] * 2 + ["flops"] * 2
    assert every("of_decode_floor") == pytest.approx([0.75, 0.375, 0.375, 0.1875])
    assert every("read_bytes_per_token") == pytest.approx([4 * PARAMETERS + CACHE] * 2 + [4 * PARAMETERS / 8 + CACHE] * 2)
    assert every("bandwidth_bytes_per_second") == [10 * (4 * PARAMETERS + CACHE)] * 4
    assert every("matmul_flops_per_second") == [20 * FLOPS] * 4
    assert every("same_tokens") == [1, 0, 8, 7] and every("peak_bytes") == [1007, 1007, 8007, 8007]
    assert FakeEngine.open == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presets": ("huge",)}, "no model preset 'huge'"),
        ({"engines": ("ours", "theirs")}, "engines has 'theirs'; known are ours, ours_by_cores, transformers, llama_cpp"),
        ({"rounds": 1}, "rounds must be at least 2, since the first is not timed; got 1"),
        ({"dtype": "bfloat16"}, "llama_cpp computes in float32 on a CPU, not in bfloat16 on a cpu; leave it out of engines"),
        ({"platform": "gpu"}, "ours_by_cores is of the cores of a CPU; leave it out of engines"),
        ({"platform": "gpu", "engines": ("llama_cpp",)}, "llama_cpp computes in float32 on a CPU, not in float32 on a gpu"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        generation.Config(**settings)


def test_an_engine_that_ends_is_told():
    with pytest.raises(RuntimeError, match="generation_engines nobody nowhere cpu float32 ended with 1; what it said is above"):
        generation._Engine("nobody", epath.Path("nowhere"), "cpu", "float32")


@pytest.mark.skipif(any(device.platform == "gpu" for device in jax.devices()), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="platform='gpu' needs a GPU that JAX sees, with the extra `gpu`; it says: "):
        generation.main(generation.Config(platform="gpu", engines=("ours",)), epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())


def test_in_bfloat16_weights_are_half_the_bytes_and_the_device_says_its_rates(monkeypatch):
    """The real engines are told the type and the place, and the floor is of weights and caches of two bytes."""
    monkeypatch.setattr(generation, "read_bytes_per_second", lambda size, dtype: {(2 * PARAMETERS, "bfloat16"): 2.0}[size, dtype])
    monkeypatch.setattr(generation, "matmul_flops_per_second", lambda size, dtype: {"bfloat16": 1e9}[dtype])
    config = generation.Config(platform="gpu", dtype="bfloat16", engines=("ours",), batches=(1,), prompt=6, new_tokens=6)
    fake = FakeEngine("ours", "ours of nano", "cpu", "float32")
    (row,) = generation._rows(config, "nano", MODEL, {"ours": fake})
    assert row["read_bytes_per_token"] == pytest.approx(2 * PARAMETERS + CACHE / 2)
    assert row["bandwidth_bytes_per_second"] == 2.0 and row["matmul_flops_per_second"] == 1e9
    fake.close()


def test_on_a_device_for_each_core_the_real_engine_says_the_same(tmp_path):
    """In processes of their own, as they are timed. On a machine of one core they are the same."""
    params, buffers = functional(lambda rngs: Decoder(SMALL, rngs=rngs)).init(jax.random.key(0))
    export_folder(SMALL, params, buffers, tmp_path / "hf")
    prompts, said = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], {}
    for name in ("ours", "ours_by_cores"):
        engine = generation._Engine(name, epath.Path(tmp_path / "hf"), "cpu", "float32")
        said[name] = engine.generate(prompts, 6)
        engine.close()
    assert [len(tokens) for tokens in said["ours"]["tokens"]] == [6, 6]
    assert said["ours_by_cores"]["tokens"] == said["ours"]["tokens"]
    assert min(answer["peak_bytes"] for answer in said.values()) > 50e6 and said["ours"]["seconds"] > 0


def test_ratios_are_of_the_same_model_and_batch():
    rates = [f"{part}_tokens_per_second" for part in ("prefill", "decode")]
    rows = [
        {"preset": name, "batch": batch, "engine": engine, **dict.fromkeys(rates, rate)}
        for name, batch, engine, rate in (
            ("a", 1, "ours", 6), ("a", 8, "ours_by_cores", 8), ("a", 1, "transformers", 2), ("a", 8, "transformers", 4),
            ("b", 1, "transformers", 1),
        )
    ]  # fmt: skip
    assert generation._ratios(rows) == {
        f"a_batch_{batch}_{part}_{ours}_over_transformers": ratio
        for batch, ours, ratio in ((1, "ours", 3), (8, "ours_by_cores", 2))
        for part in ("prefill", "decode")
    }
