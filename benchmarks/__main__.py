"""Everything that `make bench` measures: steps first, then the import."""

import sys

from benchmarks import import_time, run

if __name__ == "__main__":
    status = run.main(sys.argv[1:])
    sys.exit(status or import_time.main([]))
