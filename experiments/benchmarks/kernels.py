"""The kernels as they run on the device that is there: timed, and held against exact references."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from etils import epath

from experiments.benchmarks.device_rates import matmul_flops_per_second, read_bytes_per_second, seconds_of
from experiments.benchmarks.short_conv import least_bytes
from experiments.results import write_results
from lfm_jax.configuration import ConfigError
from lfm_jax.models import ModelConfig, preset

if TYPE_CHECKING:
    import jax

ATTENTION = ("splash", "cudnn", "rows", "reference", "pallas")
SHORT_CONV = ("pallas", "reference")
GROUPED_MATMUL = ("pallas", "blocks", "reference")
_EXACT = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """platform: what must be there. presets: whose shapes are taken, equal ones once.

    tokens: of a batch; seqs: lengths of its rows.
    experts: of grouped matmuls, each (experts, of them for each token, width of a token, width of an expert); expert_tokens:
      that meet them, few, since XLA may multiply each with every expert.
    attention, short_conv, grouped_matmul: implementations that take turns, the first of them what ratios are of. Of attention,
      "pallas" is jax's own kernel for GPUs; the others are what models can be told.
    document_length: of packed rows; rows of one document are timed as well.
    longest_reference: length from which attention's error stays unknown, since XLA would keep all scores.
    matmul: rows and columns of the matrices, read_bytes: of the matrix, by which the device's rates are measured.
    least_seconds: for which each program is timed.
    """

    platform: Literal["cpu", "gpu", "tpu"]
    presets: tuple[str, ...]
    tokens: int
    seqs: tuple[int, ...]
    attention: tuple[str, ...]
    short_conv: tuple[str, ...]
    grouped_matmul: tuple[str, ...]
    experts: tuple[tuple[int, int, int, int], ...]
    expert_tokens: int
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    document_length: int = 1024
    longest_reference: int = 16_384
    matmul: int = 8192
    read_bytes: int = 2**31
    least_seconds: float = 0.3

    def __post_init__(self):
        for name in self.presets:
            preset(name)  # raises where there is none
        for kernel, known in (("attention", ATTENTION), ("short_conv", SHORT_CONV), ("grouped_matmul", GROUPED_MATMUL)):
            unknown = [name for name in getattr(self, kernel) if name not in known]
            if unknown:
                raise ValueError(f"{kernel} has {unknown[0]!r}; known are {', '.join(known)}")
        for seq in self.seqs:
            if self.tokens % seq or seq % self.document_length:
                raise ValueError(
                    f"tokens={self.tokens} must divide into rows of {seq}, and these into documents of {self.document_length}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    """A kernel at one shape.

    about: what says so in the table. inputs: drawn ones, of which there are gradients; slope: the gradient of the output.
    least: (bytes, FLOPs) of the forward and of the backward pass. make: an implementation by its name.
    compared: of inputs, outputs and gradients what is held against the reference; None: nothing is.
    """

    about: dict[str, Any]
    inputs: list["jax.Array"]
    slope: "jax.Array"
    least: list[tuple[float, float]]
    make: Callable[[str], Callable[..., "jax.Array"]]
    compared: Callable[["jax.Array"], "jax.Array"] | None


def _draw(shapes: list[tuple[int, ...]], types: list[str]) -> list["jax.Array"]:
    import jax

    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(*given) for given in zip(keys, shapes, types, strict=True)]


def _segments(rows: int, seq: int, length: int | None) -> "jax.Array | None":
    import jax.numpy as jnp

    return None if length is None else jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32) // length, (rows, seq))


def _attention(config: Config, model: ModelConfig, seq: int, length: int | None) -> _Case:
    import jax.numpy as jnp

    rows, heads, kv_heads, head_dim = config.tokens // seq, model.num_heads, model.num_kv_heads, model.head_dim
    queries, keys = (rows, seq, heads, head_dim), (rows, seq, kv_heads, head_dim)
    *inputs, slope = _draw([queries, keys, keys, queries], [config.dtype] * 4)

    def make(name: str) -> Callable[..., "jax.Array"]:
        def attend(query, key, value):
            from lfm_jax.kernels import attention

            segments, places = _segments(len(query), seq, length), jnp.arange(seq)
            mask = jnp.broadcast_to(places[:, None] >= places[None], (len(query), seq, seq))
            if segments is not None:
                mask &= segments[:, :, None] == segments[:, None, :]
            if name == "pallas":
                from jax.experimental.pallas.ops.gpu.attention import mha

                key, value = (jnp.repeat(array, heads // kv_heads, axis=2) for array in (key, value))
                return mha(query, key, value, segments, head_dim**-0.5, True)
            return attention(query, key, value, mask, segments, implementation=name)

        return attend

    # Products of queries and keys and of weights and values, within documents and below the diagonal; backward two and a half
    # times as many, since the scores are made again.
    flops = 2 * config.tokens * heads * head_dim * (length or seq)
    moved = inputs[0].nbytes + inputs[1].nbytes
    return _Case(
        about={"kernel": "attention", "shape": [rows, *queries[1:], kv_heads], "packed": length is not None},
        inputs=inputs, slope=slope, least=[(2 * moved, flops), (4 * moved, 2.5 * flops)], make=make,
        compared=(lambda array: array[:1]) if seq <= config.longest_reference else None,
    )  # fmt: skip


def _short_conv(config: Config, model: ModelConfig, seq: int, length: int | None) -> _Case:
    rows, channels, width = config.tokens // seq, model.embed_dim, model.conv_width
    shapes = [(3, rows, seq, channels), (width, channels), (rows, seq, channels)]
    *inputs, slope = _draw(shapes, [config.dtype, "float32", config.dtype])

    def make(name: str) -> Callable[..., "jax.Array"]:
        from lfm_jax.kernels import short_conv

        return lambda bcx, weight: short_conv(bcx, weight, segment_ids=_segments(rows, seq, length), implementation=name)[0]

    shape, packed = (rows, seq, channels, width), length is not None
    return _Case(
        about={"kernel": "short_conv", "shape": [*shape], "packed": packed}, inputs=inputs, slope=slope, make=make,
        least=[(least_bytes(shape, direction, packed, slope.itemsize), 0.0) for direction in ("forward", "backward")],
        compared=lambda array: array,
    )  # fmt: skip


def _grouped_matmul(config: Config, experts: tuple[int, int, int, int]) -> _Case:
    """The first product of a mixture; how many of the tokens' copies each expert gets is drawn, as uneven as that is."""
    import jax
    import jax.numpy as jnp

    groups, top_k, embed, mlp = experts
    copies = config.expert_tokens * top_k
    shapes = [(copies, embed), (groups, embed, mlp), (copies, mlp)]
    *inputs, slope = _draw(shapes, [config.dtype] * 3)
    sizes = jnp.bincount(jax.random.randint(jax.random.key(1), (copies,), 0, groups), length=groups).astype(jnp.int32)

    def make(name: str) -> Callable[..., "jax.Array"]:
        from lfm_jax.kernels import grouped_matmul

        return lambda lhs, rhs: grouped_matmul(lhs, (rhs,), sizes, implementation=name)[0]

    moved, flops = inputs[0].nbytes + inputs[1].nbytes, 2 * copies * embed * mlp
    return _Case(
        about={"kernel": "grouped_matmul", "shape": [copies, groups, embed, mlp], "packed": False}, inputs=inputs, slope=slope,
        least=[(moved + slope.nbytes, flops), (2 * moved + slope.nbytes, 2 * flops)], make=make, compared=lambda array: array,
    )  # fmt: skip


