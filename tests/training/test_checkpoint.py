import functools
import itertools
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from manifests import as_before

from lfm_jax.training import checkpoint_manifest
from lfm_jax.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning

DATA_STATE = {"epoch": 2, "next": [17, 4], "note": "Grüße"}
CONFIG = {"model": "nano", "rate": 3e-4, "decay": None}


class State(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))])


def values(step: int) -> State:
    """Random bits of every kind of leaf that a state has, on the host."""
    rng = np.random.default_rng(step)
    bits = lambda dtype, *shape: rng.integers(0, 2 ** (8 * jnp.dtype(dtype).itemsize), shape, f"u{jnp.dtype(dtype).itemsize}")
    of = lambda dtype, *shape: bits(dtype, *shape).view(jnp.dtype(dtype))
    params = {
        # Large enough that the manifest has another digest of the file it is in.
        "embed": {"kernel": of("float32", 800, 400)},
        "layers": [{"kernel": of("bfloat16", 8, 16), "norm": of("float32", 7)}, {"kernel": of("bfloat16", 8, 16)}],
    }
    opt_state = (
        {"count": np.int32(step), "mask": rng.integers(0, 2, 9) == 1, "bits": of("uint32", 8), "none": of("float32", 0, 4)},
        None,
    )  # fmt: skip
    return State(np.int32(step), params, opt_state)


def specs(names: tuple[str, ...]):
    """How the leaves are split: the last mesh axis over what it divides, the rest is replicated."""

    def spec(leaf: np.ndarray) -> PartitionSpec:
        return PartitionSpec(names[-1]) if leaf.ndim and leaf.shape[0] and leaf.shape[0] % 8 == 0 else PartitionSpec()

    return spec


def placed(state: Any, shape: tuple[int, ...] = (8,), names: tuple[str, ...] = ("fsdp",)) -> Any:
    mesh, spec = mesh_of(shape, names), specs(names)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(np.asarray(leaf)))), state)


def abstract(state: Any, shape: tuple[int, ...] = (8,), names: tuple[str, ...] = ("fsdp",)) -> Any:
    of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return jax.tree.map(of, placed(state, shape, names))


def assert_bits(state: Any, expected: Any) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == wanted.dtype and leaf.shape == wanted.shape
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(placed(values(step)), data_state={**DATA_STATE, "step": step}, config=CONFIG)
    checkpoints.wait()


@functools.cache
def wanted() -> State:
    return abstract(values(0))


