"""Sphinx extension: ``{command-help} WORDS``, what a command of ``reglib`` says of itself.

It is asked when the page is built, so page and program cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
import typer.main
from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from typer.core import TyperGroup

from reglib.cli import app as program

#: Characters of a line; as in the outputs of the notebooks.
WIDTH = 86


def commands(group: Any = None, before: str = "") -> Iterator[str]:
    """The words of every command that does something."""
    for name, command in (group or typer.main.get_command(program)).commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name


def help_of(words: str) -> str:
    """What ``reglib WORDS --help`` prints.

    Raises:
        LookupError: if there is no such command.
    """
    if words not in commands():
        raise LookupError(f"command-help: wanted one of {', '.join(commands())}, got {words!r}")
    command: Any = typer.main.get_command(program)
    context = typer.Context(command, info_name="reglib", terminal_width=WIDTH)
    for word in words.split():
        command = command.commands[word]
        context = typer.Context(command, parent=context, info_name=word)
    return str(command.get_help(context))


class CommandHelp(SphinxDirective):
    """``{command-help} WORDS``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """A block as the terminal shows it."""
        try:
            text = help_of(self.arguments[0])
        except LookupError as error:
            raise self.error(str(error)) from error
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
