"""Eight-bit products in a feed-forward on TPUs, by the compiler's word: which numbers it multiplies, in how many cycles."""

import collections
import dataclasses
import json
import re
import sys
from typing import Any

from etils import epath

from experiments.benchmarks.processes import run_module
from experiments.benchmarks.tpu_compiler import estimated_cycles
from experiments.results import write_results
from lfm_jax.configuration import nearest
from lfm_jax.models import preset
from lfm_jax.sharding.chips import CHIPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """chips: names in `lfm_jax.sharding.chips`; presets: whose dense feed-forwards; matmuls: see `ComputeConfig`.

    rows, seq: tokens of one chip.
    """

    chips: tuple[str, ...]
    presets: tuple[str, ...]
    matmuls: tuple[str, ...] = ("plain", "int8", "fp8")
    rows: int = 2
    seq: int = 4096

    def __post_init__(self):
        known = [name for name, chip in CHIPS.items() if chip.topology]
        unknown = [name for name in self.chips if name not in known]
        if unknown:
            raise ValueError(f"chips: {unknown[0]!r} is none. {nearest(unknown[0], known)}")
        for name in self.presets:
            preset(name)  # raises where there is none


def operand_types(hlo: str) -> dict[str, int]:
    """How many products of a compiled program multiply which numbers: {"s8 x s8": 2, ...}."""
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", hlo))
    products = re.findall(r" (?:convolution|dot)\((%[\w.-]+), (%[\w.-]+)\)", hlo)
    return dict(collections.Counter(f"{types[left]} x {types[right]}" for left, right in products))


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    """The feed-forward's forward and backward pass on one chip."""
    import jax
    import jax.numpy as jnp

    from lfm_jax.models.layers import project
    from lfm_jax.sharding import aot

    model, rows, seq = preset(job["preset"]), job["rows"], job["seq"]
    device = jax.sharding.SingleDeviceSharding(aot.tpu_devices(CHIPS[job["chip"]].topology)[0])
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device)
    times = lambda x, weight: project(x, weight, matmul=job["matmul"])

    def both(x, gate, up, down, dy):
        mlp = lambda x, gate, up, down: times(jax.nn.silu(times(x, gate)) * times(x, up), down)
        y, transpose = jax.vjp(mlp, x, gate, up, down)
        return y, transpose(dy)

    embed, mlp = model.embed_dim, model.mlp_dim
    hidden, widening = array(rows, seq, embed), array(embed, mlp)
    compiled = aot.compile_for(both, (hidden, widening, widening, array(mlp, embed), hidden))
    text = compiled.as_text()
    return {
        "cycles": estimated_cycles(text), "bytes": round(compiled.cost_analysis()["bytes accessed"]),
        "products": operand_types(text),
    }  # fmt: skip


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json and the table as quantized_matmul.md."""
    from rich.progress import track

    names = [(chip, name, matmul) for chip in config.chips for name in config.presets for matmul in config.matmuls]
    rows = []
    for chip, name, matmul in track(names, description="compiling"):
        job = {"chip": chip, "preset": name, "matmul": matmul, "rows": config.rows, "seq": config.seq}
        rows.append(job | run_module(__name__, job))
    plain = {(row["chip"], row["preset"]): row["cycles"] for row in rows if row["matmul"] == "plain"}
    for row in rows:
        base = plain.get((row["chip"], row["preset"]))
        row["cycles_over_plain"] = row["cycles"] / base if base and row["cycles"] else None
    (workdir / "quantized_matmul.md").write_text(_markdown(rows))
    write_results(workdir, {"feed_forwards": rows}, config)


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| chip | feed-forward of | matmul | products | cycles | over plain | bytes |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        model = preset(row["preset"])
        products = ", ".join(f"{count} of {types}" for types, count in sorted(row["products"].items()))
        cycles = "not estimated" if row["cycles"] is None else f"{row['cycles']:,}"
        over = "" if row["cycles_over_plain"] is None else f"{row['cycles_over_plain']:.2f}"
        lines.append(
            f"| {row['chip']} | {row['preset']} ({model.embed_dim} x {model.mlp_dim}) | {row['matmul']} | {products} | {cycles} "
            f"| {over} | {row['bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(json.dumps(_compile(json.load(sys.stdin))))