def restore(folder: Path):
    """What a new process would do; beside it the warnings, of which there may be none but ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = Checkpoints(folder).restore(wanted())
    assert all(issubclass(warning.category, CheckpointWarning) for warning in caught), caught
    return restored, [str(warning.message) for warning in caught]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage_data(step: Path) -> None:
    """Flips a bit of the stored values of the large array."""
    piece = values(int(step.name)).params["embed"]["kernel"][0, 5:13].tobytes()
    (file,) = (file for file in files(step / "state") if piece in file.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(piece) + 5] ^= 16
    file.write_bytes(data)


def test_a_relative_folder_is_of_the_directory_it_was_named_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run/checkpoints")
    save(checkpoints, 1)
    monkeypatch.chdir("/")
    assert checkpoints.steps() == [1]
    assert restore(tmp_path / "run" / "checkpoints")[0].step == 1
    assert Checkpoints("gs://bucket/run")._folder == epath.Path("gs://bucket/run")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    save(Checkpoints(folder), 100, 200)
    return folder


@pytest.fixture
def folder(two_steps, tmp_path) -> Path:
    """A copy of its own, with steps 100 and 200."""
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def test_a_round_trip_is_exact_to_the_bit(two_steps):
    restored, told = restore(two_steps)
    assert_bits(restored.state, values(200))
    assert restored.step == 200 and restored.config == CONFIG and restored.data_state == {**DATA_STATE, "step": 200}
    assert Checkpoints(two_steps).steps() == [100, 200] and told == []


def test_the_data_state_is_that_of_the_call(tmp_path):
    """An iterator may give away a dict that it goes on to change."""
    checkpoints, data_state = Checkpoints(tmp_path), {"next": [3]}
    checkpoints.save(placed(values(1)), data_state=data_state, config={"shape": (2, 4)})
    data_state["next"][0] = 4
    checkpoints.wait()
    restored, _ = restore(tmp_path)
    assert restored.data_state == {"next": [3]} and restored.config == {"shape": [2, 4]}


def test_there_is_none_in_a_folder_that_is_not_there_or_empty(tmp_path):
    assert restore(tmp_path / "none") == (None, []) and Checkpoints(tmp_path / "none").steps() == []
    assert restore(tmp_path) == (None, [])


def test_the_manifest_says_what_is_there_and_is_the_last_file_written(two_steps):
    manifest = json.loads((two_steps / "00000200" / "manifest.json").read_text())
    assert manifest["step"] == 200 and manifest["config"] == CONFIG and {"jax", "orbax-checkpoint"} <= set(manifest["versions"])
    leaf = manifest["leaves"]["params.layers.1.kernel"]
    assert leaf["shape"] == [8, 16] and leaf["dtype"] == "bfloat16" and len(leaf["fingerprint"]) == 16
    assert max(files(two_steps / "00000200"), key=lambda file: file.stat().st_mtime_ns).name == "manifest.json"


@pytest.mark.parametrize(
    ("shape", "names"), [((2, 4), ("data", "fsdp")), ((4, 2), ("fsdp", "data")), ((1,), ("fsdp",)), ((3,), ("data",))], ids=str
)
def test_restore_other_device_count_and_numpy(two_steps, shape, names):
    wanted = abstract(values(0), shape, names) if shape != (3,) else jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh_of(shape, names), PartitionSpec())),
        values(0),
    )  # fmt: skip
    restored = Checkpoints(two_steps).restore(wanted)
    assert_bits(restored.state, values(200))
    for leaf, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == want.sharding
    assert_bits(jax.tree.map(np.asarray, Checkpoints(two_steps).restore(values(0)).state), values(200))  # wanted as NumPy arrays


def test_without_shardings_it_goes_to_the_first_device(two_steps):
    restored = Checkpoints(two_steps).restore(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, values(0))))
    assert_bits(restored.state, values(200))
    assert {leaf.device for leaf in jax.tree.leaves(restored.state)} == {jax.devices()[0]}


def test_a_part_is_restored_and_verified_alone(folder):
    wanted = {"params": abstract(values(0).params)}
    restored = Checkpoints(folder).restore(wanted, partial=True)
    assert_bits(restored.state, {"params": values(200).params})
    assert restored.step == 200 and restored.data_state["step"] == 200
    damage_data(folder / "00000200")
    as_before(folder / "00000200")
    with pytest.warns(
        CheckpointWarning, match="00000200 is damaged and not used: params.embed.kernel in state/ has not the values"
    ):
        assert_bits(Checkpoints(folder).restore(wanted, partial=True).state, {"params": values(100).params})


def test_leaves_are_safe_from_donation_right_after_save(tmp_path):
    """The next step overwrites the arrays as soon as `save` returns, while everything else goes on behind it."""
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf ^ True if leaf.dtype == bool else -leaf, state), donate_argnums=0
    )
    overwrite(placed(values(3)))
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        state = placed(values(step))
        checkpoints.save(state, data_state={}, config={})
        after = overwrite(state)
        for leaf in jax.tree.leaves(state):
            leaf.is_deleted() or leaf.delete()
        jax.block_until_ready(after)
    checkpoints.wait()
    for step in (5, 4, 3):
        restored, told = restore(tmp_path)
        assert_bits(restored.state, values(step))
        assert restored.step == step and told == []
        shutil.rmtree(tmp_path / f"{step:08d}")


def damages(folder: Path, count: int, seed: int):
    """(what, file) of random single-bit flips (three of four) and truncations in all files of a folder; each is undone."""
    rng = np.random.default_rng(seed)
    originals = {file: data for file in files(folder) if (data := file.read_bytes())}
    for number in range(count):
        file = list(originals)[rng.integers(len(originals))]
        data = bytearray(originals[file])
        if number % 4 == 3:
            del data[(size := int(rng.integers(len(data)))) :]
            what = f"{file.name} cut to {size} bytes"
        else:
            place, bit = int(rng.integers(len(data))), int(rng.integers(8))
            data[place] ^= 1 << bit
            what = f"{file.name} byte {place} bit {bit} flipped"
        file.write_bytes(data)
        yield what, file
        file.write_bytes(originals[file])


def detected(folder: Path, what: str) -> bool:
    """Damage to step 200 is told and step 100 used; anything else is an error, unless nothing was noticed."""
    restored, told = restore(folder)
    assert restored.step in (100, 200), what
    assert_bits(restored.state, values(restored.step))
    assert restored.config == CONFIG and restored.data_state == {**DATA_STATE, "step": restored.step}, what
    if restored.step == 100:
        assert len(told) == 1 and "00000200 is damaged and not used: " in told[0], what
    else:
        assert told == [], what
    return restored.step == 100


def test_random_flips_and_truncations_never_give_wrong_values(folder):
    """All damage is noticed, where nothing reads the bit as well."""
    for what, _ in damages(folder / "00000200", 120, seed=0):
        assert detected(folder, what), what
    restored, told = restore(folder)
    assert restored.step == 200 and told == []


def test_every_bit_of_the_manifest_counts(tmp_path):
    """And every place to cut it short."""
    folder = epath.Path(tmp_path)
    (folder / "state").mkdir()
    checkpoint_manifest.commit(folder, {"step": 200, "leaves": {"step": {"dtype": "int32"}}, "data_state": {"x": [1.5, None]}})
    file = folder / "manifest.json"
    original = file.read_bytes()
    assert checkpoint_manifest.read(folder, 200)[1] is None
    for place, bit in itertools.product(range(len(original)), range(8)):
        data = bytearray(original)
        data[place] ^= 1 << bit
        file.write_bytes(data)
        assert checkpoint_manifest.read(folder, 200)[0] is None
    for size in range(len(original)):
        file.write_bytes(original[:size])
        assert checkpoint_manifest.read(folder, 200)[0] is None


@pytest.mark.parametrize("digests", [True, False])
def test_a_value_changed_on_disk_is_named(digests, folder):
    """By the file that it is in or, where the manifest has no digest of that, or it was wrong before, by the array."""
    damage_data(folder / "00000200")
    text = r"state/[\w/.]* is not as it was written: its crc32 does not fit"
    if not digests:
        as_before(folder / "00000200")
        text = r"params.embed.kernel in state/ has not the values that were saved \(1 of 9 arrays\)"
    restored, (told,) = restore(folder)
    assert restored.step == 100
    assert re.fullmatch(rf"{folder}/00000200 is damaged and not used: {text}", told)


def test_steps_of_the_format_before_are_read(folder):
    as_before(folder / "00000200")
    restored, told = restore(folder)
    assert_bits(restored.state, values(200))
    assert restored.step == 200 and told == []


def test_each_deleted_file_is_noticed_or_not_needed(folder):
    step = folder / "00000200"
    for file in files(step):
        data = file.read_bytes()
        file.unlink()
        if file.name == "manifest.json":
            restored, told = restore(folder)
            assert restored.step == 100
            assert told == [f"{step} is not used: it has no manifest.json, so its save did not come to an end"]
        else:
            detected(folder, f"{file} deleted")
        file.write_bytes(data)


def test_an_emptied_manifest_is_damage(folder):
    (folder / "00000200" / "manifest.json").write_bytes(b"")
    assert detected(folder, "emptied manifest")


def test_a_manifest_of_another_step_is_damage(folder):
    shutil.copy(folder / "00000100" / "manifest.json", folder / "00000200")
    restored, (text,) = restore(folder)
    assert restored.step == 100 and "manifest.json is not as it was written for this step: its digest does not fit" in text


def test_an_empty_folder_with_a_number_is_no_checkpoint(folder):
    (folder / "00000999").mkdir()
    (folder / "12").mkdir()
    (folder / "notes").write_text("mine")
    restored, told = restore(folder)
    assert restored.step == 200 and Checkpoints(folder).steps() == [100, 200]
    assert told == [f"{folder}/00000999 is not used: it has no manifest.json, so its save did not come to an end"]


def test_all_damaged_raises_and_only_unfinished_is_none(folder):
    for step in ("00000100", "00000200"):
        (folder / step / "manifest.json").write_bytes(b"{}")
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match="none of the checkpoints in .*step 200: .*; step 100: "),
    ):
        Checkpoints(folder).restore(wanted())
    for step in ("00000100", "00000200"):
        (folder / step / "manifest.json").unlink()
    restored, told = restore(folder)
    assert restored is None and len(told) == 2


def changed(state: State, **params) -> State:
    return abstract(state._replace(params={**state.params, **params}))


def without(state: State) -> State:
    return abstract(state._replace(params={"embed": state.params["embed"]}))


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (lambda s: changed(s, embed={"kernel": np.zeros((800, 401), np.float32)}),
         r"params.embed.kernel is float32 \[800, 400\] in .*00000200, and float32 \[800, 401\] is wanted. It is of another"),
        (lambda s: changed(s, embed={"kernel": np.zeros((800, 400), jnp.bfloat16)}),
         r"params.embed.kernel is float32 \[800, 400\] in .*, and bfloat16 \[800, 400\] is wanted"),
        (lambda s: changed(s, head=np.zeros(3, np.float32)), r"00000200 has no array params.head, which is wanted \(1 such\)"),
        (without, r"00000200 has an array params.layers.0.kernel, which is not wanted \(3 such\)"),
    ],
)  # fmt: skip
def test_another_tree_shape_or_dtype_is_the_users_error_and_no_damage(two_steps, wanted, text):
    with pytest.raises(ValueError, match=text):
        Checkpoints(two_steps).restore(wanted(values(0)))


def test_a_newer_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_manifest, "_READ", (1,))
    with pytest.raises(ValueError, match=r"00000200/manifest.json has format 2, this code reads 2"):
        Checkpoints(folder).restore(wanted())


def test_keep_n_and_keep_every(tmp_path):
    save(Checkpoints(tmp_path, keep=2, keep_every=20), *range(5, 50, 5))
    assert sorted(int(step.name) for step in tmp_path.iterdir()) == [20, 40, 45]


def test_a_damaged_step_counts_for_nothing_and_is_written_anew(folder):
    """With the damaged one counted among the newest, keep=1 would leave nothing that can be restored. The verified one stays."""
    damage_data(folder / "00000200")
    checkpoints = Checkpoints(folder, keep=1)
    with pytest.warns(CheckpointWarning, match="00000200 is damaged"):
        assert checkpoints.restore(abstract(values(0))).step == 100
    save(checkpoints, 150)
    assert checkpoints.steps() == [100, 150, 200]
    restored, told = restore(folder)
    assert restored.step == 150 and len(told) == 1
    save(checkpoints, 200)
    assert checkpoints.steps() == [100, 200]
    restored, told = restore(folder)
    assert restored.step == 200 and told == []
    assert_bits(restored.state, values(200))


def test_a_damaged_step_goes_once_a_newer_one_is_there(folder):
    damage_data(folder / "00000200")
    checkpoints = Checkpoints(folder)
    with pytest.warns(CheckpointWarning, match="00000200 is damaged"):
        checkpoints.restore(wanted())
    save(checkpoints, 300)
    assert checkpoints.steps() == [100, 300]


def test_a_step_is_written_once(folder):
    with pytest.raises(ValueError, match=r"step 200 is in .*checkpoints already; remove it there"):
        save(Checkpoints(folder), 200)


def test_unfinished_steps_before_the_newest_go_with_the_next_save_and_nothing_else(folder):
    for name in ("00000150", "00000160", "00000170", "00000250", "00000300"):
        (folder / name / "state.orbax-checkpoint-tmp").mkdir(parents=True)
        (folder / name / "manifest.json.part").write_text("half")
    (folder / "00000160" / "mine.txt").write_text("kept")
    (folder / "150").mkdir()
    restore(folder)
    assert (folder / "00000150").exists()
    save(Checkpoints(folder), 250)
    assert sorted(path.name for path in folder.iterdir()) == ["00000100", "00000160", "00000200", "00000250", "00000300", "150"]
    assert [path.name for path in (folder / "00000160").iterdir()] == ["mine.txt"]
    assert restore(folder)[0].step == 250


@pytest.mark.parametrize("data_state", [{"x": float("nan")}, {"x": np.ones(2)}, {"x": {1, 2}}], ids=str)
def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path, data_state):
    with pytest.raises(ValueError, match="data_state, loop_state, config and score must be JSON"):
        Checkpoints(tmp_path).save(placed(values(1)), data_state=data_state, config={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["keep", "keep_every"])
def test_keep_must_be_positive(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        Checkpoints(tmp_path, **{field: 0})
