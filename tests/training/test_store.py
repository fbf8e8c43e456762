import json
import resource
import shutil
import signal
import sys
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm.errors import CheckpointError, StorageError
from jaxldm.files import folder_written_whole, write_atomically
from jaxldm.training import store as training_store
from jaxldm.training.store import TrainingStore


def tree(seed=0):
    key = jax.random.key(seed)
    return {
        "w": jax.random.normal(key, (20, 3)),
        "low": jax.random.normal(key, (4,), jnp.bfloat16),
        "none": None,
        "step": jnp.int32(seed),
        "key": key,
        "nested": [jnp.full((2,), seed, jnp.uint32)],
    }


def plain(state):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), state)


def store_with(folder, steps, keep=3):
    with TrainingStore(folder, keep) as store:
        for step in steps:
            store.save(step, tree(step))
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return store_with(tmp_path_factory.mktemp("store") / "checkpoints", (1, 2, 3))


@pytest.fixture
def copy_of_three(three, tmp_path):
    return shutil.copytree(three, tmp_path / "checkpoints")


def test_round_trip_is_bit_exact(three):
    with TrainingStore(three) as store:
        assert store.steps() == [1, 2, 3]
        step, state = store.restore_latest(tree(0))
    assert step == 3
    chex.assert_trees_all_equal(plain(state), plain(tree(3)))
    chex.assert_trees_all_equal_dtypes(plain(state), plain(tree(3)))
    assert float(jax.random.normal(state["key"])) == float(jax.random.normal(jax.random.key(3)))


def test_plain_orbax_reads_it(three):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(three / "2" / "state")["w"], tree(2)["w"])


def test_only_the_newest_are_kept_and_leftovers_of_a_kill_are_cleared(tmp_path):
    (tmp_path / "checkpoints" / ".2.tmp").mkdir(parents=True)
    store_with(tmp_path / "checkpoints", (1, 2, 10), keep=2)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["10", "2"]


def test_the_saved_state_is_the_one_at_the_call(tmp_path):
    """Although its memory goes at once to the next train step, while the file is still being written."""
    step = jax.jit(lambda x: x * 0 + 7, donate_argnums=0)
    x = jnp.arange(1_000_000, dtype=jnp.float32)
    with TrainingStore(tmp_path) as store:
        store.save(1, {"x": x})
        for _ in range(3):
            x = step(x)
        jax.block_until_ready(x)
        np.testing.assert_array_equal(store.restore_latest({"x": x}).state["x"], np.arange(1_000_000))


def harm_delete(file):
    file.unlink()


