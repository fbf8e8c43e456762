"""The event files of a run, read by TensorBoard's own reader."""

import numpy as np
from tensorboard.backend.event_processing import event_accumulator
from toy import ToyBatches, toy

from jaxldm.training.events import masked_crc
from jaxldm.training.log import SPEEDS, CsvLog, read_log
from jaxldm.training.loop import Plan, fit
from jaxldm.training.mesh import make_mesh


def read(folder):
    """Name -> [(step, value)]."""
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def write(log, steps, offset=0.0):
    for step in steps:
        metrics = {
            "loss": np.float32(step + offset),
            "grad_norm": np.float32(2),
            "learning_rate": np.float32(0),
        }
        log.append(1, step, 0.5 * step, {**metrics, "odd": np.float32(np.nan if step % 2 else step)})
    log.flush()


def test_crc_32c_of_the_standard():
    """RFC 3720, B.4: of 32 zeros it is 8a9136aa, of "123456789" it is e3069283; masked as in TFRecord."""
    for content, crc in ((bytes(32), 0x8A9136AA), (b"123456789", 0xE3069283)):
        assert masked_crc(content) == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_tensorboard_reads_what_the_log_has(tmp_path):
    state, train_step = toy()
    fit(state, train_step, ToyBatches(), Plan(12), tmp_path, mesh=make_mesh(1), log=lambda line: None)
    log, found = read_log(tmp_path / "log.csv"), read(tmp_path)
    assert set(found) == set(log) - {"epoch", "step", "seconds"}
    assert {"waiting_share", "examples_per_second", "of_peak"} <= set(found)
    for name, points in found.items():
        steps, values = zip(*points, strict=True)
        first = 2 if name in SPEEDS else 1  # there is no speed of the first, in which the step is compiled
        assert steps == tuple(range(first, 13))
        np.testing.assert_array_equal(np.float32(values), np.float32(log[name][first - 1 :]))


def test_updates_after_the_checkpoint_of_a_killed_run_are_void(tmp_path):
    write(_opened(tmp_path, 0), range(1, 8))
    torn = next(tmp_path.glob("events*"))
    torn.write_bytes(torn.read_bytes()[:-5])
    write(_opened(tmp_path, 4), range(5, 7), offset=0.25)
    found = read(tmp_path)
    assert found["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.25), (6, 6.25)]
    assert found["odd"] == [(2, 2.0), (4, 4.0), (6, 6.0)]  # NaN are no points


def test_a_log_that_moves_takes_its_events_along(tmp_path):
    log = _opened(tmp_path, 0)
    write(log, [1])
    (tmp_path / "there").mkdir()
    log.move_to(tmp_path / "there" / "log.csv")
    write(log, [2])
    assert read(tmp_path)["loss"] == [(1, 1.0)] and read(tmp_path / "there")["loss"] == [(2, 2.0)]


def _opened(folder, step):
    log = CsvLog(folder / "log.csv", events=True)
    log.keep_until(step)
    return log
