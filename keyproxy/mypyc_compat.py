"""`i64`: a machine integer in the compiled build, which mypyc makes; `int` in plain Python.

`mypyc_attr`: class options for mypyc; a no-op in plain Python.

    acyclic                       instances are never part of a cycle, so the garbage collector need not track them
    free_list_len                 the number of released instances that are kept for reuse
    allow_interpreted_subclasses  tests, which are not compiled, may extend the class

This module is not compiled: at run time the name exists whether or not mypy is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["i64", "mypyc_attr"]

if TYPE_CHECKING:
    from mypy_extensions import i64, mypyc_attr
else:
    i64 = int

    def mypyc_attr(**_attributes):
        """Return the decorated class unchanged: the options are for the compiler only."""
        return lambda described: described