def harm_truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def harm_flip(file):
    content = bytearray(file.read_bytes() or b"?")
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [harm_delete, harm_truncate, harm_flip])
@pytest.mark.parametrize(
    "pattern", ["manifest.json", "state/manifest.ocdbt", "state/_METADATA", "state/ocdbt*/d/*"]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(copy_of_three, harm, pattern):
    harm(max((copy_of_three / "3").glob(pattern), key=lambda file: file.stat().st_size))
    said = []
    with TrainingStore(copy_of_three) as store:
        step, state = store.restore_latest(tree(0), said.append)
        assert step == 2 and store.steps() == [1, 2]
        chex.assert_trees_all_equal(plain(state), plain(tree(2)))
        assert len(said) == 1 and "step 3 is damaged" in said[0] and "\n" not in said[0]
        assert (copy_of_three / "3.damaged").is_dir()
        store.save(3, tree(3))
        assert store.restore_latest(tree(0)).step == 3


def test_any_flipped_bit_is_noticed(copy_of_three):
    """Of each byte of the manifest one, in turn; of the other files, at random."""
    folder = copy_of_three / "3"
    numbers = np.random.default_rng(0)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        count = len(content) if file.name == "manifest.json" else min(20, len(content))
        for place in numbers.choice(len(content), count, replace=False):
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            file.write_bytes(flipped)
            assert not training_store._is_whole(folder, 3), (file.name, place)
        file.write_bytes(content)
    assert training_store._is_whole(folder, 3)
    with TrainingStore(copy_of_three) as store:
        assert store.has_whole()
        (copy_of_three / "3").rename(copy_of_three / "4")  # whole, and of another step
        said = []
        assert store.restore_latest(tree(0), said.append).step == 2 and "is of step 3" in said[0]


def test_a_checkpoint_of_a_version_that_sealed_no_manifest_still_loads(copy_of_three):
    manifest = copy_of_three / "3" / "manifest.json"
    entries = json.loads(manifest.read_text())
    del entries["crc32"]
    manifest.write_text(json.dumps(entries, indent=1))
    with TrainingStore(copy_of_three) as store:
        assert store.restore_latest(tree(0)).step == 3
        for name, value in (("layout", 3), ("files", {"a": 3}), ("layout", {"w": []}), ("files", None)):
            manifest.write_text(json.dumps(entries | {name: value}))
            assert not training_store._is_whole(copy_of_three / "3", 3)


def test_when_all_are_damaged_the_stage_begins_again_and_says_so(copy_of_three):
    for step in (1, 2, 3):
        shutil.rmtree(copy_of_three / str(step) / "state")
    said = []
    with TrainingStore(copy_of_three) as store:
        assert store.restore_latest(tree(0), said.append) is None
    assert len(said) == 4 and "begins again" in said[-1]


def test_the_checkpoint_of_another_model_is_refused_by_name_and_shape(three):
    with TrainingStore(three) as store:
        for change, words in (
            ({"w": jnp.zeros((20, 4))}, r"'w' is float32 \[20, 3\] in it and float32 \[20, 4\] now"),
            ({"w": jnp.zeros((20, 3), jnp.int32)}, r"'w' is float32 .* int32"),
            ({"extra": jnp.zeros(1)}, "'extra' is absent in it and float32"),
        ):
            with pytest.raises(CheckpointError, match=words):
                store.restore_latest({**tree(0), **change})
        assert store.steps() == [1, 2, 3]


def test_a_checkpoint_of_another_format_is_refused_in_one_line(copy_of_three):
    """Version 0.1 had the parameters as one vector, and no format in its manifest."""
    manifest = copy_of_three / "3" / "manifest.json"
    entries = json.loads(manifest.read_text())
    del entries["format"], entries["crc32"]
    manifest.write_text(json.dumps(entries))
    with TrainingStore(copy_of_three) as store:
        with pytest.raises(CheckpointError, match="format 1, this version reads 2: finish the run") as raised:
            store.restore_latest(tree(0))
        assert "\n" not in str(raised.value) and store.steps() == [1, 2, 3]


def test_a_disk_without_room_is_one_line_and_the_last_checkpoint_stays(copy_of_three, monkeypatch):
    with TrainingStore(copy_of_three) as store:
        with monkeypatch.context() as patch:
            patch.setattr(
                training_store.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0)
            )
            with pytest.raises(StorageError, match=r"disk full.*the checkpoint of step 3 is whole") as raised:
                store.save(4, tree(4))
        assert "\n" not in str(raised.value)
        assert store.restore_latest(tree(0)).step == 3


@pytest.mark.parametrize("size", [100_000, 1_100_000], ids=["before Orbax", "inside Orbax"])
def test_a_write_that_fails_is_one_line_and_the_last_checkpoint_stays(copy_of_three, monkeypatch, size):
    """The operating system itself refuses: no file of this process may grow past `size`."""
    state = {"x": jax.random.normal(jax.random.key(0), (1_000_000,))}
    if size > 1_000_000:
        monkeypatch.setattr(training_store, "_claim_room", lambda file, size: None)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    try:
        with TrainingStore(copy_of_three) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            store.save(4, state)
            with pytest.raises(
                StorageError, match=r"cannot write .*4: .*the checkpoint of step 3 is whole"
            ) as raised:
                store.wait()
            assert "\n" not in str(raised.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(entry.name for entry in copy_of_three.iterdir()) == ["1", "2", "3"]
    with TrainingStore(copy_of_three) as store:
        assert store.restore_latest(tree(0)).step == 3


def test_tracebacks_of_the_threads_of_a_failed_write_are_held_back_and_no_others(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.exc_value))
    closed, other = RuntimeError("Event loop is closed"), RuntimeError("another")

    def ignored(*errors):
        for error in errors:
            sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error))

    with training_store._quiet_threads():
        ignored(closed, other)
    assert seen == [other]
    ignored(closed)
    assert seen == [other, closed]
    with pytest.raises(OSError, match="disk full"), training_store._quiet_threads():
        raise OSError("disk full")
    ignored(closed, other)
    assert seen == [other, closed, other]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(StorageError, match=r"cannot write .*a: "):
            write_atomically(tmp_path / "a", b"new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with folder_written_whole(tmp_path / "model") as folder:
        (folder / "x").write_text("first")
        assert not (tmp_path / "model").exists()
    with pytest.raises(ZeroDivisionError), folder_written_whole(tmp_path / "model") as folder:
        (folder / "x").write_text("second")
        _ = 1 / 0
    assert (tmp_path / "model" / "x").read_text() == "first"
    with folder_written_whole(tmp_path / "model") as folder:
        (folder / "y").write_text("third")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["y"] and len(
        list(tmp_path.iterdir())
    ) == 1
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="is a file and not a folder"),
        folder_written_whole(tmp_path / "file" / "x"),
    ):
        pass
