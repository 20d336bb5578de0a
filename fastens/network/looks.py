"""Values by what holds them, and whether these are the same objects as before: natively, where there is a library."""

from __future__ import annotations

import array
import ctypes
import functools
import gc
import itertools
import types
from collections.abc import Callable, Iterable
from operator import is_, itemgetter
from typing import Any

from fastens import _native
from fastens.network.containers import keys_and_values

Look = Callable[[], Iterable[Any]]

_END = (object(),)
_GONE = LookupError, AttributeError, ValueError, RuntimeError  # a name, or a size, since it was found
_OFTEN = 3  # how often a question is answered by Python before it is put down for the library

# As in csrc/cpu/same_objects.cpp, of which an entry is four words: the owner, a key, a value, and how it holds them.
_UNDER_NAME, _ITEMS, _PAIRS = range(3)


def named(names: Any, wanted: Iterable[str]) -> Look:
    """A look at what a dictionary, or the names of a class, have under some names."""
    wanted = tuple(wanted)
    return functools.partial(itemgetter(*wanted * (1 + (len(wanted) == 1))), names)


def values_of(held: dict[Any, Any]) -> Look:
    """A look at all values of a dictionary."""
    return functools.partial(dict.values, held)


class Looks:
    """Values by what gives them, and whether these are the same objects as before.

    Args:
        looks: each gives some of the values, as they are when it is called.
    """

    def __init__(self, looks: list[Look]) -> None:
        try:
            before = tuple(_now(looks))
        except _GONE:
            before = (object(),)  # which nothing is
        self._known: _Known = (None, looks, before)
        self._asked = 0

    def same(self) -> bool:
        """Whether everything is the object that it was."""
        if not _holds(self._known):
            return False
        self._asked += 1
        if self._asked == _OFTEN:
            self._put_down()
        return True

    def _put_down(self) -> None:
        """Leave to the library what it can look at."""
        before = self._known
        told = [(look, _entries_of(look)) for look in before[1]]
        rest = [look for look, entries in told if entries is None]
        found = [entry for _, entries in told for entry in entries or ()]
        library = _native.functions()
        if library is None or not found:
            return
        try:
            known = _Held(library, found), rest, tuple(_now(rest))
        except _GONE:
            return
        if _holds(known) and _holds(before):  # the last of these says that it was put down as it was known
            self._known = known


_Entry = tuple[Any, Any, Any, int]


def _now(looks: list[Look]) -> Iterable[Any]:
    return itertools.chain.from_iterable([part for look in looks for part in (look(), _END)])


def _holds(known: _Known) -> bool:
    held, looks, before = known
    try:
        return (held is None or held.same() == 1) and all(map(is_, _now(looks), before))
    except _GONE:
        return False


def _entries_of(look: Any) -> list[_Entry] | None:
    """What a look sees now, for the library; none where that does not know how."""
    function = getattr(look, "func", None)
    if function in (dict.values, keys_and_values):
        (owner,) = look.args
        pairs = list(dict.items(owner))
        return [(owner, len(pairs), None, _PAIRS), *((None, key, value, 0) for key, value in pairs)]
    if function is list.__iter__:
        (owner,) = look.args
        values = list(list.__iter__(owner))
        return [(owner, len(values), None, _ITEMS), *((None, 0, value, 0) for value in values)]
    if type(function) is itemgetter:
        names = _dictionary_of(look.args[0])
        wanted = function.__reduce__()[1]
        if names is not None and names.keys() >= set(wanted):
            return [(names, name, names[name], _UNDER_NAME) for name in dict.fromkeys(wanted)]
    return None


def _dictionary_of(names: Any) -> dict[str, Any] | None:
    """A dictionary, or that of a class; none of others, whose items may be what they make of them."""
    if type(names) is types.MappingProxyType:
        names = next(iter(gc.get_referents(names)), None)
    return names if type(names) is dict else None


class _Held:
    """Entries as they are now: whether they still are is asked of the library."""

    def __init__(self, library: ctypes.PyDLL, entries: list[_Entry]) -> None:
        words = array.array("q")
        for owner, key, value, holds in entries:
            words.extend((id(owner), key if holds in (_ITEMS, _PAIRS) else id(key), id(value), holds))
        self._kept = entries, words  # whose addresses are in use
        function = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
        same = function(("fastens_same_objects", library))
        self.same = functools.partial(same, words.buffer_info()[0], len(entries))


_Known = tuple[_Held | None, list[Look], tuple[Any, ...]]
