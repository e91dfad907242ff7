"""Start the command line. The doctor starts without Typer: hooks and editors run it often, and need it fast."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With the exit code of the command.
    """
    if sys.argv[1:2] == ["doctor"]:
        from microbatch.cli.doctor_command import read_arguments, run_doctor

        given = read_arguments(sys.argv[2:])
        if given is not None:
            try:
                code = run_doctor(*given)
            except KeyboardInterrupt:
                code = INTERRUPTED
            raise SystemExit(code)
    from microbatch.cli.main import main as run

    if sys.argv[1:2] == ["train"] and not {"--help", "-h"} & set(sys.argv):
        # Here, because it is a setting of the whole process, and only this process is the command's own.
        from microbatch.memory.kept_heap import keep_heap

        keep_heap()
    run()
