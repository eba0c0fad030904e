"""A progress bar for long commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is told (done, total). The bar appears when first told, so that an early error stands alone."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True))
    shown = bar.add_task(title, total=None)

    with contextlib.ExitStack() as stack:
        def advance(done: int, total: int) -> None:
            if not bar.live.is_started:
                stack.enter_context(bar)
            bar.update(shown, completed=done, total=total)

        yield advance