def _both(attend: Callable[..., "jax.Array"]) -> Callable[..., Any]:
    """The output, and the gradients of the inputs."""
    import jax

    def run(slope, *inputs):
        output, transpose = jax.vjp(attend, *inputs)
        return output, transpose(slope)

    return jax.jit(run)


def _exact(case: _Case) -> list["jax.Array"] | None:
    """The output and the gradients in float32, by the reference."""
    import jax

    if case.compared is None:
        return None
    wide = [case.compared(array).astype("float32") for array in (case.slope, *case.inputs)]
    with jax.default_matmul_precision("highest"):
        return jax.tree.leaves(_both(case.make(_EXACT))(*wide))


def _errors(case: _Case, computed: Any, exact: list["jax.Array"]) -> list[float]:
    """Of the output and of each gradient, |computed - exact| / |exact|."""
    import jax
    import jax.numpy as jnp

    found = [case.compared(array).astype("float32") for array in jax.tree.leaves(computed)]
    return [float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) for one, other in zip(found, exact, strict=True)]


def _rows(config: Config, case: _Case, names: tuple[str, ...], rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The figures of each implementation; of one that fails, the reason."""
    import jax

    floors = [
        max(moved / rates["read_bytes_per_second"], flops / rates["matmul_flops_per_second"]) for moved, flops in case.least
    ]
    exact = _exact(case)
    for name in names:
        row = {**case.about, "implementation": name}
        try:
            forward, both = jax.jit(case.make(name)), _both(case.make(name))
            errors = None if exact is None else _errors(case, both(case.slope, *case.inputs), exact)
            seconds = [
                statistics.median(seconds_of(forward, *case.inputs, least_seconds=config.least_seconds)),
                statistics.median(seconds_of(both, case.slope, *case.inputs, least_seconds=config.least_seconds)),
            ]
        except Exception as error:  # a kernel that a device has no program or no memory for is a result; the others go on
            yield {**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            continue
        floor = floors[0], sum(floors)
        yield {
            **row, "forward_seconds": seconds[0], "both_seconds": seconds[1], "floor_forward_seconds": floor[0],
            "floor_both_seconds": floor[1], "of_forward_floor": floor[0] / seconds[0], "of_both_floor": floor[1] / seconds[1],
            "errors": errors,
        }  # fmt: skip


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| kernel | shape | packed | implementation | forward ms | of the floor | forward and backward ms | of the floor "
        "| first / this | largest error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, float] = {}
    for row in rows:
        cells = [row["kernel"], " x ".join(str(size) for size in row["shape"]), "yes" if row["packed"] else "no"]
        case = str(cells)
        cells.append(row["implementation"])
        if "failed" in row:
            lines.append(f"| {' | '.join(cells)} | {row['failed']} | | | | | |")
            continue
        first.setdefault(case, row["both_seconds"])
        cells += [
            f"{1e3 * row['forward_seconds']:.3f}", f"{row['of_forward_floor']:.0%}", f"{1e3 * row['both_seconds']:.3f}",
            f"{row['of_both_floor']:.0%}", f"{first[case] / row['both_seconds']:.2f}",
            "" if row["errors"] is None else f"{max(row['errors']):.1e}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json, and the table as kernels.md.

    Raises:
      ConfigError: the platform is not what jax computes on.
      RuntimeError: nothing could be run.
    """
    import jax
    from rich.progress import track

    if jax.default_backend() != config.platform:
        raise ConfigError(
            f"platform={config.platform!r}, and jax computes on a {jax.default_backend()}: run it on a machine with a "
            f"{config.platform}, with the extra of that name, or give the config file the argument for this one"
        )

    rates = {
        "matmul_flops_per_second": matmul_flops_per_second(config.matmul, config.dtype),
        "read_bytes_per_second": read_bytes_per_second(config.read_bytes, config.dtype),
    }
    rows, known = [], set()
    cases = [
        (functools.partial(make, config, preset(name), seq, length), names)
        for make, names in ((_short_conv, config.short_conv), (_attention, config.attention))
        for seq in config.seqs
        for name in config.presets
        for length in (None, config.document_length)
    ]
    cases += [(functools.partial(_grouped_matmul, config, experts), config.grouped_matmul) for experts in config.experts]
    for make, names in track(cases, description="timing"):
        case = make()
        if str(case.about) in known:
            continue
        known.add(str(case.about))
        found = list(_rows(config, case, names, rates))
        print(*_markdown(found).splitlines()[2:], sep="\n", flush=True)
        rows += found
    (workdir / "kernels.md").write_text(_markdown(rows))
    write_results(workdir, {**rates, "kernels": rows}, config)
    if all("failed" in row for row in rows):
        raise RuntimeError(f"no implementation could be run; the first said {rows[0]['failed'] if rows else 'nothing'}")
