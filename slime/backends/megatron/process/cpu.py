"""CPU support: the one place that lets stock Megatron-Core run without CUDA.

Megatron-Core asks `torch.cuda` for streams, devices and random states in hundreds of places.
Patching `torch.cuda` itself breaks torch._dynamo, which registers torch's functions by identity. So
nothing in torch's namespace changes: after each `megatron.*` module has run, its global `torch` is
replaced by a proxy that answers the CUDA questions with CPU answers and passes everything else on.
Only six methods of Tensor and Module are wrapped in place, because Megatron calls them on objects
(`tensor.cuda()`), where no proxy can stand in between.

Checked against megatron-core 0.19.2 with torch 2.11.0. CUDA graphs, offloading and FSDP are not
covered.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import time
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import torch

logger = logging.getLogger(__name__)

_PACKAGE = "megatron"
_CPU = torch.device("cpu")
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like"),
    *("randperm", "tensor", "zeros", "zeros_like"),
)
_installed = False


def install() -> bool:
    """Make the coming imports of Megatron work without CUDA; True when this call did it.

    Does nothing when CUDA is available or when it was called before.

    Raises:
        RuntimeError: Megatron was imported already, so its modules hold the real torch.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return False
    early = [name for name in sys.modules if name.startswith(_PACKAGE + ".core")]
    if early:
        raise RuntimeError(
            f"{early[0]} was imported before slime.backends.megatron.process.cpu.install(); "
            "call install() first."
        )
    _wrap_methods()
    sys.meta_path.insert(0, _ProxyImporter(_torch_proxy()))
    _import_without_compiler()
    _installed = True
    return True


class _Proxy(types.ModuleType):
    """A module that answers from `answers` first and from the real module otherwise."""

    def __init__(self, real: types.ModuleType, answers: dict[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(answers)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _Stream:
    """A CUDA stream on a machine without one: everything is in order already."""

    device = _CPU
    stream_id = 0
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        pass

    wait_event = wait_stream
    synchronize = wait_stream

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__


class _Event:
    """A CUDA event that keeps host time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = time.perf_counter()

    def record(self, *args: Any) -> None:
        self._time = time.perf_counter()

    def wait(self, *args: Any) -> None:
        pass

    synchronize = wait

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end._time - self._time) * 1e3


def _torch_proxy() -> _Proxy:
    answers: dict[str, Any] = {name: _cpu_factory(getattr(torch, name)) for name in _FACTORIES}
    answers["cuda"] = _cuda_proxy()
    answers["distributed"] = _Proxy(
        torch.distributed, {"barrier": _barrier, "all_to_all_single": _all_to_all_single}
    )
    return _Proxy(torch, answers)


def _cuda_proxy() -> _Proxy:
    stream = _Stream()
    random_state = {
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
    }
    answers: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda value=None: contextlib.nullcontext(value),
        "device": lambda value=None: contextlib.nullcontext(value),
        "is_current_stream_capturing": lambda: False,
        "memory_stats": lambda *args, **kwargs: {},
        # validate_args wants 8 for grouped GEMMs; torch's grouped_mm runs on CPU.
        "get_device_capability": lambda *args, **kwargs: (8, 0),
        "get_device_properties": lambda *args, **kwargs: types.SimpleNamespace(major=8, minor=0),
        "default_generators": (torch.default_generator,),
        "random": _Proxy(torch.cuda.random, random_state),
        "nvtx": _Proxy(torch.cuda.nvtx, {"range_push": _nothing, "range_pop": _nothing}),
        **random_state,
    }
    silent = (
        "synchronize empty_cache set_device set_stream reset_peak_memory_stats cudart check_error"
    )
    answers.update(dict.fromkeys(silent.split(), _nothing))
    sizes = "memory_allocated memory_reserved max_memory_allocated max_memory_reserved"
    answers.update(dict.fromkeys(sizes.split(), lambda *args, **kwargs: 0))
    return _Proxy(torch.cuda, answers)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
    return torch.distributed.barrier(*args, **kwargs)


def _all_to_all_single(
    output: Any,
    input: Any,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    **kwargs: Any,
) -> Any:
    # The MoE dispatcher leaves its split sizes as CPU tensors, which gloo does not take.
    def plain(splits: Any) -> Any:
        return splits.tolist() if isinstance(splits, torch.Tensor) else splits

    return torch.distributed.all_to_all_single(
        output, input, plain(output_split_sizes), plain(input_split_sizes), **kwargs
    )


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _cpu_factory(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _wrap_methods() -> None:
    """Tensor and Module: `cuda`, `pin_memory`, `record_stream` and `to("cuda")` stay on CPU."""

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    tensor_class: Any = torch.Tensor
    module_class: Any = torch.nn.Module
    tensor_class.cuda = tensor_class.pin_memory = module_class.cuda = stay
    tensor_class.record_stream = _nothing
    tensor_class.to = _stay_on_cpu(tensor_class.to)
    module_class.to = _stay_on_cpu(module_class.to)
    tensor_class.type = _cuda_type_name(tensor_class.type)


def _stay_on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *(_CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    return wrapped


def _cuda_type_name(type_: Callable[..., Any]) -> Callable[..., Any]:
    # Megatron's optimizers sort parameters by the string "torch.cuda.FloatTensor".
    @functools.wraps(type_)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = type_(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith(_PACKAGE + "."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return wrapped


class _ProxyImporter(importlib.abc.MetaPathFinder):
    """Gives each `megatron.*` module the proxy in place of its global `torch`, once it has run."""

    def __init__(self, proxy: _Proxy) -> None:
        self._proxy = proxy

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        loader = spec.loader if spec is not None else None
        if isinstance(loader, importlib.machinery.SourceFileLoader):
            run = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                run(module)
                self._swap(module)

            loader.exec_module = exec_module
        return spec

    def _swap(self, module: types.ModuleType) -> None:
        for name, value in list(vars(module).items()):
            if value is torch:
                setattr(module, name, self._proxy)
            elif value is torch.distributed:
                setattr(module, name, self._proxy.distributed)


def _import_without_compiler() -> None:
    # `jit_fuser` is torch.compile and runs at import; compiling these kernels on CPU takes
    # minutes of C++ and gains nothing at the sizes a CPU trains.
    def identity(function: Any = None, **kwargs: Any) -> Any:
        return function if function is not None else lambda inner: inner

    compiler = torch.compile
    torch.compile = identity
    try:
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = compiler
