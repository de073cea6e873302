"""The recorded options of other programs are those of the installed versions."""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from slime.config.recorded import Row, load_table

ROOT = Path(__file__).parents[2]
RERUN = "run: python tools/record_flag_tables.py"


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    path = ROOT / "tools" / "record_flag_tables.py"
    spec = importlib.util.spec_from_file_location("record_flag_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded_rows(name: str) -> list[Row]:
    import json

    path = ROOT / "slime" / "config" / "tables" / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["options"]


@pytest.mark.filterwarnings("ignore")
def test_megatron_table_is_that_of_the_installed_version(
    recorder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    from slime.backends.megatron.process.stock import load_megatron

    load_megatron()  # with its answers for a CPU, which later files of this process want first
    assert load_table("megatron").version == metadata.version("megatron-core")
    assert recorder.megatron_rows() == recorded_rows("megatron"), f"{RERUN} megatron"


def test_router_table_is_that_of_the_installed_version(recorder: ModuleType) -> None:
    assert load_table("router").version == metadata.version("smg")
    assert recorder.router_rows() == recorded_rows("router"), f"{RERUN} router"


@pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="sglang is in the extra `gpu` only"
)
def test_sglang_table_is_that_of_the_installed_version(recorder: ModuleType) -> None:
    assert load_table("sglang").version == metadata.version("sglang")
    recorded = {row["dest"]: row["flags"] for row in recorded_rows("sglang")}
    found = {row["dest"]: row["flags"] for row in recorder.sglang_rows()}
    assert found == recorded, f"{RERUN} sglang"


def test_reading_the_tables_imports_none_of_their_owners() -> None:
    import subprocess

    program = (
        "import sys\n"
        "from slime.config.index import command_line_index\n"
        "command_line_index()\n"
        "print([m for m in ('torch', 'megatron', 'smg', 'sglang', 'ray') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]"
