"""A pretend accelerator: a device of its own whose values lie in host memory, so that it needs no hardware.

It fails where tensors of host and device meet, as CUDA does, and records the operations for which the host would have
to wait. `install` changes torch for the whole process: call it in its own process.
"""

import contextlib
import functools
import traceback
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
ROOT = Path(__file__).resolve().parents[3]
COPIES = {"_to_copy", "copy_", "_local_scalar_dense"}
"""Operations that may have tensors on both sides."""
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
"""Operations whose result, or its shape, the host must know."""
synchronizations: list[str] = []
"""Each operation that made the host wait, and the lines of this repository that called it."""


class DeviceModule(backend_registration._DummyBackendModule):
    """`torch.pretend`: what torch asks of the module of a device. Random numbers are those of the host."""

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None):
        pass

    def current_stream(self, device=None):
        return Stream()

    Stream = staticmethod(lambda *_, **__: Stream())
    stream = device = staticmethod(lambda *_: contextlib.nullcontext())


class Stream:
    """A stream whose work is done when it is queued. Two are never the same."""

    device_type = NAME

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass


class DeviceTensor(torch.Tensor):
    """A tensor on the pretend device, around one on the host that has its values."""

    @staticmethod
    def __new__(cls, values, requires_grad=False):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return torch.Tensor._make_wrapper_subclass(
            cls, values.size(), **layout, device=torch.device(NAME, 0), requires_grad=requires_grad
        )

    def __init__(self, values, requires_grad=False):
        self.values = values

    def __repr__(self, **_):
        return f"DeviceTensor({self.values!r})"

    def tolist(self):
        record_wait("tolist")
        return self.detach().values.tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert {NAME} device type tensor to numpy")

    def data_ptr(self):
        return self.values.data_ptr()

    def untyped_storage(self):
        return self.values.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), operation._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name not in COPIES:
            check_devices(operation, given)
        if waits(name, args, kwargs):
            record_wait(name)
        to = kwargs.pop("device", None)
        args, kwargs = tree_map_only(DeviceTensor, lambda tensor: tensor.values, (args, kwargs))
        if "device" in {argument.name for argument in operation._schema.arguments} and name != "_to_copy":
            kwargs["device"] = "cpu"
        result = operation(*args, **kwargs)
        if name == "_to_copy" and torch.device(to or (NAME if isinstance(given[0], cls) else "cpu")).type != NAME:
            return result
        if name == "copy_":
            return given[0]
        written = {id(tensor.values): tensor for tensor in given if isinstance(tensor, cls)}  # in place, and `out=`
        return tree_map_only(
            torch.Tensor, lambda value: written[id(value)] if id(value) in written else cls(value), result
        )


def check_devices(operation, given):
    """Raise the error of CUDA if host and device meet; only numbers and indices may be on the host."""
    for tensor in given:
        is_index = operation._schema.name.startswith("aten::index") and tensor.dtype in (torch.long, torch.bool)
        if not isinstance(tensor, DeviceTensor) and tensor.dim() and not is_index:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME} and cpu in {operation}"
            )


def waits(name, args, kwargs):
    """Return whether the host must wait for the device before it goes on."""
    if name == "_to_copy":
        to_host = torch.device(kwargs.get("device") or NAME).type != NAME
        return isinstance(args[0], DeviceTensor) and to_host
    if name == "copy_":
        return isinstance(args[1], DeviceTensor) and not isinstance(args[0], DeviceTensor)
    if name in ("index", "index_put", "index_put_"):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return name in WAITS


def record_wait(name):
    """Remember that the host waits, and where."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
    lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if __file__ != frame.filename]
    synchronizations.append(f"{name} at {' < '.join(reversed(lines[-3:]))}")


def install() -> torch.device:
    """Make the device known to torch and return it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, DeviceModule())
    # A module that moves to the device gets new parameters: data of another kind cannot be put into the old ones.
    torch.__future__.set_swap_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")
    for name, operation in {
        "empty.memory_format": torch.ops.aten.empty.memory_format,
        "empty_strided": torch.ops.aten.empty_strided.default,
    }.items():
        library.impl(name, functools.partial(make_empty, operation), "PrivateUse1")
    install.library = library  # its operations end with it
    make_tensor = torch.tensor

    def tensor(data, *, device=None, **options):
        made = make_tensor(data, **options)
        return made if device is None else made.to(device)

    torch.tensor = tensor
    return torch.device(NAME, 0)


def make_empty(operation, *args, **kwargs):
    """Return a new tensor on the device."""
    kwargs.pop("pin_memory", None)
    return DeviceTensor(operation(*args, **kwargs | {"device": "cpu"}))
