"""The tiny models of the pipeline tests serve the command line, too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
