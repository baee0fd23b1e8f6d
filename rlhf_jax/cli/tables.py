"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf_jax.launch.describe import Key


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names with a line about each."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False, title_style="bold")
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, words in rows:
        table.add_row(Text(name), Text(words))
    Console().print(table, "")


def print_keys(keys: Iterable[Key]) -> None:
    """Print each key with its type and default on one line, and its meaning and place below it."""
    console = Console(highlight=False)
    selector = ""
    for key in keys:
        if key.selector != selector:
            selector = key.selector
            console.print(Text(f"\n{selector}", style="bold"), Text(key.place, style="dim"))
        line = Text(key.name, style="cyan").append(f": {key.type} = {key.default}", style="default")
        console.print(Padding(line, (0, 0, 0, 2)))
        if key.meaning:
            console.print(Padding(Text(key.meaning), (0, 0, 0, 6)))
