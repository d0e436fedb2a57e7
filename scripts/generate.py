"""`minilm generate` as a script: the same function, the same arguments."""

import sys

from minilm.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
