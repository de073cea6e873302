import os
import resource
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from slime.engines.ports import hold_port
from slime.engines.servers import (
    OPEN_FILES,
    ServerProcess,
    ServerSpec,
    command_line,
)
from slime.errors import EngineUnavailable


def spec(tmp_path, code: str, port: int = 0) -> ServerSpec:
    return ServerSpec(
        name="engine-7",
        command=(sys.executable, "-c", code),
        url=f"http://127.0.0.1:{port}",
        health_path="/",
        log_path=tmp_path / "logs" / "engine-7.log",
    )


def test_a_server_that_dies_while_starting_is_named_with_the_end_of_its_log(tmp_path):
    server = ServerProcess(spec(tmp_path, "import sys; sys.exit('no such model')"))
    with pytest.raises(
        EngineUnavailable, match=r"engine-7 ended with exit code 1(.|\n)*no such model"
    ):
        server.wait_healthy(20.0)


def test_a_server_that_never_answers_meets_its_deadline(tmp_path):
    server = ServerProcess(spec(tmp_path, "import time; time.sleep(60)", hold_port()))
    with pytest.raises(EngineUnavailable, match="was not ready after 0 s"):
        server.wait_healthy(0.3)
    server.stop()
    assert not server.is_alive()


def test_a_healthy_server_is_waited_for_and_stopped(tmp_path):
    port = hold_port()
    code = f"import http.server as h; h.HTTPServer(('127.0.0.1', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
    server = ServerProcess(spec(tmp_path, code, port))
    server.wait_healthy(20.0)
    assert server.is_alive()
    server.stop()
    assert not server.is_alive()


def test_a_stopped_server_is_killed_at_once(tmp_path):
    server = ServerProcess(spec(tmp_path, "import time; time.sleep(60)"))
    os.kill(server.pid, signal.SIGSTOP)
    server.kill()
    assert not server.is_alive()
    assert server.describe_end() == "signal SIGKILL"


def test_children_of_a_dead_server_are_killed_too(tmp_path):
    child = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True)"
    )
    server = ServerProcess(spec(tmp_path, child))
    assert server._process.wait(60.0) == 0
    pid = int(server.log_tail())
    server.kill()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10.0)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_outlives_the_thread_that_started_it(tmp_path):
    # PDEATHSIG is sent when the starting *thread* ends.
    started: list[ServerProcess] = []
    code = "import time; time.sleep(60)"
    thread = threading.Thread(target=lambda: started.append(ServerProcess(spec(tmp_path, code))))
    thread.start()
    thread.join()
    server = started[0]
    with pytest.raises(subprocess.TimeoutExpired):
        server._process.wait(0.3)
    server.kill()


def test_options_become_flags():
    options = {"model_path": "m", "flag": True, "off": False, "none": None, "list": [1, 2]}
    assert command_line(options) == ["--model-path", "m", "--flag", "--list", "1", "2"]


def test_a_server_may_open_more_files_than_the_soft_limit_of_the_shell(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
        server = ServerProcess(spec(tmp_path, code))
        server._process.wait(20.0)
        assert server.log_tail().strip() == str((min(before[1], OPEN_FILES), before[1]))
        # Its clients are in this process.
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
