import io
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm.errors import CheckpointError, MissingDependencyError
from jaxldm.training.log import COLUMNS, CsvLog, read_log
from jaxldm.training.plots import _scale, centred_mean, plot_log, plot_log_or_report


def metrics(loss, **more):
    return {"loss": np.float32(loss), "grad_norm": np.float32(2), "learning_rate": np.float32(1e-4), **more}


def write(path, steps=6):
    log = CsvLog(path)
    for step in range(1, steps + 1):
        log.append(1 + (step - 1) // 3, step, 0.5 * step, metrics(1 / step, kl=np.float32([0, 1])))
    log.flush(durable=True)
    return log


def test_columns_and_rows(tmp_path):
    write(tmp_path / "log.csv")
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,loss,grad_norm,learning_rate,seconds,kl_0,kl_1"
    assert lines[3] == "1,3,0.33333334,2.0,1e-04,1.500,0.0,1.0"
    log = read_log(tmp_path / "log.csv")
    assert set(COLUMNS) <= set(log)
    np.testing.assert_array_equal(log["step"], np.arange(1, 7))
    np.testing.assert_array_equal(log["epoch"], [1, 1, 1, 2, 2, 2])


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_loss_reads_back_as_the_same_float32(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    log = CsvLog(path)
    log.append(1, 1, 0.0, metrics(value))
    log.flush()
    assert np.float32(read_log(path)["loss"][0]) == np.float32(value)


@pytest.mark.parametrize("ending", ["", "3,7,0.1", "3,7,0.1,2.0,1e-04,3.5,0.0,1.", "\n"])
def test_rows_after_the_checkpoint_and_half_rows_are_cut_off(tmp_path, ending):
    write(tmp_path / "log.csv")
    with (tmp_path / "log.csv").open("a") as file:
        file.write(ending)
    log = CsvLog(tmp_path / "log.csv")
    assert log.keep_until(4) == 2.0
    log.append(2, 5, 9.0, metrics(0.25, kl=np.zeros(2)))
    log.flush()
    read = read_log(tmp_path / "log.csv")
    np.testing.assert_array_equal(read["step"], [1, 2, 3, 4, 5])
    np.testing.assert_allclose(read["seconds"][-2:], [2.0, 9.0])


def test_cutting_back_to_nothing_begins_again(tmp_path):
    log = write(tmp_path / "log.csv")
    assert log.keep_until(0) == 0.0
    log.append(1, 1, 0.1, metrics(3))
    log.flush()
    np.testing.assert_array_equal(read_log(tmp_path / "log.csv")["step"], [1])
    assert CsvLog(tmp_path / "none.csv").keep_until(5) == 0.0


def test_the_rows_that_are_whole_are_kept_of_a_damaged_log(tmp_path):
    path = tmp_path / "log.csv"
    write(path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"2,", b"2;", 1)
    lines[4] = b"\xff\xfe" + lines[4]
    path.write_bytes(b"\n".join(lines))
    said = []
    log = CsvLog(path)
    assert log.keep_until(6, said.append) == 3.0
    assert len(said) == 1 and "2 of its lines are left out, and 4 are whole" in said[0]
    np.testing.assert_array_equal(read_log(path)["step"], [1, 3, 5, 6])


def test_a_damaged_header_is_written_again_with_the_next_row(tmp_path):
    path = tmp_path / "log.csv"
    write(path)
    whole = path.read_bytes()
    for place in range(whole.index(b"\n") + 1):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        log = CsvLog(path)
        log.keep_until(4)
        log.append(2, 5, 2.5, metrics(1 / 5, kl=np.float32([0, 1])))
        log.append(2, 6, 3.0, metrics(1 / 6, kl=np.float32([0, 1])))
        log.flush()
        assert path.read_bytes() == whole or place == whole.index(b"\n")
        assert read_log(path)["step"][-1] == 6


def test_a_file_without_a_row_is_set_aside(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"\x00\x01\n" * 9)
    said = []
    assert CsvLog(tmp_path / "log.csv").keep_until(3, said.append) == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv.damaged"] and "set aside" in said[0]


@given(st.integers(0, 2**32))
def test_a_damaged_log_never_stops_a_run_nor_its_curves(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    write(path, 9)
    numbers, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    for _ in range(numbers.integers(1, 6)):
        place = numbers.integers(len(content))
        content[place : place + numbers.integers(0, 3)] = numbers.bytes(numbers.integers(0, 3))
    path.write_bytes(content)
    try:
        read_log(path)
    except CheckpointError as error:
        assert "is no training log" in str(error)
    log = CsvLog(path)
    log.keep_until(5)
    log.append(2, 6, 3.0, metrics(1 / 6, kl=np.float32([0, 1])))
    log.flush()
    steps = read_log(path)["step"]
    assert steps[-1] == 6 and (np.diff(steps) > 0).all()


def test_other_files_are_refused(tmp_path):
    for content in ("a,b\n1,2\n", "no line ends here", "\0"):
        (tmp_path / "log.csv").write_text(content)
        with pytest.raises(CheckpointError, match="is no training log"):
            read_log(tmp_path / "log.csv")
    (tmp_path / "log.csv").write_text("epoch,step,lo")  # killed in its first line
    assert len(read_log(tmp_path / "log.csv")["step"]) == 0
    with pytest.raises(CheckpointError, match="no training log"):
        read_log(tmp_path / "nothing.csv")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 40))
def test_the_mean_is_of_as_many_values_at_both_sides(values, window):
    last = len(values) - 1
    reach = [min(window // 2, k, last - k) for k in range(len(values))]
    expected = [np.mean(values[k - r : k + r + 1]) for k, r in enumerate(reach)]
    np.testing.assert_allclose(centred_mean(np.array(values), window), expected, atol=1e-9)


def test_the_mean_of_a_slope_lies_on_it():
    slope = np.linspace(5.0, 1.0, 200)
    np.testing.assert_allclose(centred_mean(slope, 50), slope, atol=1e-9)


def test_curves(tmp_path):
    from PIL import Image

    write(tmp_path / "log.csv")
    plot_log(tmp_path / "log.csv")
    for name in ("loss.png", "grad_norm.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (700, 400)


@pytest.mark.parametrize("low", [1e-3, 0.0301, 0.79, 0.97, 20.0])
@pytest.mark.parametrize("ratio", [1.01, 1.3, 4.0, 12.0, 1e4])
def test_the_ticks_of_a_curve_are_plain_decimals(low, ratio):
    from matplotlib.figure import Figure

    values = np.geomspace(low, low * ratio, 50)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(values)
    _scale(axes, values)
    figure.savefig(io.BytesIO(), format="png")
    lower, upper = axes.get_ylim()
    texts = [
        tick.label1.get_text()
        for tick in (*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks())
        if lower <= tick.get_loc() <= upper and tick.label1.get_text()
    ]
    assert 1 <= len(texts) <= 20 and len(set(texts)) == len(texts)
    assert all(float(text) > 0 and "$" not in text for text in texts)


def test_without_matplotlib_training_goes_on_and_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # import then raises ImportError
    write(tmp_path / "log.csv")
    said = []
    plot_log_or_report(tmp_path / "log.csv", said.append)
    assert "pip install 'jaxldm[plots]'" in said[0]
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        plot_log(tmp_path / "log.csv")
