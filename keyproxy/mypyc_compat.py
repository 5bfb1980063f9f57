"""What the sources say to mypyc, which makes the compiled build of them; to Python it means nothing.

    acyclic                       the garbage collector need not look at instances: none is ever part of a cycle
    free_list_len                 so many that are not needed any more are kept for the next ones
    allow_interpreted_subclasses  tests, which are not compiled, may extend it

A room of its own, which is not compiled: at run time the name is there, whether or not mypy is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["mypyc_attr"]

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_attributes):
        """See mypy_extensions."""
        return lambda described: described
