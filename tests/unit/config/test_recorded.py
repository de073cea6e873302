import argparse
import enum
import json
from pathlib import Path

import pytest

from slime.config.recorded import TableName, describe_parser, load_table, write_table


class Color(enum.Enum):
    red = 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    group = parser.add_argument_group("paint")
    group.add_argument("--color", default=Color.red, help="The  color\n of it.")
    group.add_argument("--sizes", type=int, nargs="+", choices=[1, 2])
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--no-bias", action="store_false", dest="bias")
    parser.add_argument("--mode", action="store_const", const="slow")
    parser.add_argument("--extra", type=json.loads)
    return parser


def test_rows_tell_how_each_option_is_read() -> None:
    rows = {row["dest"]: row for row in describe_parser(make_parser())}
    assert list(rows) == ["color", "sizes", "fast", "bias", "mode", "extra"]
    assert rows["color"] == {
        "flags": ["--color"],
        "dest": "color",
        "kind": "value",
        "type": "str",
        "group": "paint",
        "default": "red",
        "help": "The color of it.",
    }
    assert (rows["sizes"]["nargs"], rows["sizes"]["choices"]) == ("+", [1, 2])
    assert (rows["fast"]["kind"], rows["fast"]["flags"]) == ("negatable", ["--fast", "--no-fast"])
    assert rows["bias"]["kind"] == "false"
    assert (rows["mode"]["kind"], rows["mode"]["const"]) == ("const", "slow")
    assert rows["extra"]["type"] == "json"


def test_a_written_table_has_one_option_per_line(tmp_path: Path) -> None:
    rows = describe_parser(make_parser())
    write_table(str(tmp_path / "t.json"), "paint", "1.0", rows)
    text = (tmp_path / "t.json").read_text()
    assert json.loads(text) == {"package": "paint", "version": "1.0", "options": rows}
    assert len(text.splitlines()) == len(rows) + 2


@pytest.mark.parametrize(
    ("name", "package", "least"),
    [("megatron", "megatron-core", 800), ("sglang", "sglang", 450), ("router", "smg", 200)],
)
def test_tables_ship_with_the_package(name: TableName, package: str, least: int) -> None:
    table = load_table(name)
    assert table.package == package
    assert len(table.options) >= least


def test_prefixes_are_part_of_the_names() -> None:
    assert all(option.name.startswith("--sglang-") for option in load_table("sglang").options)
    assert all(option.name.startswith("--router-") for option in load_table("router").options)


def test_the_no_form_of_a_prefixed_switch_keeps_its_place() -> None:
    options = {option.dest: option for option in load_table("sglang").options}
    assert options["dllm_fdfo"].negations == ("--sglang-no-dllm-fdfo",)
