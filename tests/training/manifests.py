"""Manifests of checkpoints as they were before large files had digests."""

import json
from pathlib import Path

from lfm_jax.training import checkpoint_manifest


def as_before(step: Path) -> None:
    """Makes the manifest of a step one of format 1: what is wrong in large files, only the fingerprints of arrays can tell."""
    content = json.loads((step / "manifest.json").read_bytes())
    digested = [entry for entry in content["files"].values() if entry.pop("crc32", None)]
    assert digested and content.pop("digest")
    (step / "manifest.json").write_bytes(checkpoint_manifest.encode({**content, "format": 1}))
