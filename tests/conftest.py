"""Settings that every test shares."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The machine that runs CI is shared and slow at times: time limits would fail for the wrong reason.
settings.register_profile("gnswap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gnswap")
