from slime.observability.diagnosis import Patient, missing_ranks, summarize
from slime.observability.stacks import Frame, parse_stacks, telling_frame
from slime.observability.waits import WaitRow

_IN_GLOO = """\
Thread 0x00000000000000aa (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 359 in wait

Current thread 0x00000000000000bb (most recent call first):
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/v/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/v/slime/backends/megatron/passes/micro_batches.py", line 88 in reduce
"""
_IN_HOOK = """\
Current thread 0x00000000000000bb (most recent call first):
  File "/home/me/hooks.py", line 12 in before_step
  File "/v/slime/training/update.py", line 90 in run_update
"""


def _patient(role: str, *waits: WaitRow, stacks: str = "", **more: object) -> Patient:
    defaults = {"pid": 7, "host": "h", "state": "answers", "main_thread": 0xBB}
    return Patient(role=role, waits=waits, stacks=stacks, **{**defaults, **more})  # pyright: ignore


def test_stacks_are_read_per_thread():
    threads = parse_stacks(_IN_GLOO)
    assert list(threads) == [0xAA, 0xBB]
    assert threads[0xBB][0] == Frame(
        "/v/site-packages/torch/distributed/distributed_c10d.py", 2810, "all_reduce"
    )


def test_stacks_of_py_spy_are_read_too():
    text = 'Process 7: x\nThread 7 (idle): "MainThread"\n    wait (/home/me/a.py:12)\n'
    assert parse_stacks(text) == {7: [Frame("/home/me/a.py", 12, "wait")]}


def test_the_telling_frame_is_the_innermost_of_the_users_or_ours():
    assert (
        str(telling_frame(parse_stacks(_IN_HOOK), 0xBB)) == "before_step() at /home/me/hooks.py:12"
    )
    frame = telling_frame(parse_stacks(_IN_GLOO), 0xBB)
    assert frame is not None
    assert frame.function == "reduce"


def test_the_rank_missing_in_a_collective_is_named():
    ranks = [
        _patient("train rank 0", stacks=_IN_GLOO),
        _patient("train rank 1", stacks=_IN_HOOK),
        _patient("train rank 2", stacks=_IN_GLOO),
        _patient("train rank 3", state="ended"),
    ]
    assert missing_ranks(ranks) == [
        "train ranks 0, 2 wait in a collective (all_reduce) for train ranks 1, 3, which are not in one"
    ]
    assert missing_ranks(ranks[:1]) == []


def test_the_summary_follows_the_waits_from_the_driver():
    engine = _patient("engine-0", address="http://127.0.0.1:4", stacks=_IN_HOOK)
    manager = _patient(
        "rollout manager",
        WaitRow(on="http://127.0.0.1:4", what="answer POST /generate", count=12, waited_s=305.0),
    )
    driver = _patient(
        "driver", WaitRow(on="rollout manager", what="generate rollout 3", waited_s=312.4)
    )
    stranger = _patient("train rank 0")
    assert summarize([engine, manager, stranger, driver], "h") == [
        "driver (pid 7): waiting 312 s for rollout manager to generate rollout 3",
        "rollout manager (pid 7): waiting 305 s for http://127.0.0.1:4 to answer POST /generate "
        "(12 such waits)",
        "engine-0 (pid 7): no wait noted; in before_step() at /home/me/hooks.py:12",
        "train rank 0 (pid 7): no wait noted",
    ]


def test_rank_1_is_not_taken_for_rank_10():
    ranks = [_patient("train rank 1"), _patient("train rank 10")]
    driver = _patient("driver", WaitRow(on="train rank 10", what="train"))
    lines = summarize([*ranks, driver], "h")
    assert [line.split(" (")[0] for line in lines] == ["driver", "train rank 10", "train rank 1"]
