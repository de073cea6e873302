"""Weights into SGLang's ranks by our receiver, over gloo; the servers are fakes that run it for real."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.fake_sglang import Engines, FakeSGLang, assert_holds, packed, serving
from torch import Tensor

from slime.checkpoint.block_fp8 import quantized
from slime.checkpoint.fp8_format import Fp8Format
from slime.engines.control import EngineControl
from slime.engines.sglang.invitation import note, request
from slime.engines.sglang.layout import Layout
from slime.errors import WeightSyncError
from slime.weights.receiver import ReceiverTransport
from slime.weights.sender import Sender
from slime.weights.sync import SyncReport, sync_weights
from slime.weights.transport import Bucket

SHAPES = {"model.norm.weight": (7,), "model.embed.weight": (31, 8), "lm_head.weight": (31, 8)}


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=generator).to(
            torch.float16 if "norm" in name else torch.float32
        )
        for name, shape in SHAPES.items()
    }


@contextmanager
def transport_to(
    *engines: FakeSGLang, has_same_weights: bool = False, flushes: bool = True
) -> Iterator[tuple[EngineControl, ReceiverTransport]]:
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(engine)).url for engine in engines]
        control = EngineControl(urls, timeout_s=20.0)
        transport = ReceiverTransport(
            control,
            host="127.0.0.1",
            timeout_s=20.0,
            way="gloo",
            has_same_weights=has_same_weights,
            flushes=flushes,
        )
        transport.open()
        yield control, transport
        transport.close()
        control.close()


def sync(
    control: EngineControl, transport: ReceiverTransport, content: dict[str, Tensor], version: str
) -> SyncReport:
    return sync_weights(
        content.items(),
        control=control,
        transport=transport,
        version=version,
        bucket_bytes=1100,
        verify=True,
    )


@pytest.fixture(scope="module")
def fakes() -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.end()


def test_every_rank_of_every_engine_gets_every_sync_bit_for_bit(fakes: Engines) -> None:
    old = (weights(0),)
    engines = fakes.make([old, old], [old])
    with transport_to(*engines) as (control, transport):
        for seed in (1, 2):
            report = sync(control, transport, weights(seed), str(seed))
            assert_holds(engines, weights(seed))
            assert [one.version for one in engines] == [str(seed)] * 2
            assert report.num_buckets == 2
            assert report.digest
    # One request for a whole sync, and one to say goodbye.
    assert engines[0].paths.count("/update_weights_from_tensor") == 3


@pytest.mark.parametrize("flushes", [True, False])
def test_a_cache_is_emptied_only_where_no_request_may_be_paused(
    fakes: Engines, flushes: bool
) -> None:
    engines = fakes.make([(weights(0),)])
    with transport_to(*engines, flushes=flushes) as (control, transport):
        sync(control, transport, weights(1), "1")
    # The goodbye empties nothing.
    assert engines[0].flushes == [flushes, False]


def test_weights_in_8_bits_arrive_bit_for_bit_under_the_names_of_their_checkpoint(
    fakes: Engines,
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    dtypes = {name: "F8_E4M3", f"{name}_scale_inv": "F32", "model.norm.weight": "BF16"}
    form = Fp8Format("/fp8", dtypes)

    def trained(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {name: (200, 130), "model.norm.weight": (130,)}
        return {n: torch.randn(*s, generator=generator).bfloat16() for n, s in shapes.items()}

    def expected(seed: int) -> dict[str, Tensor]:
        small, scales = quantized(trained(seed)[name])
        return {name: small, f"{name}_scale_inv": scales} | {
            "model.norm.weight": trained(seed)["model.norm.weight"]
        }

    engines = fakes.make([(expected(0),), (expected(0),)])
    with transport_to(*engines) as (control, transport):
        report = sync(control, transport, dict(form.of(trained(1).items())), "1")
    assert report.num_tensors == 3
    assert_holds(engines, expected(1))


def test_the_first_sync_may_have_to_change_nothing(fakes: Engines) -> None:
    engines = fakes.make([(weights(1),), (weights(1),)])
    with transport_to(*engines, has_same_weights=True) as (control, transport):
        sync(control, transport, weights(1), "1")
        sync(control, transport, weights(2), "2")
        assert_holds(engines, weights(2))


def test_a_first_sync_that_changes_what_was_loaded_from_the_same_files_is_refused(
    fakes: Engines,
) -> None:
    wrong = weights(1)
    wrong["lm_head.weight"][3, 3] += 1.0
    engines = fakes.make([(wrong,)])
    with transport_to(*engines, has_same_weights=True) as (control, transport):
        with pytest.raises(WeightSyncError, match=r"but 1 of their parameters .*: lm_head_weight"):
            sync(control, transport, weights(1), "1")
        assert engines[0].version == "default"
        assert "/continue_generation" not in engines[0].paths


@pytest.mark.parametrize("is_noted", [True, False])
def test_what_was_loaded_is_noted_before_the_memory_is_given_away(
    fakes: Engines, is_noted: bool
) -> None:
    (engine,) = fakes.make([(weights(1),), (weights(1),)])
    with transport_to(engine, has_same_weights=True) as (control, transport):
        if is_noted:
            body = request([note(0), note(1)], flush=False)
            control.post_all("/update_weights_from_tensor", body)
        for rank in engine.ranks:  # back with what happens to be there
            rank.call("begin", {name: packed(0 * x + 7) for name, x in weights(1).items()})
        expected = nullcontext() if is_noted else pytest.raises(WeightSyncError, match="come back")
        with expected:
            sync(control, transport, weights(1), "1")
        assert_holds([engine], weights(1))


def test_a_parameter_that_no_tensor_reaches_is_named(fakes: Engines) -> None:
    more = weights(1) | {"model.unknown.weight": torch.ones(3)}
    engines = fakes.make([(more,)])
    with (
        transport_to(*engines, has_same_weights=True) as (control, transport),
        pytest.raises(WeightSyncError, match=r"1 of their parameters .*: model_unknown_weight"),
    ):
        sync(control, transport, weights(1), "1")


def test_a_tensor_that_an_engine_cannot_load_is_an_error_and_not_its_end(fakes: Engines) -> None:
    engines = fakes.make([(weights(0),)], [(weights(0),), (weights(0), "lm_head.weight")])
    with transport_to(*engines) as (control, transport):
        message = r"receiver 3 of 3 could not take bucket 1: KeyError: 'lm_head.weight'"
        with pytest.raises(WeightSyncError, match=message):
            sync(control, transport, weights(1), "1")
        assert control.get_all("/server_info")
        assert [one.version for one in engines] == ["default"] * 2


def test_an_engine_that_refuses_is_named_long_before_the_deadline(fakes: Engines) -> None:
    started = time.monotonic()
    engines = fakes.make([(weights(0),)], breaks=True)
    with (
        transport_to(*engines) as (control, transport),
        pytest.raises(WeightSyncError, match="the scheduler is gone"),
    ):
        sync(control, transport, weights(1), "1")
    assert time.monotonic() - started < 10.0


def test_a_wrong_bit_in_one_expert_of_a_stack_is_named(
    fakes: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    stacks = [torch.randn(8, 4, 16) for _ in range(2)]
    first, second = ({name.format(e): x for e, x in enumerate(stack)} for stack in stacks)
    (engine,) = fakes.make([(first,), (first,)])
    filled = Sender._filled

    def damaged(self: Sender, bucket: Bucket, layout: Layout, place: int) -> Any:
        assert [len(strip) for strip in bucket.strips] == [4]  # a stack is sent as one
        buffer, flat = filled(self, bucket, layout, place)
        if name.format(6) in bucket.names:
            layout.tensors(flat)[2].view(torch.int32)[3, 9] ^= 1
        return buffer, flat

    with transport_to(engine) as (control, transport):
        sync(control, transport, first, "1")
        monkeypatch.setattr(Sender, "_filled", damaged)
        with pytest.raises(WeightSyncError, match=rf"{re.escape(name.format(6))} has checksum"):
            sync(control, transport, second, "2")
        assert engine.version == "1"


def test_layouts_are_told_once(fakes: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    text = Layout.text
    monkeypatch.setattr(Layout, "text", lambda self: told.append(1) or text(self))
    engines = fakes.make([(weights(0),)], [(weights(0),)])
    with transport_to(*engines) as (control, transport):
        for seed in (1, 2, 3):
            sync(control, transport, weights(seed), str(seed))
            assert len(told) == 2  # as many as buckets
        fewer = {n: t for n, t in weights(4).items() if "norm" not in n}
        sync(control, transport, fewer, "4")
        assert_holds(engines, weights(3) | fewer)


def test_a_transport_must_be_opened() -> None:
    control = EngineControl((), timeout_s=1.0)
    transport = ReceiverTransport(control, host="127.0.0.1", timeout_s=1.0, way="gloo")
    with pytest.raises(WeightSyncError, match="open"):
        sync(control, transport, weights(1), "1")
    control.close()
