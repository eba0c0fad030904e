"""How far a long command is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_LOG_SECONDS = 60.0


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is told (done, total). The bar appears when first told, so that an early error stands alone."""
    if not sys.stderr.isatty():
        yield _logged(title)
        return
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


def _logged(title: str) -> Callable[[int, int], None]:
    told = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _LOG_SECONDS:
            told = time.monotonic()
            print(f"{title}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return advance
