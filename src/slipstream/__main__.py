"""`python -m slipstream`, where the command is not on the path."""

import sys

from slipstream.run.cli import main

if __name__ == "__main__":
    sys.exit(main())
