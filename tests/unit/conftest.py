"""What the unit tests share: how properties are searched for."""

from __future__ import annotations

from hypothesis import Phase, settings

# A slow machine is no defect, and a run leaves no files behind.
settings.register_profile("unit", deadline=None, database=None, phases=[Phase.explicit, Phase.generate, Phase.shrink])
settings.load_profile("unit")
