"""Which tests start first: the files that wait for processes, so that no worker ends with one."""

import pytest

_FIRST = (
    "integration/test_resume_exact.py",
    "integration/test_train_cpu.py",
    "integration/",
    "invariance/",
    "contracts/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder, the slowest first; `make test` hands the files out in this order."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    path = item.nodeid.removeprefix("tests/")
    return next(
        (place for place, start in enumerate(_FIRST) if path.startswith(start)), len(_FIRST)
    )
