"""`fastprune` and `python -m fastprune`."""

import sys

from fastprune.base import interrupts


def run() -> None:
    """Run the command line; signals are heard before anything else is imported."""
    interrupts.listen()
    try:
        from fastprune.cli import main

        main(prog_name="fastprune")
    except KeyboardInterrupt as stop:
        sys.exit(128 + getattr(stop, "number", 2))


if __name__ == "__main__":
    run()
