import pytest

from slime.engines import client


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(client, "MAX_BACKOFF_S", 0.002)
