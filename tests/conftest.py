"""Property tests draw the same examples every time; `pytest --hypothesis-profile=random` draws new ones. No test depends on the clock."""

from __future__ import annotations

import gc

from hypothesis import HealthCheck, settings

settings.register_profile("fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", settings.get_profile("fixed"), derandomize=False, max_examples=1000)
settings.load_profile("fixed")

# The half million objects of imported libraries and collected tests stay till the end: to look through them again and again for garbage would
# take a twelfth of all time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
