"""report.html of a run, opened from the disk: its curves and pictures are on the screen, and no error."""

import io

import chromium
import numpy as np
import pytest
from chromium import in_a_browser
from PIL import Image

from jaxldm import training
from jaxldm.data import Dataset
from jaxldm.metrics import save_png
from jaxldm.training.log import CsvLog
from jaxldm.training.plots import plot_log_or_report
from jaxldm.training.runs import open_run

DATA = Dataset("digits", (28, 28, 1), ("0", "1"), {}, license="by nobody, CC BY 4.0")
GREY = {100: 40, 200: 90, 300: 200}  # update -> the level of what was drawn after it


@pytest.fixture
def report(tmp_path):
    """The report of a run that has a log, its curves, and pictures drawn on the way."""
    run = open_run(tmp_path / "run", training.RECIPES["smoke"], DATA, resume=False, log=print)
    stage = run.stage("diffusion")
    for step, level in GREY.items():
        save_png(stage.path / "samples" / f"step-{step:06d}.png", np.full((60, 90, 3), level, np.uint8))
    log = CsvLog(stage.log)
    for step in range(1, 40):
        metrics = {"loss": 1 / step, "grad_norm": 1.0 + step % 3, "learning_rate": 0.1, "waiting": 0.0}
        log.append(1, step, 2.0 * step, metrics)
    log.flush()
    plot_log_or_report(stage.log, print)
    return training.write_report(run.path)


def on_screen(page, number):
    """Pixels [h, w, 3] of the picture of that number, as the window shows them."""
    selector = f"figure:nth-of-type({number}) img"
    image = Image.open(io.BytesIO(page.screenshot(page.place(selector))))
    return np.asarray(image.convert("RGB")).astype(int)


@in_a_browser
def test_curves_and_pictures_are_shown(report, tmp_path):
    with chromium.browser(tmp_path / "browser") as page:
        page.size(1100, 8000)  # all of it, without scrolling
        page.open(report.as_uri())
        page.until("[...document.images].every(image => image.complete)")
        captions = page.eval("[...document.querySelectorAll('figcaption')].map(caption => caption.innerText)")
        assert [caption.split(" of ")[0] for caption in captions[:2]] == ["The loss", "The norm"]
        assert captions[2:] == [f"Drawn after {step} updates." for step in GREY]
        seen = "[...document.images].map(image => image.naturalWidth * image.checkVisibility())"
        assert page.eval(seen)[2:] == [90] * 3 and min(page.eval(seen)) > 0
        for number, name in enumerate(("loss.png", "grad_norm.png"), 1):
            seen, file = on_screen(page, number), Image.open(report.parent / "diffusion" / name)
            drawn = np.asarray(file.convert("RGB")).astype(int)
            ink = np.abs(255 - drawn).mean()
            assert seen.shape == drawn.shape and ink > 1  # it has a curve, and what is seen is that curve
            assert np.abs(seen - drawn).mean() < ink / 100
        for number, level in enumerate(GREY.values(), 3):
            height, width, _ = (picture := on_screen(page, number)).shape
            middle = picture[height // 4 : -height // 4, width // 4 : -width // 4]
            assert height >= 60 and width >= 90 and np.abs(middle - level).max() <= 1
        text = page.eval("document.body.innerText")
        assert "by nobody, CC BY 4.0" in text and "39 updates" in text and "diffusion.batch_size" in text
        assert page.eval("document.documentElement.scrollWidth") <= 1100
        assert page.complaints == []
