"""Attention by lengths: the check before a kernel is used, and keys that must not count."""

import pytest
import torch
import varlen

from ram.models import by_length
from ram.models.by_length import attend, kernel_fault, lengths

CPU, SIZES = torch.device("cpu"), (4, 2, 8)


@pytest.mark.parametrize("sizes", [SIZES, (2, 2, 16)])
def test_right_kernel_passes_its_check(sizes, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen.varlen_attn)
    assert kernel_fault(CPU, torch.bfloat16, *sizes) is None


@pytest.mark.parametrize(
    "change",
    [{"seqused_k": 1}, {"seqused_k": -1}, {"scale": 0.5}],
    ids=["a key too many", "too few", "scale"],
)
def test_wrong_kernel_fails_its_check(change, monkeypatch):
    """A kernel that counts one key more or fewer, or scales otherwise, is not used."""

    def wrong(*args, **settings):
        settings |= {"scale": change.get("scale")}
        settings["seqused_k"] = (settings["seqused_k"] + change.get("seqused_k", 0)).clamp(min=1)
        return varlen.varlen_attn(*args[:6], args[6] + 1, **settings)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
    assert "it is wrong by" in kernel_fault(CPU, torch.bfloat16, *SIZES)


def test_device_without_the_kernel_masks():
    """The real kernel refuses CPU tensors: its message is the reason. Only 16-bit types on a GPU try it."""
    assert kernel_fault(CPU, torch.bfloat16, *SIZES)
    assert not by_length.is_usable(CPU, torch.bfloat16, *SIZES)
    assert not by_length.is_usable(torch.device("cuda"), torch.float32, *SIZES)


def test_values_beyond_a_row_change_nothing(monkeypatch):
    """Rows of one slot each: used queries see their own places only, whatever lies behind."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen.varlen_attn)
    places = torch.tensor([[0, 1, 9], [4, 5, 6], [9, 9, 9]])  # 9: unused, once in a row without a used query
    queries, stored = torch.randn(3, 3, 4, 8).double(), torch.randn(3 * 9 + 3, 4, 8).double()
    sight = lengths(places, 9, 7, 3)
    before = attend(queries, stored, sight).view(3, 3, -1)
    for row, (first, last) in enumerate(((0, 1), (4, 6))):
        changed = stored.clone()
        changed[9 * row + last + 1 : 9 * row + 9] = 1e3
        after = attend(queries, changed, sight).view(3, 3, -1)
        used = last - first + 1
        assert torch.equal(after[row, :used], before[row, :used])
    assert sight.used.tolist() == [3, 7, 10] and sight.keys == 10
