import pytest

from slime.errors import ConfigError
from slime.registry import TABLES, Table, lookup

COLORS = Table("color", {"red": "slime.errors:ConfigError", "green": "no.such.module:X"})


def test_lookup_imports_on_demand() -> None:
    assert lookup(COLORS, "red") is ConfigError


def test_an_unknown_name_lists_the_known_ones() -> None:
    message = r"unknown color 'rad'; did you mean 'red'\?; known: red, green"
    with pytest.raises(ConfigError, match=message):
        lookup(COLORS, "rad")


def test_a_table_knows_its_names() -> None:
    assert COLORS.names() == tuple(COLORS) == ("red", "green")
    assert "red" in COLORS
    assert "blue" not in COLORS


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_every_entry_is_a_module_and_an_attribute(table: Table) -> None:
    assert all(entry.count(":") == 1 for entry in table.entries.values())
