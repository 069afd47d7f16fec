"""What a GPU cannot do is told before any model is loaded; the GPU is pretended."""

import pytest
import torch
from training_runs import settings

from ram.errors import UserError
from ram.log import pick_device
from ram.training import passes
from ram.training.logps import attend

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that this process has a GPU; return a function that says what the GPU can do."""
    monkeypatch.setattr(passes, "pick_device", lambda: torch.device("cuda"))

    def capable(bfloat16, fault=None):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
        )
        monkeypatch.setattr(passes, "kernel_fault", lambda device, dtype: fault)

    return capable


def test_gpu_without_bfloat16_is_told(gpu):
    """Auto takes float32 there, and no kernel for 16 bits is tried."""
    gpu(bfloat16=False, fault="not tried")
    passes.check_device(settings("model.fsdp_policy_mp=auto"))
    with pytest.raises(UserError, match="model.fsdp_policy_mp=bfloat16: .*set it to auto"):
        passes.check_device(settings("model.fsdp_policy_mp=bfloat16"))


def test_kernel_that_fails_is_told(gpu):
    """FSDP never tried the kernel that it would use."""
    gpu(bfloat16=True)
    passes.check_device(settings("model.fsdp_policy_mp=auto"))
    gpu(bfloat16=True, fault="no kernel image is available")
    with pytest.raises(UserError, match="no kernel image is available.*set packed=false"):
        passes.check_device(settings("model.fsdp_policy_mp=auto"))
    passes.check_device(settings("model.fsdp_policy_mp=auto", "packed=false"))
    passes.check_device(settings("model.fsdp_policy_mp=float32"))


def test_process_without_a_gpu_is_told(monkeypatch):
    """NPROC from a larger machine: torch names an invalid ordinal."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 has no GPU: this machine has 1; set NPROC to at most 1"):
        pick_device()


def test_cpu_needs_no_check(monkeypatch):
    monkeypatch.setattr(passes, "kernel_fault", lambda device, dtype: "not tried")
    passes.check_device(settings("model.fsdp_policy_mp=bfloat16"))


def failing(query, key, value, segments):
    raise RuntimeError("CUDA error: invalid argument\nCompile with TORCH_USE_CUDA_DSA")


def shifted(query, key, value, segments):
    return attend(query, key, value.roll(1, dims=2), segments)


@pytest.mark.parametrize(
    "kernel, expected",
    [
        (attend, None),
        (lambda *inputs: attend(*inputs) * (1 + 2**-8), None),  # rounding
        (failing, "CUDA error: invalid argument"),
        (shifted, "it is wrong by"),
        (lambda *inputs: attend(*inputs) * float("nan"), "it is wrong by nan"),
    ],
)
def test_fault_of_a_kernel_is_found(kernel, expected, monkeypatch):
    monkeypatch.setattr(passes, "attend_at_once", kernel)
    fault = passes.kernel_fault(CPU, torch.bfloat16)
    assert fault is None if expected is None else str(fault).startswith(expected)
