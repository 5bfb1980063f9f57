"""The patterns of prompt categories, compiled into one automaton of RE2, which takes linear time.

RE2 is the package google-re2, an optional dependency: `keyproxy[patterns]`. Some patterns are slow on some texts, such as
a long repetition of many characters. Such a text is matched in a thread, so that other requests do not wait for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final
