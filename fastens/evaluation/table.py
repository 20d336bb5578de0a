"""A table of a report, as Markdown and as LaTeX."""

from __future__ import annotations

import dataclasses
import re

_LATEX = {"±": r"$\pm$", "≥": r"$\ge$", "²": r"$^2$", "é": r"\'e"}


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text under a title.

    Attributes:
        title: what the table is of.
        head: names of the columns.
        rows: cells.
    """

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        """The lines of the table."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return ["|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |" for line in lines]

    def latex(self, label: str) -> str:
        """A ``table`` environment with booktabs' rules.

        Args:
            label: in front of the title in the environment's label.
        """
        lines = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in (self.head, *self.rows)]
        slug = re.sub(r"[^a-z0-9]+", "-", self.title.lower())
        columns = "l" + "r" * (len(self.head) - 1)
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        opening = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(self.title)}}}",
            rf"\label{{tab:{label}-{slug}}}",
        ]
        return "\n".join([*opening, *body, r"\end{tabular}", r"\end{table}"])


def _escaped(cell: str) -> str:
    text = re.sub(r"([%&_#$])", r"\\\1", cell)
    text = re.sub(r"(?<![\w.])[-+](?=\d)", lambda sign: f"${sign[0]}$", text)
    for sign, command in _LATEX.items():
        text = text.replace(sign, command)
    return text
