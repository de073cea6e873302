"""Weights arrive over a real gloo group, whose rank 0 is another process."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slime.engines.control_requests import DistributedUpdate, WeightsGroup
from slime.engines.embedded.weight_groups import WeightGroups
from slime.errors import EngineProtocolError, WeightSyncError

# Rank 0 as the engine protocol describes it, written down without slime.
TRAINER = """
import datetime, os, sys, torch, torch.distributed as dist
port, timeout = int(sys.argv[1]), datetime.timedelta(seconds=60)
torch.set_num_threads(1)
store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, timeout=timeout, wait_for_workers=False)
group = dist.ProcessGroupGloo(dist.PrefixStore("g", store), 0, 2, timeout)
options = dist.BroadcastOptions(); options.rootRank = 0; options.rootTensor = 0
sent = [torch.arange(12.).view(3, 4), torch.arange(5).to(torch.bfloat16), torch.ones(())]
for tensor in sent:
    group.broadcast([tensor.contiguous().view(-1)], options).wait()
flat = torch.cat([(tensor + 1).reshape(-1).view(torch.uint8) for tensor in sent])
group.broadcast([flat], options).wait()
os._exit(0)  # an interpreter that ends beside gloo's threads now and then aborts (one run in 40)
"""


def test_another_load_format_is_refused() -> None:
    with pytest.raises(EngineProtocolError, match="load_format 'strange'"):
        update(load_format="strange")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def group(port: int, join_timeout_s: float = 60.0) -> WeightsGroup:
    return WeightsGroup(
        master_address="127.0.0.1",
        master_port=port,
        rank=1,
        world_size=2,
        group_name="g",
        timeout_s=60.0,
        join_timeout_s=join_timeout_s,
    )


def update(**changes: object) -> DistributedUpdate:
    body = {
        "names": ["a", "b", "c"],
        "dtypes": ["float32", "bfloat16", "float32"],
        "shapes": [[3, 4], [5], []],
        "group_name": "g",
    }
    return DistributedUpdate.from_json(body | changes)


def test_tensors_arrive_in_order_and_shape(tmp_path: Path) -> None:
    port = free_port()
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(port)], cwd=tmp_path)
    try:
        groups = WeightGroups()
        groups.join(group(port))
        with pytest.raises(WeightSyncError, match="exists already"):
            groups.join(group(port))
        received = groups.receive(update())
        assert [name for name, _ in received] == ["a", "b", "c"]
        tensors = [tensor for _, tensor in received]
        assert torch.equal(tensors[0], torch.arange(12.0).view(3, 4))
        assert torch.equal(tensors[1], torch.arange(5).to(torch.bfloat16))
        assert tensors[2].shape == ()
        # The same tensors plus one, as the bytes of one tensor: 48, 10 and 4 of them.
        flat = [tensor for _, tensor in groups.receive(update(load_format="flattened_bucket"))]
        assert all(torch.equal(new, old + 1) for new, old in zip(flat, tensors, strict=True))
        assert groups.leave("g")
        assert not groups.leave("g")
        assert trainer.wait(60) == 0
    finally:
        trainer.kill()
        trainer.wait()


def test_a_trainer_that_never_comes_is_named_after_the_deadline() -> None:
    with pytest.raises(WeightSyncError, match="cannot join weight group 'g' as rank 1"):
        WeightGroups().join(group(free_port(), join_timeout_s=0.5))


def test_an_update_for_an_unknown_group_or_dtype_is_refused() -> None:
    groups = WeightGroups()
    with pytest.raises(WeightSyncError, match="joined: none"):
        groups.receive(update())
