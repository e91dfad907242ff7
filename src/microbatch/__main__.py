"""``python -m microbatch`` is the command line."""

from microbatch.cli.entry import main

if __name__ == "__main__":
    main()
