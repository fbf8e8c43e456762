"""`python -m experiments.faults`, see `run.py`."""

from experiments.faults.run import Faults, command
from jaxldm.commands.terminal import run_script

run_script(command, Faults)
