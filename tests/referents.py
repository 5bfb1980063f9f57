"""What an object refers to, in both builds."""

from __future__ import annotations

import gc


def referents(thing: object) -> list[object]:
    """What the garbage collector finds, and the attributes of compiled objects that it does not track."""
    names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__mypyc_attrs__", ())]
    return [*gc.get_referents(thing), *(getattr(thing, name, None) for name in names)]
