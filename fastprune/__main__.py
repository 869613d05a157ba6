"""`python -m fastprune` is the `fastprune` command."""

from fastprune.cli import main

if __name__ == "__main__":
    main(prog_name="fastprune")
