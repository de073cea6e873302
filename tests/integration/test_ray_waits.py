"""Waits on real Ray actors: each failure names who failed at what."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from slime.config.cluster import ClusterConfig
from slime.errors import ConfigError, DeadlineExceeded, SlimeError
from slime.observability import doctor
from slime.observability.doctor import register_process
from slime.orchestration.placement import make_placement
from slime.orchestration.ray_cluster import connect, node_address
from slime.orchestration.waiting import wait_for


class Worker:
    def work(self) -> int:
        return 7

    def niceness(self) -> int:
        return os.nice(0)

    def refuse(self) -> None:
        raise ConfigError("--tensor-model-parallel-size 3 does not divide 4 heads")

    def crash(self) -> None:
        raise ZeroDivisionError("some bug")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def register(self, run_dir: str) -> None:
        register_process("train rank 1", Path(run_dir))

    def hang(self, signal_path: str) -> None:
        while not os.path.exists(signal_path):
            pass


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    # Workers cannot import this test module by name.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    connect(ClusterConfig(device="cpu"), num_slots=2)
    yield
    ray.shutdown()


@pytest.fixture
def worker():
    actor = ray.remote(Worker).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


def test_results_come_in_the_order_of_the_calls(worker):
    calls = {"a": worker.work.remote(), "b": worker.work.remote()}
    assert wait_for(calls, action="work", timeout_s=30.0) == [7, 7]


def test_actors_have_the_priority_of_the_driver(worker):
    calls = {"train rank 0": worker.niceness.remote()}
    assert wait_for(calls, action="tell", timeout_s=30.0) == [os.nice(0)]


def test_an_error_of_ours_comes_out_as_itself(worker):
    with pytest.raises(ConfigError, match="does not divide 4 heads"):
        wait_for({"train rank 0": worker.refuse.remote()}, action="start", timeout_s=30.0)


def test_a_bug_in_an_actor_names_the_actor(worker):
    with pytest.raises(SlimeError, match=r"train rank 0 failed to start(.|\n)*some bug"):
        wait_for({"train rank 0": worker.crash.remote()}, action="start", timeout_s=30.0)


def test_a_killed_actor_is_named(worker):
    with pytest.raises(SlimeError, match="train rank 3 died while it was to train"):
        wait_for({"train rank 3": worker.die.remote()}, action="train", timeout_s=30.0)


def test_a_deadline_names_only_who_is_late(worker, tmp_path):
    other = ray.remote(Worker).options(num_cpus=0).remote()
    assert wait_for({"other": other.work.remote()}, action="start", timeout_s=30.0) == [7]
    calls = {"fast": other.work.remote(), "slow": worker.hang.remote(str(tmp_path / "stop"))}
    with pytest.raises(DeadlineExceeded, match=r"^slow: did not sync within 2 s"):
        wait_for(calls, action="sync", timeout_s=2.0)
    (tmp_path / "stop").touch()


def test_a_deadline_leaves_everybodys_stacks_and_says_who_waits_for_whom(worker, tmp_path, request):
    register_process("driver", tmp_path)
    request.addfinalizer(doctor.unregister_process)
    wait_for({"worker": worker.register.remote(str(tmp_path))}, action="register", timeout_s=30.0)
    calls = {"train rank 1": worker.hang.remote(str(tmp_path / "stop"))}
    with pytest.raises(DeadlineExceeded) as caught:
        wait_for(calls, action="train on rollout 3", timeout_s=1.0)
    (tmp_path / "stop").touch()
    message = str(caught.value)
    assert message.startswith("train rank 1: did not train on rollout 3 within 1 s. All stacks")
    assert "waiting 1 s for train rank 1 to train on rollout 3" in message
    assert re.search(r"train rank 1 \(pid \d+\): no wait noted; in .*hang\(\)", message)
    (summary,) = (tmp_path / "doctor").glob("*/summary.txt")
    assert str(summary.parent) in message
    assert "in hang" in (summary.parent / "stacks-train-rank-1.txt").read_text()


def test_a_placement_that_does_not_fit_says_what_was_asked_and_what_is_free():
    too_many = ClusterConfig(
        device="cpu", actor_num_gpus_per_node=4000, rollout_num_gpus=2, startup_timeout_s=1.0
    )
    with pytest.raises(
        DeadlineExceeded, match=r"no room for 4002 slots .*training 4000, rollout 2.*free now"
    ):
        make_placement(too_many, device="cpu", train=True, rollout=True)


def test_one_node_talks_over_loopback():
    assert node_address() == "127.0.0.1"
