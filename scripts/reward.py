"""`minilm reward` as a script: the same function, the same arguments."""

import sys

from minilm.cli import main

sys.exit(main(["reward", *sys.argv[1:]]))
