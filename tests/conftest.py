"""Property tests draw the same examples every time; `pytest --hypothesis-profile=random` draws new ones. No test depends on the clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", settings.get_profile("fixed"), derandomize=False, max_examples=1000)
settings.load_profile("fixed")
