"""The loop: resuming bit for bit, stopping, NaN, full disks."""

import os
import resource
import shutil
import signal
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import ToyBatches, toy

from jaxldm.errors import CheckpointError, DivergenceError, InvalidArgumentError, Stopped, StorageError
from jaxldm.training.events import PREFIX
from jaxldm.training.log import CLOCKS, read_log
from jaxldm.training.loop import Plan, fit
from jaxldm.training.mesh import make_mesh
from jaxldm.training.store import TrainingStore

OPTIMIZED = True  # compiled as users do, see tests/conftest.py


def run(folder, plan=None, *, width=8, batches=None, **options):
    state, train_step = toy(width=width)
    return fit(
        state,
        train_step,
        batches or ToyBatches(),
        plan or Plan(12, save_every=5),
        folder,
        **{"mesh": make_mesh(1), "log": lambda line: None, **options},
    )


def rows(folder):
    """The log without the clock."""
    return {name: column for name, column in read_log(folder / "log.csv").items() if name not in CLOCKS}


def numbers(state):
    return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))


def raise_signal(number, at_step):
    """An `on_sample` that sends this process a signal after update `at_step`."""
    return lambda state, step: os.kill(os.getpid(), number) if step == at_step else None


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twelve updates (two epochs and two steps) in one go."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, numbers(run(folder))


def assert_same_run(folder, state, straight):
    chex.assert_trees_all_equal(numbers(state), straight[1])
    chex.assert_trees_all_equal(rows(folder), rows(straight[0]))


def test_what_a_run_leaves_behind(straight):
    folder, state = straight
    *names, events = sorted((path.name for path in folder.iterdir()), key=lambda name: (PREFIX in name, name))
    assert names == ["checkpoints", "grad_norm.png", "log.csv", "loss.png"] and events.startswith(PREFIX)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["10", "12"]
    log = read_log(folder / "log.csv")
    np.testing.assert_array_equal(log["step"], np.arange(1, 13))
    np.testing.assert_array_equal(log["epoch"], [1] * 5 + [2] * 5 + [3] * 2)
    assert (np.diff(log["seconds"]) >= 0).all() and int(state.step) == 12


@pytest.mark.parametrize(
    "stop_after", [5, 7, 10], ids=["end of an epoch", "middle of an epoch", "second epoch"]
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, straight, stop_after):
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path,
            Plan(12, save_every=5, sample_every=1),
            on_sample=raise_signal(signal.SIGINT, stop_after),
        )
    assert read_log(tmp_path / "log.csv")["step"][-1] == stop_after
    assert_same_run(tmp_path, run(tmp_path, resume=True), straight)


def test_a_split_state_is_saved_and_goes_on_split_and_on_another_mesh(tmp_path, straight):
    """fsdp=4: interrupted and resumed, bit for bit the run in one go; one device goes on where it ended."""
    whole = run(tmp_path / "whole", mesh=make_mesh(8, fsdp=4))
    assert whole.params["w1"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "cut",
            Plan(12, sample_every=1),
            mesh=make_mesh(8, fsdp=4),
            on_sample=raise_signal(signal.SIGINT, 7),
        )
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    resumed = run(tmp_path / "cut", resume=True, mesh=make_mesh(8, fsdp=4))
    assert resumed.params["w1"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    chex.assert_trees_all_equal(numbers(resumed), numbers(whole))
    other = run(tmp_path / "other", resume=True)
    chex.assert_trees_all_close(numbers(other), numbers(whole), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows(tmp_path / "other")["loss"], rows(straight[0])["loss"], rtol=1e-4)


def test_a_mesh_that_splits_nothing_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InvalidArgumentError, match="fsdp=8 divides no axis"):
        run(tmp_path / "run", width=9, mesh=make_mesh(8, fsdp=8))
    assert not (tmp_path / "run").exists()


def test_rows_after_the_last_checkpoint_are_made_again_and_not_twice(tmp_path, straight):
    """As after a kill: the log is at step 12, the newest checkpoint at step 10."""
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    with (tmp_path / "log.csv").open("a") as file:
        file.write("3,13,0.12")
    assert_same_run(tmp_path, run(tmp_path, resume=True), straight)


def test_a_truncated_newest_checkpoint_costs_only_its_own_steps(tmp_path, straight):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoints" / "12" / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    said = []
    assert_same_run(tmp_path, run(tmp_path, resume=True, log=said.append), straight)
    assert "step 12 is damaged" in said[0] and said[1] == "resuming from the checkpoint of step 10"


def test_resuming_what_is_finished_changes_nothing(tmp_path, straight):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    assert_same_run(tmp_path, run(tmp_path, resume=True), straight)


def test_a_checkpoint_beyond_the_end_of_the_training_is_refused(tmp_path, straight):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 12, and this training ends at step 8"):
        run(tmp_path, resume=True, plan=Plan(8))


def test_resuming_where_nothing_was_saved_starts_at_the_beginning(tmp_path, straight):
    (tmp_path / "log.csv").write_text((straight[0] / "log.csv").read_text()[:200])
    assert_same_run(tmp_path, run(tmp_path, resume=True), straight)


