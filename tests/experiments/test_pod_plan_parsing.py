"""What the planner reads from compiled programs: against closed forms, on small programs that the TPU compiler compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.pod_plan import collectives, hlo, kernels
from experiments.pod_plan.collectives import Torus
from experiments.pod_plan.estimate import estimate, hbm_bytes
from experiments.pod_plan.hlo import Program
from lfm_jax.sharding import aot
from lfm_jax.sharding.chips import CHIPS

pytest.importorskip("libtpu")
V5E = CHIPS["v5e"]
# Collectives alone, not cut into pieces of the matmuls around them.
WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@functools.cache
def square() -> Mesh:
    """Four chips of v5e in a square, two axes."""
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=aot.tpu_devices("v5e:2x2"))


def compiled(function, *arguments, options=None):
    return aot.compile_for(function, arguments, options)


def lone(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(square().devices.flat[0]))


def split(shape, *axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(square(), PartitionSpec(*axes)))


def torus(mesh=None):
    coordinates = ((0, 0, 0),) if mesh is None else tuple(tuple(device.coords) for device in mesh.devices.flat)
    return Torus(V5E, coordinates)


def no_kernels(computation, call):
    raise AssertionError(f"{call.name} is no kernel of this test")


def played(text, mesh=None):
    return estimate(Program(text), torus(mesh), no_kernels)


def trip_counts(program):
    return sorted(
        program.trip_count(computation, instruction)
        for computation in program.computations.values()
        for instruction in computation
        if instruction.opcode == "while"
    )


def matmul_chain(x, weight, steps):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weight), None), x, None, length=steps)[0]


@pytest.mark.parametrize("kind, least", [("v5e", 0.9), ("v5p", 0.9), ("v6e", 0.75)])
def test_a_matmul_chain_comes_out_near_the_peak(kind, least):
    """The compiler's cycles, through the parser and the clock: 8 matmuls of 8192 x 4096 x 4096 in bfloat16.

    0.971 of the peak on v5e, 0.969 on v5p and 0.791 on v6e with libtpu 0.0.42.1.
    """
    chip = CHIPS[kind]
    sharding = jax.sharding.SingleDeviceSharding(aot.tpu_devices(chip.topology)[0])
    arguments = (jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16, sharding=sharding) for rows in (8192, 4096))

    def chain(x, weight):
        for _ in range(8):
            x = x @ weight
        return x

    found = estimate(Program(compiled(chain, *arguments).as_text()), Torus(chip, ((0, 0, 0),)), no_kernels)
    flops = 8 * 2 * 8192 * 4096 * 4096
    assert found.flops == flops
    assert least < flops / chip.flops / found.seconds < 1.02
    assert set(operation for operation, _ in found.operations) <= {"matmul", "copy", "waiting for HBM"}


def test_loops_count_as_often_as_they_run_also_inside_each_other():
    def nested(x, weight):
        outer = lambda x, _: (matmul_chain(x, weight, 7) + 1, None)
        return jax.lax.scan(outer, x, None, length=5)[0]

    text = compiled(nested, lone((512, 512)), lone((512, 512))).as_text()
    assert trip_counts(Program(text)) == [5, 7]
    assert played(text).flops == 5 * 7 * 2 * 512**3
    once = played(compiled(lambda x, weight: matmul_chain(x, weight, 1), lone((512, 512)), lone((512, 512))).as_text())
    assert played(text).seconds > 0.5 * 35 * once.seconds


def test_a_loop_that_ends_on_data_is_reported():
    def until(x, weight):
        return jax.lax.while_loop(lambda x: jnp.max(x) < 1, lambda x: x @ weight, x)

    found = played(compiled(until, lone((256, 256)), lone((256, 256))).as_text())
    assert found.unknown_loops == 1
    assert found.flops == 2 * 256**3


@pytest.mark.parametrize(
    "start, step, limit, direction, passes",
    [(0, 1, 7, "LT", 7), (0, 2, 7, "LT", 4), (1, 1, 7, "LE", 7), (7, -1, 0, "GT", 7), (7, -2, 0, "GE", 4), (0, 1, 7, "NE", 7),
     (9, 1, 7, "LT", 0), (0, -1, 7, "LT", None), (0, 0, 7, "LT", None)],
)  # fmt: skip
def test_passes_of_a_counter(start, step, limit, direction, passes):
    assert hlo._passes(start, step, limit, direction) == passes


def test_flops_agree_with_the_compilers_own_count():
    """Batched, transposed, with a dilated and padded convolution: the compiler rewrites all of them; two judges, one program."""

    def several(x, y, image, kernel):
        attention = jnp.einsum("bqhd,bkhd->bhqk", x, x)
        back = jnp.einsum("bhqk,bkhd->bqhd", attention, x)
        convolved = jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", rhs_dilation=(2, 1))
        return back @ y, convolved

    program = compiled(
        several, lone((2, 256, 4, 64)), lone((64, 128)), lone((2, 8, 33, 33)), lone((16, 8, 3, 3))
    )  # fmt: skip
    found = played(program.as_text())
    matmuls = 2 * (2 * 4 * 256 * 256 * 64) * 2 + 2 * 2 * 256 * 4 * 64 * 128
    assert matmuls < found.flops
    assert found.flops == pytest.approx(program.cost_analysis()["flops"], rel=0.05)


def test_bytes_of_an_elementwise_program_are_its_inputs_and_outputs():
    text = compiled(lambda a, b: a + b, lone((4096, 8192), jnp.float32), lone((4096, 8192), jnp.float32)).as_text()
    program = Program(text)
    assert sum(hbm_bytes(program, program.entry, each) for each in program.entry) == 3 * 4 * 4096 * 8192
    assert played(text).seconds >= 3 * 4 * 4096 * 8192 / V5E.hbm_bytes


def test_a_slice_written_in_place_counts_its_own_bytes():
    def write(table, row):
        return jax.lax.dynamic_update_slice(table, row, (jnp.int32(5), jnp.int32(0)))

    arguments = lone((65536, 1024), jnp.float32), lone((8, 1024), jnp.float32)
    text = jax.jit(write, donate_argnums=0).trace(*arguments).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert played(text).hbm_bytes < 10 * 4 * 8 * 1024


@pytest.mark.parametrize(
    "kind, arguments, result, sent",
    [
        ("all-gather", (("x", None),), (None, None), 1 / 2),
        ("all-gather", ((("x", "y"), None),), (None, None), 3 / 4),
        ("collective-permute", ((("x", "y"), None),), None, 1 / 4),
    ],
)
def test_bytes_of_collectives(kind, arguments, result, sent):
    """Of a 4 MiB array: what each device sends, by the share of the array."""
    if kind == "collective-permute":
        shift = lambda x: jax.lax.ppermute(x, ("x", "y"), [(i, (i + 1) % 4) for i in range(4)])
        spec = PartitionSpec(*arguments[0])
        function = jax.shard_map(shift, mesh=square(), in_specs=spec, out_specs=spec)
    else:
        function = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(square(), PartitionSpec(*result)))
    found = played(compiled(function, split((1024, 2048), *arguments[0])).as_text(), square())
    assert found.collectives.keys() == {kind}
    assert found.collectives[kind]["bytes"] == pytest.approx(sent * 2 * 1024 * 2048)
    assert found.collectives[kind]["number"] == 1
    assert found.collectives[kind]["waiting_seconds"] == pytest.approx(found.collectives[kind]["seconds"], rel=0.01)


def test_bytes_of_a_sum_over_devices():
    """x @ y with the contraction split in four: an all-reduce, or a reduce-scatter and an all-gather, of the product."""
    text = compiled(lambda x, y: x @ y, split((512, 1024), None, ("x", "y")), split((1024, 512), ("x", "y"), None)).as_text()
    found = played(text, square())
    assert sum(each["bytes"] for each in found.collectives.values()) == pytest.approx(2 * 3 / 4 * 512 * 512 * 2, rel=0.01)


def test_work_between_start_and_done_hides_a_collective():
    """Weights that are gathered for a chain of matmuls: most of the links' time passes beside the matmuls, and none in vain."""

    def chain(x, weights):
        for weight in weights:
            x = x @ weight
        return x

    weights = [split((2048, 2048), ("x", "y"), None) for _ in range(6)]
    found = played(compiled(chain, split((8192, 2048), ("x", "y"), None), weights, options=WHOLE).as_text(), square())
    (gathers,) = found.collectives.values()
    assert gathers["number"] == 6
    assert gathers["bytes"] == pytest.approx(6 * 3 / 4 * 2 * 2048 * 2048)
    assert gathers["waiting_seconds"] < 0.5 * gathers["seconds"]
    waits = sum(seconds for (operation, _), seconds in found.operations.items() if operation == "waiting for all-gather")
    assert waits == pytest.approx(gathers["waiting_seconds"])
    assert sum(found.operations.values()) == pytest.approx(found.seconds)


