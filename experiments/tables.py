"""Tables that experiments print."""

from rich.console import Console
from rich.table import Table

__all__ = ["show"]

WIDTH = 200
"""Columns of text in a pipe, where nobody sees where a line ends."""


def show(table: Table) -> None:
    """Prints a table: as wide as the terminal, and into a pipe with whole lines."""
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
