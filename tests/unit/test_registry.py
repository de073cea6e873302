from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_families import tiny_family_config

from slime import registry
from slime.checkpoint.convert import count_parameters, megatron_flags_from_hf
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


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with an architecture that slime does not know."""
    info = tmp_path / "models_of_a_user-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: models-of-a-user\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[slime.architectures]\nolmo_of_a_user = slime.checkpoint.architectures.olmo2:OLMO2\n"
        "olmo2 = no.such.module:X\n"
        "[slime.layers]\nolmo_of_a_user = slime_plugins.models.olmo2:get_olmo2_spec\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    yield
    registry._installed.cache_clear()


@pytest.mark.usefixtures("package")
def test_an_installed_package_adds_an_architecture_and_replaces_none() -> None:
    own = tiny_family_config("olmo2", vocab_size=106)
    other = own | {"model_type": "olmo_of_a_user"}
    assert megatron_flags_from_hf(other) == megatron_flags_from_hf(own)
    assert count_parameters(other) == count_parameters(own)
    assert registry.LAYERS.path("olmo_of_a_user") == registry.LAYERS.path("olmo2")
    assert "olmo_of_a_user" in registry.ARCHITECTURES.names()
    assert "olmo_of_a_user" not in registry.REWARDS


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_every_entry_is_a_module_and_an_attribute(table: Table) -> None:
    assert all(entry.count(":") == 1 for entry in table.entries.values())
