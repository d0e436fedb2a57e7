"""`python -m minilm`."""

import sys

from minilm.cli import command_line

sys.exit(command_line())
