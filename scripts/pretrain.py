"""`minilm pretrain` as a script: the same function, the same arguments."""

import sys

from minilm.cli import command_line

sys.exit(command_line("pretrain"))