def test_a_kernel_is_read_from_its_body():
    from lfm_jax.kernels import short_conv_tpu

    batch, seq, channels, width = 2, 1024, 512, 3
    arguments = lone((3, batch, seq, channels)), lone((width, channels), jnp.float32), None, None, None
    program = Program(compiled(short_conv_tpu.forward, *arguments).as_text())
    ((computation, call),) = [
        (computation, each) for computation in program.computations.values() for each in computation if kernels.is_kernel(each)
    ]
    unreadable = call.rest.replace('"body":"', '"body":"AAAA')
    assert kernels.read_kernel(dataclasses.replace(call, rest=unreadable)).windows == ()
    kernel = kernels.read_kernel(call)
    plan = short_conv_tpu.make_plan(arguments[0], width, biased=False, segmented=False, backward=False)
    assert kernel.name == "short_conv"
    assert kernel.grid == plan.grid
    assert [loop.trips for loop in kernel.loops] == [plan.block_time // plan.chunk_time]
    planes = 4 * 2 * batch * seq * channels
    kept = sum(each.bytes for each in call.arrays if each.space == hlo.VMEM)
    assert planes - kept - 3 * planes / 4 <= kernels.memory_bytes(kernel, computation, call) < 1.02 * planes
    measured = kernels.measure(computation, call, V5E, 120)
    cycles, matched = kernels.compute_cycles(kernel, measured)
    assert matched
    assert 0 < cycles / V5E.clock_hz < 4 * planes / V5E.hbm_bytes


def test_bundles_are_a_tree_of_loops():
    text = """
     0   :  { %s0 = sld [smem:[#allocation0]] } /* Start region 0 */
   0x1 LB: > { %s1 = sand.u32 1023, %s0 }
   0x2   :  {}
   0x3 LB: >> { %v1 = vld [vmem:[%s1]] }
   0x4   :  {}
   0x5   : >> { %v3 = vmul.f32 %v1, %v1 }
   0x6   : > { %s4 = smov 1 }
   0x7 LB: >> { %v1 = vld [vmem:[%s1]] }
   0x8   :  { %s3 = smov 0 }
   0x9   : > { %s3 = smov 0 }
"""
    inner = kernels.Bundles(3, ()), kernels.Bundles(1, ())
    assert kernels.parse_bundles(text) == kernels.Bundles(2, (kernels.Bundles(4, inner),))
    kernel = kernels.Kernel("a", (5, 2), (True, False), False, 0, (), (kernels.Loop(10, ()), kernels.Loop(20, ())))
    assert kernels.compute_cycles(kernel, kernels.parse_bundles(text)) == (2 + 10 * (4 + 30 + 20), True)
    assert kernels.compute_cycles(kernel, kernels.parse_bundles(text), cores=2) == (2 + 6 * (4 + 30 + 20), True)
    longest = 2 + 10 * (4 + 20 * 3 + 20)
    unmatched = kernels.Kernel("a", (5, 2), (True, False), False, 0, (), (kernels.Loop(20, ()),))
    assert kernels.compute_cycles(unmatched, kernels.parse_bundles(text)) == (longest, False)


def test_a_grouped_matmul_reads_each_expert_once():
    """XLA's ragged dot: a grid as long as data says, 8 groups of 2,048 rows."""
    rows, experts, width, out = 2048, 8, 256, 512
    program = Program(
        compiled(jax.lax.ragged_dot, lone((rows, width)), lone((experts, width, out)), lone((experts,), jnp.int32)).as_text()
    )
    calls = ((computation, each) for computation in program.computations.values() for each in computation)
    moved = {}
    for computation, call in calls:
        if not kernels.is_kernel(call):
            continue
        kernel = kernels.read_kernel(call)
        moved[kernel.ragged] = kernels.memory_bytes(kernel, computation, call)
        if kernel.ragged:
            assert rows / 128 <= kernel.steps <= (rows / 128 + experts) * (out / 128)
    assert moved[True] <= 2 * (rows * (width * (out / 128) + out) + experts * width * out)


def test_our_grouped_matmul_is_charged_for_the_chunks_that_it_takes():
    """8 groups in 2,048 rows: 12 visits of at most 4 chunks; 16 chunks, and 8 that two groups share."""
    from lfm_jax.kernels import grouped_matmul_tpu

    shapes = lone((2048, 256)), (lone((8, 256, 512)),), lone((8,), jnp.int32)
    program = Program(compiled(grouped_matmul_tpu.forward, *shapes).as_text())
    ((computation, call),) = [
        (computation, each) for computation in program.computations.values() for each in computation if kernels.is_kernel(each)
    ]
    kernel = kernels.read_kernel(call)
    assert (kernel.name, kernel.grid, kernel.ragged, kernel.row_blocks) == ("grouped_matmul", (2, 12), True, 4)
    assert [loop.trips for loop in kernel.loops] == [4, 4]
    assert kernels.live_share(kernel) == (16 + 8) / 48
    assert kernels.memory_bytes(kernel, computation, call) == 2 * (2 * 2048 * 256 + 8 * 256 * 512 + 2048 * 512)


def test_sums_of_which_a_slice_is_kept_and_ragged_exchanges_send_what_they_must():
    """On 4 devices in a row of 2 x 2: 3 of 4 parts leave; of the two sides of an exchange, the smaller one."""
    torus = collectives.Torus(CHIPS["v5p"], ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)))
    lines = ["%x = bf16[64,128]{1,0} parameter(0)", "%room = bf16[256,128]{1,0} parameter(1)", "%n = s32[4]{0} parameter(2)"]
    names = {each.name: each for each in map(hlo.parse_instruction, lines)}
    reduce = hlo.parse_instruction("%r = bf16[64,128]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add")
    for name, factor in (("all-reduce-scatter.1", 1), ("sum", 2)):
        found = collectives.measure(torus, hlo.Computation(name, names, "r"), reduce)
        assert found.sent_bytes == factor * 3 / 4 * 2 * 64 * 128
    for operands in ("%x, %room", "%room, %x"):
        exchange = hlo.parse_instruction(f"%e = bf16[1]{{0}} ragged-all-to-all({operands}, %n, %n, %n, %n), replica_groups={{}}")
        assert collectives.measure(torus, hlo.Computation("e", names, "e"), exchange).sent_bytes == 3 / 4 * 2 * 64 * 128


