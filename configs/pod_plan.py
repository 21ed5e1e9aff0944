"""The pod planner: memory, step time, MFU and chip-hours of a training step on a TPU slice, from the TPU compiler, without a TPU.

    python run.py --config=configs/pod_plan.py:lfm2_350m --workdir=workdirs/pod_plan --config.topologies=v5e:16x16

Compiles the real training step for the slice, estimates its time from the compiled program, tries meshes, micro-batches and
rematerialisation, and recommends the fastest that fits. Where a context leaves fewer rows than devices, as 32,768 does
(`--config.seq_lens=32768`), sequences are split over as few devices as use them all. Batch and tokens are those of
`configs/pretrain.py`, but for lfm2_350m's, 28T as LFM2.5-350M's. Every time is an estimate. Needs libtpu; one compilation of
lfm2_350m takes one to three minutes on 2 cores, and what is compiled stays in the workdir. The recorded run is
docs/benchmarks/pod_plan.md. Other arguments:

    python run.py --config=configs/pod_plan.py:all --workdir=workdirs/pod_plan_all
    python run.py --config=configs/pod_plan.py:scale --workdir=workdirs/pod_plan_scale
    python run.py --config=configs/pod_plan.py:scale_v5p --workdir=workdirs/pod_plan_scale_v5p
    python run.py --config=configs/pod_plan.py:published --workdir=workdirs/pod_plan_published

`all` plans every preset on a slice of v5e, v5p and v6e each with two sequences of 4,096 tokens a device, in the first layout that
fits; `scale` plans lfm2_350m with 8,192 tokens a device on 16 to 256 chips of v5e, and on the largest slice with contexts up to
131,072; `scale_v5p` does on 16 to 512 chips, `scale_v6e` on 16 to 256; `published` plans runs whose speed is published, and
compares.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import pretrain
from experiments.pod_plan import PublishedRun
from lfm_jax.models import PRESETS, ModelConfig, RopeConfig, preset
from lfm_jax.sharding import MeshConfig

SMALL = ("nano", "micro", "mini")
_LFM2_350M_TOKENS = 28 * 10**12  # of LFM2.5-350M


def _attention_only(depth: int, **fields: Any) -> ModelConfig:
    return ModelConfig(layer_types=("full_attention",) * depth, **fields)


_164M = _attention_only(
    8, vocab_size=32_768, embed_dim=1024, num_heads=4, num_kv_heads=1, head_dim=256, mlp_dim=3072, tie_embeddings=False
)
_LLAMA_8B = _attention_only(
    32, vocab_size=128_256, embed_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336, tie_embeddings=False,
    full_rope=RopeConfig(theta=5e5),
)  # fmt: skip
_TPUCHAT = "vorushin.github.io, 2026-02-22, and github.com/vorushin/tpuchat"
_TPUCHAT_NOTES = "float32 parameters where theirs are bfloat16; feed-forward width guessed from the count"
_PUBLISHED = (
    PublishedRun(
        name="164M on one v6e", source=_TPUCHAT, model=_164M, topology="v6e:2x2", devices=1, rows=64, seq_len=2048,
        accumulation=16, tokens_per_second=433_606, notes=_TPUCHAT_NOTES,
    ),
    PublishedRun(
        name="164M on one v5e", source=_TPUCHAT, model=_164M, topology="v5e:2x2", devices=1, rows=64, seq_len=2048,
        accumulation=16, tokens_per_second=148_829, notes=_TPUCHAT_NOTES,
    ),
    PublishedRun(
        name="llama3.1-8b on 8 v6e", source="tpu-recipes, training/trillium/Llama3.1-8B-MaxText", model=_LLAMA_8B,
        topology="v6e:2x4", rows=24, seq_len=8192, remat="full", scan_layers=True, tokens_per_second=7_100,
        notes="everything is computed again where theirs offloads to the host; norms on queries and keys",
    ),
)  # fmt: skip


def _one(name: str) -> dict[str, Any]:
    recipe = pretrain.get_config(name)
    tokens = recipe.loader.batch_size * recipe.loader.seq_len
    meshes = [{}, {"data": 2 if name in SMALL else 16}, {"data": -1, "fsdp": 1, "tensor": 2}]
    if preset(name).moe is not None:
        meshes += [{"expert": 8}, {"data": -1, "fsdp": 64}]
    return {
        "presets": (name,),
        "topologies": ("v5e:2x2" if name in SMALL else "v5e:16x16",),
        "seq_lens": (recipe.loader.seq_len,),
        "batch_tokens": tokens,
        "total_tokens": _LFM2_350M_TOKENS if name == "lfm2_350m" else recipe.train.steps * tokens,
        "meshes": tuple(MeshConfig(**sizes) for sizes in meshes),
        "accumulations": (2,),
        "remats": ("dots", "full"),
        "scan_layers": (True,) if preset(name).moe is not None else (),  # else slower (docs/benchmarks/pod_plan.md)
    }


def _scale(*topologies: str) -> dict[str, Any]:
    return {
        "presets": ("lfm2_350m",), "topologies": topologies, "seq_lens_on_last": (8192, 16_384, 32_768, 65_536, 131_072),
        "tokens_per_device": 8192, "total_tokens": _LFM2_350M_TOKENS,
    }  # fmt: skip


_TABLES = {
    "all": {
        "presets": tuple(name for name in PRESETS if name not in SMALL), "topologies": ("v5e:16x16", "v5p:8x8x8", "v6e:16x16"),
        "tokens_per_device": 8192, "search": "first", "accumulations": (2,), "remats": ("dots", "full"), "scan_layers": (True,),
        "total_tokens": 10**12,
    },
    "scale": _scale("v5e:4x4", "v5e:8x8", "v5e:16x16"),
    "scale_v5p": _scale("v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x8"),
    "scale_v6e": _scale("v6e:4x4", "v6e:8x8", "v6e:16x16"),
    "published": {"presets": (), "topologies": (), "tokens_per_device": 8192, "published": _PUBLISHED},
}  # fmt: skip


def get_config(argument: str = "lfm2_350m") -> ConfigDict:
    """The plan of an architecture, or one of the tables: all, scale (of v5e), scale_v5p, scale_v6e, published."""
    name = argument or "lfm2_350m"
    settings = _TABLES[name] if name in _TABLES else _one(name)
    return ConfigDict({"experiment": "pod_plan", **settings})
