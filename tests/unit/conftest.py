"""What the unit tests share: how properties are searched for."""

from __future__ import annotations

from hypothesis import settings

# A slow machine is no defect, and a run leaves no files behind.
settings.register_profile("unit", deadline=None, database=None)
settings.load_profile("unit")
