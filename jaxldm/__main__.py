"""`python -m jaxldm` is the command `jaxldm`."""

import sys

from jaxldm.cli import main

if __name__ == "__main__":
    sys.exit(main())
