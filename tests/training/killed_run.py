"""A toy run that kills its own process (SIGKILL: no handler, no clean-up) at a chosen moment.

python killed_run.py FOLDER MOMENT
"""

import os
import pathlib
import shutil
import signal
import sys

from orbax.checkpoint import StandardCheckpointer
from toy import ToyBatches, toy

from jaxldm.training import store
from jaxldm.training.log import CsvLog
from jaxldm.training.loop import Plan, fit
from jaxldm.training.mesh import make_mesh


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_rename(folder):
    """The second checkpoint is written, not yet renamed."""
    real = store._checksums
    store._checksums = lambda place: kill() if place.name.startswith(".10.") else real(place)


def inside_orbax(folder):
    """The second checkpoint is half-written: every other file is missing, as when the power goes."""

    def half_save(checkpointer, directory, *args, **options):
        real(checkpointer, directory, *args, **options)
        if "/.10." in str(directory):
            checkpointer.wait_until_finished()
            files = sorted(path for path in pathlib.Path(directory).rglob("*") if path.is_file())
            for file in files[::2]:
                file.unlink()
            kill()

    real, StandardCheckpointer.save = StandardCheckpointer.save, half_save


def inside_the_clean_up(folder):
    """The second checkpoint is whole, and half of the first one, which is no longer kept, is deleted."""

    def half_delete(place, **_):
        if pathlib.Path(place).name.startswith(".5.") and (pathlib.Path(place) / "manifest.json").exists():
            (pathlib.Path(place) / "manifest.json").unlink()
            kill()
        real(place, **_)

    real, shutil.rmtree = shutil.rmtree, half_delete


def inside_a_row_of_the_log(folder):
    """Seven and a half rows are on disk."""

    def flush(log, *, durable=False):
        real(log, durable=durable)
        if "\n7," in log.path.read_text() or ",7," in log.path.read_text():
            with log.path.open("a") as file:
                file.write("2,8,0.12")
            kill()

    real, CsvLog.flush = CsvLog.flush, flush


if __name__ == "__main__":
    where, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
    globals()[moment](where)
    state, train_step = toy()
    plan = Plan(12, save_every=7 if moment == "inside_a_row_of_the_log" else 5, keep=1)
    fit(state, train_step, ToyBatches(), plan, where, resume=where.exists(), mesh=make_mesh(1))
