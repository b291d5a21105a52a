"""python -m seqfuse: what `seqfuse` does, for torchrun."""

from seqfuse.cli import main

main()