def test_a_run_is_not_overwritten_without_resume(straight):
    before = (straight[0] / "log.csv").read_bytes()
    with pytest.raises(CheckpointError, match="give resume=True to go on"):
        run(straight[0])
    assert (straight[0] / "log.csv").read_bytes() == before


def test_the_checkpoint_of_another_model_is_refused(straight):
    with pytest.raises(CheckpointError, match="another model"):
        run(straight[0], width=9, resume=True)
    assert read_log(straight[0] / "log.csv")["step"][-1] == 12


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Stopped), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, number, error):
    said, handlers = [], [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as raised:
        run(tmp_path, Plan(12, sample_every=1), log=said.append, on_sample=raise_signal(number, 3))
    assert "stopped after step 3 of 12" in said[-1] and "--resume" in said[-1] and str(tmp_path) in said[-1]
    assert number == signal.SIGINT or raised.value.code == 143
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(state, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="at once"):
        run(tmp_path, Plan(12, save_every=2, sample_every=3), on_sample=twice)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_run_says_that_it_compiles_before_it_does(tmp_path):
    (state, train_step), said = toy(width=8), []

    def step(state, batch):
        said.append("traced")
        return train_step(state, batch)

    fit(state, step, ToyBatches(), Plan(2), tmp_path, mesh=make_mesh(1), name="own", log=said.append)
    assert said[:2] == ["own: compiling the training step", "traced"] and said.count(said[0]) == 1


def test_a_loss_of_nan_is_skipped_and_counted(tmp_path, straight):
    """Steps 3, 7 and 8: nothing moves in them, and the ones after them do what they would have done."""
    states, said = {}, []
    state = run(
        tmp_path,
        Plan(12, sample_every=1),
        batches=ToyBatches(nan_at=(2, 6, 7)),
        log=said.append,
        on_sample=lambda state, step: states.update({step: numbers(state)}),
    )
    for step in (3, 7, 8):
        before, after = states[step - 1], states[step]
        chex.assert_trees_all_equal(before.replace(step=after.step), after)
        assert int(after.step) == step
    assert (states[4].params["w1"] != states[3].params["w1"]).all()
    log = read_log(tmp_path / "log.csv")
    np.testing.assert_array_equal(np.flatnonzero(log["skipped"]) + 1, [3, 7, 8])
    np.testing.assert_array_equal(np.isnan(log["loss"]), log["skipped"] == 1)
    assert int(state.opt_state.count) == 9 and int(state.step) == 12
    np.testing.assert_array_equal(log["loss"][:2], rows(straight[0])["loss"][:2])
    assert sum("this update is skipped" in line for line in said) == 2
    first = next(line for line in said if "epoch 1/" in line)
    assert first.endswith("1 skipped") and "loss nan" not in first


def test_ten_losses_of_nan_stop_with_the_cause_and_keep_the_last_good_checkpoint(tmp_path):
    reason = (
        r"nan.* at step 18, and 10 updates in a row were skipped; the newest checkpoint, of step 8 in .*, "
        "was saved before that; a broken label"
    )
    with pytest.raises(DivergenceError, match=reason):
        run(
            tmp_path,
            Plan(40, save_every=8),
            batches=ToyBatches(nan_at=(2, *range(8, 30))),
            explain_divergence=lambda step, metrics: "a broken label",
        )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["8"]
    log = read_log(tmp_path / "log.csv")
    assert log["step"][-1] == 18 and np.isnan(log["loss"][-1]) and (tmp_path / "loss.png").is_file()


def steps_saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_skipped_updates_do_not_take_the_place_of_a_good_checkpoint(tmp_path):
    """Updates 4 to 7 are skipped: what was due in them is saved after the next good one."""
    run(tmp_path / "each", Plan(8, save_every=1), batches=ToyBatches(nan_at=range(3, 7)))
    assert steps_saved(tmp_path / "each") == [3, 8]
    run(tmp_path / "late", Plan(12, save_every=5), batches=ToyBatches(nan_at=range(3, 7)))
    assert steps_saved(tmp_path / "late") == [10, 12]
    seen = []
    run(
        tmp_path / "seen",
        Plan(12, save_every=5, sample_every=1, keep=9),
        batches=ToyBatches(nan_at=range(3, 7)),
        on_sample=lambda state, step: seen.append(step),
    )
    assert steps_saved(tmp_path / "seen") == [8, 10, 12] and seen == list(range(1, 13))


@pytest.mark.parametrize(
    ("nan_at", "saved"), [((10, 11), [5, 10]), ((2, 4, 10, 11), [6, 10])], ids=["the last two", "and others"]
)
def test_a_run_whose_last_updates_were_skipped_fails(tmp_path, nan_at, saved):
    reason = (
        r"the last 2 of 12 updates were not finite; the newest checkpoint, of step 10 in .*; a broken label"
    )
    with pytest.raises(DivergenceError, match=reason) as raised:
        run(
            tmp_path,
            batches=ToyBatches(nan_at=nan_at),
            explain_divergence=lambda step, metrics: "a broken label",
        )
    assert "\n" not in str(raised.value) and steps_saved(tmp_path) == saved
    assert read_log(tmp_path / "log.csv")["step"][-1] == 12


def test_one_skipped_update_at_the_end_of_many_is_no_failure(tmp_path):
    run(tmp_path / "twelve", batches=ToyBatches(nan_at=(11,)))
    assert steps_saved(tmp_path / "twelve") == [10, 12]
    with pytest.raises(
        DivergenceError, match=r"last 1 of 6 updates .*; no checkpoint was saved before that$"
    ):
        run(tmp_path / "six", Plan(6), batches=ToyBatches(nan_at=(5,)))


def test_a_signal_after_a_skipped_update_leaves_the_checkpoint_before(tmp_path, straight):
    batches = ToyBatches(nan_at=(6,))
    with pytest.raises(Stopped, match=r"not saved, as .* \(the newest checkpoint is of step 5\), in "):
        run(
            tmp_path,
            Plan(12, save_every=5, sample_every=1),
            batches=batches,
            on_sample=raise_signal(signal.SIGINT, 7),
        )
    assert steps_saved(tmp_path) == [5]
    assert_same_run(tmp_path, run(tmp_path, resume=True), straight)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch, straight):
    """The disk takes the checkpoint of step 5 only after update 9 is done."""
    written, arrived = TrainingStore._write, threading.Event()

    def slow(self, step, arrays):
        assert arrived.wait(timeout=30), "training waits for the disk"
        written(self, step, arrays)

    monkeypatch.setattr(TrainingStore, "_write", slow)

    def on_sample(state, step):
        if step == 9:
            assert not (tmp_path / "checkpoints").exists()
            arrived.set()

    state = run(tmp_path, Plan(12, save_every=5, sample_every=1), on_sample=on_sample)
    assert_same_run(tmp_path, state, straight)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "12"]


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path, straight):
    """From update 6 on, the operating system lets no file of this process grow past 20 000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_disk(state, step):
        if step == 6:
            while not (tmp_path / "checkpoints" / "5").is_dir():  # it is written in the background
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(StorageError, match=r"cannot write .*10: .*the checkpoint of step 5 is whole"):
            run(tmp_path, Plan(12, save_every=5, sample_every=1), on_sample=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]
    assert_same_run(tmp_path, run(tmp_path, resume=True), straight)


def test_samples_due_after_the_checkpoint_are_made_on_resume(tmp_path):
    """Killed between the checkpoint of a step and its sample; and at the end, before the last one."""
    plan = Plan(12, save_every=5, sample_every=5)

    def killed_at(end):
        def sample(state, step):
            drawn.append(step)
            if step == end:
                raise ZeroDivisionError

        return sample

    for end, expected in ((5, [5, 5, 10, 12]), (12, [5, 10, 12, 12])):
        drawn = []
        folder = tmp_path / str(end)
        with pytest.raises(ZeroDivisionError):
            run(folder, plan, on_sample=killed_at(end))
        run(folder, plan, resume=True, on_sample=killed_at(None))
        assert drawn == expected


def test_no_folder_can_be_made_there(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file and not a folder"):
        run(tmp_path / "file" / "run")
    with pytest.raises(InvalidArgumentError, match="num_steps"):
        Plan(0)


def test_the_loss_falls_and_samples_are_asked_for_on_time(tmp_path, capsys):
    seen = []
    state, train_step = toy(num_steps=300, width=32)
    fit(
        state,
        train_step,
        ToyBatches(),
        Plan(300, sample_every=100),
        tmp_path,
        mesh=make_mesh(1),
        on_sample=lambda state, step: seen.append((step, int(state.step))),
        name="toy",
    )
    loss = read_log(tmp_path / "log.csv")["loss"]
    assert loss[-50:].mean() < 0.35 * loss[:10].mean()
    assert seen == [(100, 100), (200, 200), (300, 300)]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("toy: epoch")]
    assert len(lines) == 60 and lines[-1].startswith("toy: epoch 60/60  loss ")


@pytest.mark.skipif(
    jax.__version_info__ < (0, 9),
    reason="a processor is done with a step whose state is donated before the call returns: it waits for all",
)
def test_only_the_batches_that_the_device_waits_for_count_as_waiting(tmp_path):
    """Two updates are under way, a batch takes less than one of them, but the seventh a second."""
    state, train_step = toy()

    def slow_step(state, batch):
        state, metrics = train_step(state, batch)
        matrix = jnp.full((512, 512), metrics["loss"]) / 512
        product = jax.lax.fori_loop(0, 60, lambda _, power: power @ matrix, matrix)
        return state, {**metrics, "product": product[0, 0]}

    class SlowBatches(ToyBatches):
        def __getitem__(self, step):
            time.sleep(1.0 if step == 6 else 0.01)
            return super().__getitem__(step)

    fit(state, slow_step, SlowBatches(), Plan(9), tmp_path, mesh=make_mesh(1), log=lambda line: None)
    waiting = read_log(tmp_path / "log.csv")["waiting"]
    assert waiting[0] >= 0.01 and waiting[6] >= 1.0
    np.testing.assert_array_equal(np.delete(waiting, [0, 6]), 0)
