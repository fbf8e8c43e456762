"""`python -m experiments.faults`, see `run.py`."""

import tyro

from experiments.faults.run import Faults, main

raise SystemExit(min(1, main(tyro.cli(Faults))))
