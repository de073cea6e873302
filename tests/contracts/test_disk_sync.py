"""Weights through files into real engines: the embedded one, and the stock SGLang server with our receiver."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.device import DEVICE
from support.engine_server import engine_spec, running, sglang_spec
from support.tiny_models import save_tiny_model, tiny_model

from slime.checkpoint.hf import INDEX_NAME
from slime.engines.control import EngineControl
from slime.engines.protocol import PauseMode
from slime.engines.sglang.invitation import RECEIVER
from slime.errors import WeightSyncError
from slime.weights.delta_versions import DeltaVersions
from slime.weights.disk import DiskTransport, load_from_disk, prove_tensors
from slime.weights.local_copy import Stale, bring
from slime.weights.sync import SyncReport
from slime.weights.versions import VersionFolder, Versions, WholeVersions

TIMEOUT_S = 120.0
TOLERANCE = 2e-5 if DEVICE == "cpu" else 0.1
PROMPT = [11, 3, 28, 29]


class Engine:
    """A running server and the calls to it."""

    def __init__(self, url: str, kind: str) -> None:
        self.kind = kind
        self.control = EngineControl((url,), timeout_s=TIMEOUT_S)
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)

    def answer(self) -> tuple[list[int], list[float]]:
        """A greedy answer of eight tokens to PROMPT and its log-probs."""
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 8}
        body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True}
        reply: dict[str, Any] = self._http.post("/generate", json=body).json()
        self.version = reply["meta_info"]["weight_version"]
        rows = reply["meta_info"]["output_token_logprobs"]
        return [row[1] for row in rows], [row[0] for row in rows]

    def close(self) -> None:
        self.control.close()
        self._http.close()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(
    scope="module", params=["embedded", pytest.param("sglang", marks=pytest.mark.sglang)]
)
def engine(
    request: pytest.FixtureRequest, model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    logs = tmp_path_factory.mktemp("logs")
    if request.param == "sglang":
        options = ("--max-total-tokens", "4096", "--custom-weight-loader", RECEIVER)
        spec = sglang_spec(model_path, logs, "--max-running-requests", "4", *options)
    else:
        spec = engine_spec(model_path, logs, "--max-running-requests", "4")
    with running(spec):
        found = Engine(spec.url, request.param)
        yield found
        found.close()


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    return tiny_model("qwen3").eval()


def log_probs_of(model: Any, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT + ids])).logits[0]
    scores = torch.log_softmax(logits.float(), -1)[len(PROMPT) - 1 : -1]
    return scores.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def assert_serves(engine: Engine, model: Any, version: str) -> None:
    ids, found = engine.answer()
    assert found == pytest.approx(log_probs_of(model, ids), abs=TOLERANCE)
    assert engine.version == version


def folder(tmp_path: Path, model_path: Path) -> VersionFolder:
    return VersionFolder(tmp_path / "shared", config_from=model_path, keeps=False, patience_s=0.0)


def transport_of(engine: Engine, versions: Versions, copies: Any = None) -> DiskTransport:
    transport = DiskTransport(
        engine.control, versions, copies=copies, host="127.0.0.1", timeout_s=TIMEOUT_S
    )
    transport.open()
    return transport


def sync(engine: Engine, transport: DiskTransport, model: Any, version: str) -> SyncReport:
    mode = PauseMode.ABORT if engine.kind == "sglang" else PauseMode.RETRACT
    return transport.sync(model.state_dict().items(), version, verify=True, pause_mode=mode)


class OneHost:
    """The copy of this host."""

    def __init__(self, local_dir: Path) -> None:
        self.local_dir = str(local_dir)

    def bring(self, version: Path) -> list[str]:
        try:
            bring(version, self.local_dir)
        except Stale as reason:
            return [str(reason)]
        return []

    def close(self) -> None:
        pass


def test_whole_versions(engine: Engine, model_path: Path, tmp_path: Path) -> None:
    transport = transport_of(engine, WholeVersions(folder(tmp_path, model_path)))
    for seed in (1, 2):
        report = sync(engine, transport, model_of(seed), str(seed))
        assert report.verified_by == ("engines" if engine.kind == "embedded" else "receivers")
        assert_serves(engine, model_of(seed), str(seed))
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["weight_v000002"]


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_what_changed_only(engine: Engine, model_path: Path, tmp_path: Path, encoding: Any) -> None:
    place = folder(tmp_path, model_path)
    versions = DeltaVersions(place, encoding=encoding, checksum="xxh3-128")
    transport = transport_of(engine, versions, OneHost(tmp_path / "local"))
    model = model_of(3)
    assert sync(engine, transport, model, "1").density is None
    assert_serves(engine, model, "1")
    for version in ("2", "3"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mlp" in name:
                    parameter.mul_(1.5)
        report = sync(engine, transport, model, version)
        assert report.density is not None
        assert 0 < report.density < 0.5
        assert report.num_bytes < (model_path / "model.safetensors").stat().st_size
        assert_serves(engine, model, version)
    if engine.kind == "embedded":  # SGLang ends itself
        with pytest.raises(WeightSyncError, match="shape"):  # changes alone are no model
            load_from_disk(engine.control, place.path / "weight_v000003")


def test_an_interrupted_version_has_no_name_to_be_loaded_by(
    engine: Engine, model_path: Path, tmp_path: Path
) -> None:
    transport = transport_of(engine, WholeVersions(folder(tmp_path, model_path)))
    sync(engine, transport, model_of(1), "1")
    state = model_of(2).state_dict()

    def cut_short() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(state.items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transport.sync(cut_short(), "2", verify=True, pause_mode=PauseMode.ABORT)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["weight_v000001"]
    assert_serves(engine, model_of(1), "1")  # it was not even paused


def test_another_hosts_view_of_the_files_is_noticed(
    engine: Engine, model_path: Path, tmp_path: Path
) -> None:
    transport = transport_of(engine, WholeVersions(folder(tmp_path, model_path)))

    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"][3] += 1
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    with pytest.raises(WeightSyncError, match=r"does not hold .*model\.norm\.weight"):
        transport.sync(
            model_of(1).state_dict().items(),
            "1",
            verify=True,
            pause_mode=PauseMode.ABORT,
            written=damage,
        )
    sync(
        engine, transport_of(engine, WholeVersions(folder(tmp_path, model_path))), model_of(2), "2"
    )
    assert_serves(engine, model_of(2), "2")


@pytest.mark.sglang
def test_a_checkpoint_proves_that_tensors_bring_what_files_do(
    engine: Engine, model_path: Path
) -> None:
    if engine.kind == "embedded":
        pytest.skip("SGLang's matter")
    assert not (model_path / INDEX_NAME).exists()
    prove_tensors(engine.control, model_path, host="127.0.0.1", timeout_s=TIMEOUT_S)
