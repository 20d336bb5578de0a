"""A progress bar where tqdm is installed and one is wanted."""

from typing import Any


class Progress:
    """A context that is told of finished work.

    Args:
        description: what is done.
        total: how many units in all.
        unit: what one is called.
        shown: whether to show a bar, with tqdm.

    Raises:
        ModuleNotFoundError: a bar is wanted and tqdm is not installed.
    """

    def __init__(self, description: str, total: int, unit: str, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=description, unit=unit)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int = 1, **facts: Any) -> None:
        """Tell of ``done`` more units, and show ``facts`` beside the bar."""
        if self._bar is not None:
            if facts:
                self._bar.set_postfix(facts, refresh=False)
            self._bar.update(done)
