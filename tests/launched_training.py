"""dtrak.train with stores of two rows a shard, in a process that others may be launched with."""

import sys

from dtrak.features import store
from dtrak.train import main

if __name__ == "__main__":
    store._ROWS_PER_SHARD = 2
    main(sys.argv[1:])
