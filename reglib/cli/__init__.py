"""Command line: ``reglib register | apply | evaluate | info | fetch | train``.

Everything heavy is imported inside the commands, so that help comes at once. Exit codes: 0 done,
1 failed, 2 misuse (the words of the command line do not fit together, whatever the files hold).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from reglib import REPOSITORY, __version__
from reglib.cli import applying, evaluating, looking, registering, running, training

_HELP = f"""Deformable image registration of NIfTI images and pictures (PNG, JPEG, TIFF).

A registration maps the fixed image to the moving one: the moving image is pulled back onto the grid
of the fixed image, and points travel from the fixed to the moving image. Both images are placed by
their headers, so size, spacing and orientation may differ.

Exit codes: 0 done, 1 failed, 2 misuse. {REPOSITORY}
"""

app = typer.Typer(
    help=_HELP,
    add_completion=False,
    # Plain text, so that what is printed does not depend on the terminal.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("register")(registering.register)
app.command("apply")(applying.apply)
app.command("evaluate")(evaluating.evaluate)
app.command("info")(looking.info)
app.command("fetch")(looking.fetch)
train = typer.Typer(help="Train networks.", rich_markup_mode=None)
train.command("pretrain")(training.pretrain)
train.command("fcn")(training.train_fcn)
app.add_typer(train, name="train")


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        typer.echo(f"reglib {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; ``None`` reads them from the process.

    Returns:
        Exit code: 0 done, 1 failed, 2 misuse.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(args=words, prog_name="reglib", obj=words)
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:  # before a command has begun
        running.say(running.NOTHING_WRITTEN)
        return 1
    return 0
