"""A progress bar where tqdm is installed and one is wanted."""

from typing import Any


class Progress:
    """A context that is told of finished work.

    Args:
        description: what is done.
        total: how many units in all.
        unit: what one is called.
        shown: whether to show a bar, with tqdm; text is shown in front of the description.

    Raises:
        ModuleNotFoundError: a bar is wanted and tqdm is not installed.
    """

    def __init__(self, description: str, total: int, unit: str, shown: bool | str) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            description = f"{shown}: {description}" if isinstance(shown, str) else description
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


class Bars:
    """Names the bars of a part of a report: which part it is of how many, and which bar of how many.

    Args:
        part: number and name, as ``"2/5 likelihood"``.
        shown: whether bars are shown.
    """

    def __init__(self, part: str, shown: bool) -> None:
        self._part, self._shown = part, shown
        self._done = self.total = 0

    def next(self) -> str | bool:
        """The name of the next bar; false where none is shown."""
        self._done += 1
        return f"{self._part}, {self._done} of {self.total}" if self._shown else False
