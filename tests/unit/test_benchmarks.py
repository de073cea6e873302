"""What benchmarks make before they measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parents[2]


def test_the_races_countdown_makes_data_and_a_model(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "race" / "countdown.py"
    words = [sys.executable, str(script), str(tmp_path), "--num-demos", "5", "--num-prompts", "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "examples" / "quickstart")}
    subprocess.run(words, env=env, check=True, timeout=60)
    assert len((tmp_path / "data" / "demos.jsonl").read_text().splitlines()) == 5
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 3
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["max_position_embeddings"]) == (6, 512)
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
        sizes = [file.get_tensor(name).size for name in file.keys()]  # noqa: SIM118 - no mapping
    assert 4.3e6 < sum(sizes) < 4.7e6
