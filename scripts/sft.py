"""`minilm sft` as a script: the same function, the same arguments."""

import sys

from minilm.cli import main

sys.exit(main(["sft", *sys.argv[1:]]))
