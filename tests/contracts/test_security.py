"""What docs/security.md promises: who may listen where, who is let in, what is never unpickled."""

import datetime
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from aiohttp import web
from support.config_argv import base_argv
from support.engine_server import START_TIMEOUT_S, engine_spec, running
from support.fake_engine import fake_engine
from support.rollout_world import make_args
from support.tiny_models import save_tiny_model
from support.tiny_tokenizer import make_char_tokenizer

from slime.cli.parse import load_config
from slime.config.api_key import API_KEY_VARIABLE, settled_api_key, with_run_api_key
from slime.config.config import Config
from slime.data.chat import load_tokenizer, render
from slime.data.templates import FolderTokenizer
from slime.engines import client as engine_client
from slime.engines.client import EngineClient
from slime.engines.control import EngineControl
from slime.engines.embedded.launch import launch
from slime.engines.ports import hold_port
from slime.engines.rendezvous import listening_store
from slime.engines.router import Router
from slime.engines.servers import ServerProcess
from slime.errors import CheckpointError, ConfigError, DataError, EngineProtocolError
from slime.rollout.state import GenerateState
from slime.weights.gloo import make_gloo_group

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-of-this-run"
TIMEOUT = datetime.timedelta(seconds=20)


# --- a real engine and a real router ---


@dataclass(frozen=True)
class Servers:
    engine: ServerProcess
    router: Router

    @property
    def urls(self) -> tuple[str, str]:
        return self.engine.spec.url, self.router.url


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """They get their key the way a run gives it: by the environment."""
    folder = tmp_path_factory.mktemp("servers")
    spec = engine_spec(save_tiny_model(folder / "model"), folder)
    spec.env[API_KEY_VARIABLE] = KEY
    with running(spec) as engine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(API_KEY_VARIABLE, KEY)
            router = Router.start(
                host="127.0.0.1", log_path=folder / "router.log", options={},
                request_timeout_s=60, timeout_s=START_TIMEOUT_S,
            )  # fmt: skip
            router.add_engines([spec.url], START_TIMEOUT_S)
        yield Servers(engine, router)
        router.stop()


def listeners(process: psutil.Process) -> set[str]:
    """Addresses the process and its children listen at."""
    return {
        connection.laddr.ip
        for member in (process, *process.children(recursive=True))
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_engine_and_router_listen_on_loopback_only(servers: Servers) -> None:
    assert servers.router.process is not None
    for pid in (servers.engine.pid, servers.router.process.pid):
        assert listeners(psutil.Process(pid)) == {"127.0.0.1"}


def test_no_command_line_shows_the_key(servers: Servers) -> None:
    assert servers.router.process is not None
    for pid in (servers.engine.pid, servers.router.process.pid):
        members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        assert all(KEY not in word for member in members for word in member.cmdline())
    for path in servers.engine.spec.log_path.parent.glob("*.log"):
        assert KEY not in path.read_text(errors="replace")


GENERATE = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}, "return_logprob": True}
# A non-ASCII key once made the comparison itself raise.
WRONG_KEYS = (None, b"Bearer other", b"Bearer", KEY.encode(), b"Bearer k\xe9y")


@pytest.mark.parametrize("given", WRONG_KEYS)
def test_without_the_key_nobody_generates_or_registers(
    servers: Servers, given: bytes | None
) -> None:
    headers = {} if given is None else {b"Authorization": given}
    with httpx.Client(trust_env=False, headers=headers, timeout=30) as http:
        for url in servers.urls:
            assert http.post(url + "/generate", json=GENERATE).status_code == 401
        engine, router = servers.urls
        for path in ("/server_info", "/model_info", "/metrics", "/health_generate", "/v1/loads"):
            assert http.get(engine + path).status_code == 401
        for path in ("/pause_generation", "/update_weights_from_disk", "/abort_request"):
            assert http.post(engine + path, json={}).status_code == 401
        assert http.post(router + "/workers", json={"url": engine}).status_code == 401
        assert http.get(engine + "/health").status_code == 200


async def test_clients_of_the_run_send_the_key(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineProtocolError, match="401"):
        await EngineClient(servers.router.url, timeout_s=30).generate(GENERATE)
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    for url in servers.urls:
        client = EngineClient(url, timeout_s=30)
        answer = await client.generate(GENERATE)
        assert len(answer["meta_info"]["output_token_logprobs"]) == 2  # type: ignore[call-overload]
        await client.aclose()
    # A user's function, by the client that all of them share.
    assert (await engine_client.post(servers.router.url + "/generate", GENERATE))["meta_info"]
    await engine_client.close_clients()
    control = EngineControl([servers.engine.spec.url], timeout_s=30)
    assert control.get_all("/server_info")[0]["slime_engine"] == "embedded"
    control.close()


