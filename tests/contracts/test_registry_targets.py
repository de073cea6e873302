"""What the registry promises exists."""

import importlib.util

import pytest

from slime.registry import TABLES, Table, lookup

ENTRIES = [(table, name) for table in TABLES for name in table]


@pytest.mark.parametrize(("table", "name"), ENTRIES, ids=lambda part: getattr(part, "title", part))
def test_every_name_leads_to_something(table: Table, name: str) -> None:
    module = table.path(name).partition(":")[0]
    assert importlib.util.find_spec(module) is not None
    assert lookup(table, name) is not None
