"""The demo's subcommand."""

import click

from fastprune.cli.options import COUNT, PATH, SHARE


@click.command()
@click.option(
    "--images",
    type=PATH,
    help="ImageFolder to use, with or without train/ and val/ in it. [default: generated pictures]",
)
@click.option("--out", default="demo", type=PATH, help="Folder to write.")
@click.option(
    "--keep", type=SHARE, default=0.5, help="Share of the rows that the pruned runs keep."
)
@click.option("--epochs", type=COUNT, default=12, help="Passes of every student over its rows.")
@click.option(
    "--seeds", type=COUNT, default=1, help="Students per kind of run, each with another seed."
)
@click.option("--teacher", default="resnet20", help="Network of the teacher.")
@click.option(
    "--teacher-checkpoint",
    type=PATH,
    help="Weights of the teacher. [default: trained there and then]",
)
@click.option(
    "--teacher-epochs", type=COUNT, default=10, help="Passes of the teacher, where it is trained."
)
@click.option("--student", default="resnet8", help="Network of the students.")
@click.option("--per-class", type=COUNT, help="Take at most this many training images per class.")
@click.option("--image-size", type=COUNT, help="Side of a view. [default: the images', at most 32]")
def demo(**options: object) -> None:
    """Walk the whole way on small images: all rows, with and without a teacher cache, and halves.

    Writes betons, scores, subsets, runs, result.json, report.html and scores.html to the folder of
    --out, where an earlier demo is replaced.
    """
    from fastprune.demo.walk import DemoSettings, run_demo

    settings = DemoSettings(**options)  # type: ignore[arg-type]
    click.echo(run_demo(settings))
    written = ("result.json", "report.html", "scores.html")
    click.echo(f"-> {', '.join(str(settings.out / name) for name in written)}")
    click.echo(_GO_ON)


# The recipe's head lists what comes after the teacher: scores, a subset, a student.
_GO_ON = """
On with your own images, one folder per class in FOLDER/train and FOLDER/val:

  fastprune convert FOLDER/train train.beton
  fastprune convert FOLDER/val val.beton
  fastprune train small_images_teacher    # what follows: fastprune recipes show small_images"""

COMMANDS = (demo,)
