"""Mutated requests to the server: each is answered by 2xx or 4xx, the next good one is served, and no slot is left behind.

    python run.py --config=configs/benchmarks/serve_fuzz.py --workdir=workdirs/serve_fuzz

A server with a small random model on a free port; 5,000 requests by raw sockets, with damaged bytes, hostile values, fields that
nobody should accept, large and deep bodies, damaged heads and wrong lengths, and clients that leave. After each a good request,
whose ids must be those of the first. Expect `answered_5xx`, `unanswered`, `leaked` and `slots_held_at_the_end` 0, and
`next_good_served` as many as `requests`; 12 minutes on 2 busy cores.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}")
    return ConfigDict({"experiment": "benchmarks.serve_fuzz", "requests": 5000})