@pytest.mark.parametrize("window, shares", [(None, [(4 + 1) / 8] * 2), (256, [1, 1, 1])])
def test_causal_blocks_that_are_empty_cost_nothing(window, shares):
    """Two heads share keys: eight blocks of queries and four of keys, of which 20 of 32 work; a window's grid has fewer."""
    from lfm_jax.kernels import attention_tpu

    def step(query, key, value, segments):
        static = {"order": np.arange(4096), "part": 0, "window": window, "interpret": False}
        attend = lambda *arrays: attention_tpu.splash_attention(*arrays, segments, segments, **static)
        out, transpose = jax.vjp(attend, query, key, value)
        return transpose(out)

    query, key = lone((1, 4096, 2, 64)), lone((1, 4096, 1, 64))
    program = Program(compiled(step, query, key, key, lone((1, 4096), jnp.int32)).as_text())
    calls = [each for computation in program.computations.values() for each in computation if kernels.is_kernel(each)]
    found = [kernels.read_kernel(call) for call in calls]
    assert [kernels.live_share(kernel) for kernel in found] == shares
    assert kernels.live_share(kernels.Kernel("short_conv", (4, 4, 4), (False,) * 3, False, 0, (), ())) == 1


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{}", [[0, 1, 2, 3]]),
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=4,'b'=1], device_ids=([4]<=[2,2]T(1,0)) {'a'}", [[0, 2, 1, 3]]),
    ],
)
def test_replica_groups(text, groups):
    assert collectives.replica_groups(text, 4) == groups


