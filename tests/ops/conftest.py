import jax
import pytest


@pytest.fixture(scope="session")
def _all_compilations() -> list[str]:
    events: list[str] = []

    def listen(event: str, duration: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


@pytest.fixture
def compilations(_all_compilations) -> list[str]:
    """Grows by one with everything that XLA compiles."""
    _all_compilations.clear()
    return _all_compilations
