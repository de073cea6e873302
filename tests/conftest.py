"""Which tests start first: the files that wait for processes, so that no worker ends with one.

And a fixture for tests that set logging up.
"""

import logging
from collections.abc import Iterator

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


@pytest.fixture
def root_logger_as_before() -> Iterator[None]:
    """What the test adds to the root logger is gone after it, and files are closed."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [item for item in root.handlers if item not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def _place(item: pytest.Item) -> int:
    path = item.nodeid.removeprefix("tests/")
    return next(
        (place for place, start in enumerate(_FIRST) if path.startswith(start)), len(_FIRST)
    )