def test_groups_are_read_from_an_instruction_whatever_follows():
    """As XLA writes it: the list of devices has commas, and attributes come behind."""
    line = (
        "%g = bf16[8,4]{1,0} all-gather(%x), replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}, "
        "dimensions={0}, use_global_device_ids=true"
    )
    text = collectives._groups_text(hlo.parse_instruction(line))
    assert collectives.replica_groups(text, 4) == [[0, 1], [2, 3]]
    plain = hlo.parse_instruction("%g = f32[4]{0} all-reduce(%x), replica_groups=[2,2]<=[4], to_apply=%add")
    assert collectives.replica_groups(collectives._groups_text(plain), 4) == [[0, 1], [2, 3]]


def test_unknown_replica_groups_are_refused():
    with pytest.raises(ValueError, match="unknown form: 'whatever'"):
        collectives.replica_groups("whatever", 4)


def test_the_torus_gives_the_bandwidth_of_its_links():
    pod = Torus(V5E, tuple((x, y, 0) for x in range(16) for y in range(16)))
    line, plane = list(range(16)), list(range(256))
    assert pod.bandwidth(line) == (2 * 50e9, 8)
    assert pod.bandwidth(plane) == (4 * 50e9, 16)
    assert pod.bandwidth([0, 1, 2, 3]) == (50e9, 3)
    assert pod.bandwidth([0, 4, 8, 12]) == (2 * 50e9 / 4, 8)  # four such groups share the ring
    assert pod.distance(0, 15) == 1 and pod.distance(0, 8) == 8
    # A ring of n devices, each sending 1/n of a byte to each: an eighth of n over one link's rate.
    assert pod.bisection(line) == pytest.approx(16 / 8 / 50e9)
    cube = Torus(CHIPS["tpu7x"], tuple((x, 0, 0) for x in range(4) for _ in range(2)))
    assert cube.bandwidth([0, 2, 4, 6])[0] == 2 * 100e9 / 2  # two devices share a chip's links
    assert cube.bandwidth(list(range(8)))[0] == 2 * 100e9
    assert cube.bandwidth([0, 1]) == (6 * 100e9, 1)
