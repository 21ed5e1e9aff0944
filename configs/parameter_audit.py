"""Where the parameters of each preset and of its peers are, and what a sequence's cache costs.

    python run.py --config=configs/parameter_audit.py --workdir=workdirs/parameter_audit

Takes seconds on a laptop; nothing is allocated. Expect the published counts (lfm2_350m 354,483,968 with 18.9 % embeddings)
beside Gemma 3 270M with 62.6 % and Qwen3.5 0.8B with about 29 %. The argument names a single preset.
"""

from ml_collections import ConfigDict

from lfm_jax.models import PRESETS, preset


def get_config(argument: str = "") -> ConfigDict:
    """All presets, or the one that `argument` names."""
    if argument:
        preset(argument)
    names = (argument,) if argument else tuple(PRESETS)
    return ConfigDict({"experiment": "parameter_audit", "presets": names, "peers": True, "context": 32_768})
