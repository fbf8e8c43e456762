"""report.html of a run: what is in it, of a finished run, of one that was stopped, and of an empty one."""

import html
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import training
from jaxldm.data import Dataset
from jaxldm.errors import CheckpointError
from jaxldm.metrics import save_png
from jaxldm.training.log import CsvLog
from jaxldm.training.progress import Progress
from jaxldm.training.report import REPORT_FILE, bring_up_to_date, reported
from jaxldm.training.runs import open_run

DATA = Dataset("digits <b>", (28, 28, 1), ("0", "1"), {}, license="CC BY 4.0")


@pytest.fixture
def run(tmp_path):
    run = open_run(tmp_path / "run", training.RECIPES["smoke"], DATA, resume=False, log=print)
    stage = run.stage("diffusion")
    for step in range(100, 1100, 100):
        save_png(stage.path / "samples" / f"step-{step:06d}.png", np.full((4, 4, 3), step % 256, np.uint8))
    save_png(stage.path / "loss.png", np.zeros((4, 4, 3), np.uint8))
    log = CsvLog(stage.log)
    for step in range(1, 5):
        metrics = {"loss": 0.5 * step, "grad_norm": 1.0, "learning_rate": 0.1, "waiting": 0.25}
        metrics["of_peak"] = 0.2 if step % 2 else 0.6
        log.append((step + 1) // 2, step, 2.0 * step, metrics)
    log.flush()
    return run


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r'src="[^"]*"', "", page)))


def test_curves_pictures_figures_and_settings(run):
    page = training.write_report(run.path).read_text()
    text = text_of(page)
    assert "digits <b>" in text and "<b>" not in page and "CC BY 4.0" in text
    assert re.search(r"diffusion\s+4 updates in 0\.1 minutes, not finished", text)
    assert page.count("data:image/png;base64,") == 7  # the curve, and six of ten pictures
    drawn = [int(number) for number in re.findall(r"<figcaption>Drawn after (\d+) updates", page)]
    assert drawn[0] == 100 and drawn[-1] == 1000 and drawn == sorted(set(drawn)) and len(drawn) == 6
    # Of the last epoch: two updates in four seconds, of which half a second was waiting.
    assert re.search(r"updates per second\s+0\.5", text) and re.search(r"waiting for data\s+12\.5%", text)
    assert re.search(r"matrix peak\s+30%", text)  # of the time: the mean of the seconds, not of the shares
    assert re.search(r"loss\s+1\.75", text) and re.search(r"diffusion\.batch_size\s+64", text)
    assert "<script" not in page and "http" not in re.sub(r'http-equiv="[^"]*"', "", page)


def test_speeds_are_those_of_the_terminal_without_compilation(run, monkeypatch):
    """Three updates of 16 in an epoch, 0.02 s each, and 30 s more for the first, in which it is compiled."""
    said, now = [], [100.0]
    monkeypatch.setattr("jaxldm.training.progress.time.perf_counter", lambda: now[0])
    stage = run.stage("autoencoder")
    stage.path.mkdir()
    counts = {"start": 0, "num_steps": 6, "steps_per_epoch": 3, "seconds": 0.0}
    progress = Progress(CsvLog(stage.log), name="x", **counts, log=said.append, bar=False)
    progress.at_peak = 0.005
    metrics = {name: jnp.float32(1) for name in ("loss", "grad_norm", "learning_rate")}
    for step in range(1, 7):
        now[0] += 30.02 if step == 1 else 0.02
        progress.push(step, metrics, waiting=0.002, examples=16)
        if step % 3 == 0:
            progress.drain()
            assert said[-1].endswith("800 examples/s, 10% waiting, 25% of the matrix peak")
            text = text_of(training.write_report(run.path).read_text())
            assert re.search(rf"epoch\s+{step // 3}\s+updates per second\s+50\s", text)
            assert re.search(r"examples per second\s+800\s+share of the matrix peak\s+25%", text)
            assert re.search(r"waiting for data\s+10\.0%", text)


def test_a_run_in_a_folder_of_its_own_name_is_named_once(run):
    for folder, title in (("run", "Run of smoke: run"), ("smoke", "Run of smoke")):
        path = run.path.rename(run.path.with_name(folder))
        assert f"<title>{title}</title>" in training.write_report(path).read_text()


def test_it_is_written_at_the_end_and_when_a_run_is_stopped(run):
    file = run.path / REPORT_FILE
    with reported(run):
        assert not file.exists()
    assert file.exists()
    file.unlink()
    with pytest.raises(KeyboardInterrupt), reported(run):
        raise KeyboardInterrupt
    assert file.exists()
    file.unlink()
    with pytest.raises(ValueError, match="of the training"), reported(run):
        raise ValueError("of the training")
    assert not file.exists()


def test_a_run_without_a_row_and_no_run(tmp_path):
    run = open_run(tmp_path / "run", training.RECIPES["smoke"], DATA, resume=False, log=print)
    (run.stage("autoencoder").path).mkdir()
    run.stage("autoencoder").log.write_text("")
    assert "nothing yet" in text_of(training.write_report(run.path).read_text())
    with pytest.raises(CheckpointError, match="no run folder"):
        training.write_report(tmp_path)


def test_one_that_a_kill_cut_short_is_made_up_for(run):
    """Missing, old, or with a temporary file next to it; one that is whole is not written again."""
    file, leftover = run.path / REPORT_FILE, run.path / f".{REPORT_FILE}.0123abcd.tmp"
    bring_up_to_date(run)
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    leftover.write_bytes(b"half")
    bring_up_to_date(run)
    assert not leftover.exists() and file.stat().st_mtime_ns == written
    file.write_bytes(b"of an earlier stage")
    bring_up_to_date(run)
    assert file.read_bytes() == whole
