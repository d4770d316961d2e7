"""GPUs of any kind, seen without one: drivers, cards, streams and errors."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from drivers.common.cli import exit_on_user_error
from drivers.common.errors import UsageError
from drivers.policy import fsdp
from drivers.policy.devices import choose_devices, choose_dtype
from tests.drivers.helpers.letters import make_tiny_config


def test_out_of_gpu_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_user_error("train.py"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "train.py: the GPU is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...); lower "
        "--micro-batch-tokens, or pass --gradient-checkpointing on or --lora-rank 16\n"
    )


def test_gpu_that_torch_cannot_use_is_one_line(monkeypatch):
    """An old driver: NVML counts the devices, and CUDA cannot start."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for policy_device in ("auto", "cuda:1"):
        with pytest.raises(UsageError, match=r"has 2 CUDA devices, .* update the NVIDIA driver to 580 or newer"):
            choose_devices(make_tiny_config(policy_device=policy_device))
    assert choose_devices(make_tiny_config(policy_device="cpu")).policy.type == "cpu"


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_choose_dtype_emulated_bfloat16_is_not_chosen(is_native, dtype, monkeypatch):
    """vLLM refuses it on GPUs that emulate it."""

    def is_supported(including_emulation=True):
        return including_emulation or is_native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_choose_dtype_named_type_is_taken(name):
    assert choose_dtype(name, torch.device("cpu")) == getattr(torch, name)


def test_sharded_weight_is_gathered_on_default_stream_before_it_is_sent(monkeypatch):
    """On the sender's stream, a gather could wait for a broadcast that waits for it."""
    events, current = [], ["sender"]

    class Stream(SimpleNamespace):
        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

        def synchronize(self):
            events.append(f"{self.name} is finished")

    @contextmanager
    def use(stream):
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    class Gathered:
        def record_stream(self, stream):
            events.append(f"kept for {stream.name}")

    class Sharded:
        device = torch.device("cuda", 0)

        def full_tensor(self):
            events.append(f"gathered on {current[0]}")
            return Gathered()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(name=current[0]))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream(name="default"))
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.distributed.tensor, "DTensor", Sharded)
    assert isinstance(fsdp.full_tensor(Sharded()), Gathered)
    assert events == ["default waits for sender", "gathered on default", "default is finished", "kept for sender"]
