"""One live line while training: step, loss, tokens per second, time left.

On a terminal it is a tqdm bar, redrawn in place. Elsewhere (a log file, a batch job) it is one
plain line every few seconds, without control characters.
"""

from __future__ import annotations

import sys
import time
from io import TextIOBase

from jaxtyping import ArrayLike, Float
from tqdm import tqdm


class Progress:
    """Shows how far a run of `total` steps is; `initial` steps were done by an earlier process.

    `line_seconds` is the least time between two lines where there is no terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        stream: TextIOBase | None = None,
        line_seconds: float = 10.0,
    ):
        self._total, self._initial = total, initial
        self._stream = stream if stream is not None else sys.stderr
        self._line_seconds = line_seconds
        self._start = time.monotonic()
        self._last_line = -float("inf")
        self._waiting: str | None = None  # the newest line that was not due yet
        self._bar = self._make_bar() if self._stream.isatty() else None

    def update(self, step: int, *, loss: Float[ArrayLike, ""], tokens_per_second: float) -> None:
        """`step` steps are finished; call it as often as you like."""
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(loss, tokens_per_second), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        text = f"step {step}/{self._total}  {_figures(loss, tokens_per_second)}"
        self._waiting = f"{text}  ETA {tqdm.format_interval(self._seconds_left(step))}"
        if time.monotonic() - self._last_line >= self._line_seconds or step >= self._total:
            self._print_waiting()

    def message(self, text: str) -> None:
        """Prints a line of its own without breaking the live one."""
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the live line; what was shown last stays."""
        if self._bar is not None:
            self._bar.close()
        elif self._waiting is not None:
            self._print_waiting()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _make_bar(self) -> tqdm:
        return tqdm(
            total=self._total,
            initial=self._initial,
            file=self._stream,
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {postfix} ETA {remaining}",
        )

    def _seconds_left(self, step: int) -> float:
        done = step - self._initial
        elapsed = time.monotonic() - self._start
        return (self._total - step) * elapsed / done if done > 0 else 0.0

    def _print_waiting(self) -> None:
        print(self._waiting, file=self._stream, flush=True)
        self._last_line, self._waiting = time.monotonic(), None


class Silent:
    """What the processes of a run show that are not the first: nothing."""

    def update(self, step: int, *, loss: Float[ArrayLike, ""], tokens_per_second: float) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *unused) -> None:
        pass


def _figures(loss: Float[ArrayLike, ""], tokens_per_second: float) -> str:
    return f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
