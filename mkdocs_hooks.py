"""What MkDocs does to the pages besides: docstrings' Sphinx roles are left out of the reference."""

import re


def on_page_content(html: str, **_: object) -> str:
    """Take ``:func:`` and the like from in front of names."""
    return re.sub(r":(?:func|class|mod|meth|attr):(?=<code>)", "", html)