async def test_the_key_goes_to_the_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward function posts to a judge by the same client; the judge must not learn the key."""
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    async with fake_engine() as engine, fake_engine() as judge:
        state = GenerateState(make_args(engine.url))
        payload = {"input_ids": [1], "sampling_params": {}}
        for url in (engine.url, judge.url):
            await state.client.post(url + "/generate", payload)
            await engine_client.post(url + "/generate", payload)
        assert [headers.get("Authorization") for headers in engine.headers] == [f"Bearer {KEY}"] * 2
        assert [headers.get("Authorization") for headers in judge.headers] == [None] * 2


# --- where the key comes from, and where it does not go ---


def test_each_run_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    first, second = settled_api_key(Config()), settled_api_key(Config())
    assert first != second
    assert len(first) >= 32
    monkeypatch.setenv(API_KEY_VARIABLE, "from the environment".replace(" ", "-"))
    assert settled_api_key(Config()) == "from-the-environment"
    assert settled_api_key(Config(router_argv={"api_key": "flag"})) == "flag"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(sglang_argv={"api_key": "a"}, router_argv={"api_key": "b"}), "differ"),
        (Config(sglang_argv={"api_key": "two words"}), "visible ASCII"),
        (Config(sglang_argv={"api_key": "a\r\nX-Evil: 1"}), "visible ASCII"),
    ],
)
def test_a_key_that_cannot_work_is_refused_and_not_shown(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settled_api_key(config)
    assert "Evil" not in str(caught.value)


def test_secrets_show_neither_in_config_json_nor_in_argv(tmp_path: Path) -> None:
    custom = tmp_path / "custom.yaml"
    custom.write_text(
        "judge_api_key: s3cret\njudge:\n  HF_TOKEN: s3cret\n  name: j\nmax_x_token: 7\n"
    )
    argv = base_argv(tmp_path, sglang_api_key="s3cret", custom_config_path=str(custom))
    argv += ["--train-env-vars", '{"WANDB_API_KEY": "s3cret", "A": "b"}']
    config = load_config(argv)
    shown = config.to_json()
    assert "s3cret" not in shown
    assert '"judge_api_key": "***"' in shown
    assert '"max_x_token": 7' in shown
    assert '"reward_key": null' in shown
    spec = launch(config, index=0, host="127.0.0.1", port=1, log_dir=tmp_path)
    assert "s3cret" not in " ".join(spec.command)
    assert spec.env[API_KEY_VARIABLE] == "s3cret"
    with with_run_api_key(config) as inside:
        assert "api_key" not in inside.sglang_argv


# --- process groups ---


def test_the_stores_of_process_groups_listen_where_they_are_told() -> None:
    before = {connection.laddr for connection in psutil.Process().net_connections("inet")}
    store = listening_store("127.0.0.1", hold_port(), 1, TIMEOUT)
    group = make_gloo_group("127.0.0.1", hold_port(), 1, "alone", TIMEOUT)
    found = [
        connection.laddr
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr not in before
    ]
    assert len(found) >= 2
    assert {address.ip for address in found} == {"127.0.0.1"}
    store.set("name", "value")
    assert store.get("name") == b"value"
    del group, store


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"cannot listen at 127\.0\.0\.1:{port}"):
            listening_store("127.0.0.1", port, 1, TIMEOUT)


# --- code that comes with data ---

ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.mark.parametrize("load", [load_tokenizer, FolderTokenizer])
def test_a_chat_template_cannot_reach_out_of_its_sandbox(load: type, tmp_path: Path) -> None:
    tokenizer = load(make_char_tokenizer(tmp_path / "tokenizer", chat_template=ESCAPE))
    with pytest.raises(DataError, match="SecurityError"):
        render(tokenizer, [{"role": "user", "content": "hi"}], where="row 1")


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path: Path) -> None:
    folder = Path(make_char_tokenizer(tmp_path / "tokenizer"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: ...\n")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "tokenizer_class": "T"}'
    )
    with pytest.raises(CheckpointError, match="is not run"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


# What would run code from a file or a message. "file": why it may stand there.
_DANGEROUS = re.compile(
    r"pickle\.loads?\b|Unpickler|\bdill\b|cloudpickle|marshal\.|\bshelve\b|joblib"
    r"|torch\.load\((?!.*weights_only=True)|allow_pickle=True|yaml\.(unsafe_)?load\(|UnsafeLoader"
    r"|trust_remote_code=True|shell=True|os\.system|\beval\(|\bexec\(|verify=False"
    r"|extractall|0\.0\.0\.0|jinja2\.Environment\(|jinja2\.Template\("
)
_ALLOWED: dict[str, str] = {
    "slime/sandbox/runner.py": "programs of the model's: only in a process that is locked down",
    "slime/sandbox/modules.py": "bytecode of the interpreter's own modules and of --sandbox-packages",
    "examples/coding-agent/shell.py": "a program for the sandbox, where the agent's own run",
    "examples/coding-agent/coder.py": "bytecode of shell.py, made there, for the sandbox",
}
_HARMLESS = re.compile(r"\.eval\(|^\s*#")


def test_nothing_runs_code_from_files_or_messages() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("slime", "tools", "examples", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if _DANGEROUS.search(line) and not _HARMLESS.search(line)
    }
    assert {line for line in found if line.partition(":")[0] not in _ALLOWED} == set()


async def test_the_key_is_not_sent_on_by_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    async with fake_engine() as thief:

        async def away(_: web.Request) -> web.Response:
            raise web.HTTPTemporaryRedirect(thief.url + "/generate")

        app = web.Application()
        app.router.add_post("/generate", away)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        client = EngineClient(url, timeout_s=5)
        try:
            await client.post("/generate", {"input_ids": [1], "sampling_params": {}})
        except EngineProtocolError:
            pass
        finally:
            await client.aclose()
            await runner.cleanup()
        assert all("Authorization" not in headers for headers in thief.headers)
