"""Counts the calls that copy between host and device, or wait for the device, if the tensors are on one.

On a CPU the calls cost nothing, but they are the same calls: a test can count them without a GPU.
"""

from torch.overrides import TorchFunctionMode

TO_DEVICE = {"tensor", "as_tensor", "from_numpy"}
TO_HOST = {"tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "unique", "repeat_interleave"}
TO_HOST |= {"__bool__", "__int__", "__float__", "__index__", "__contains__"}


class CopyCounter(TorchFunctionMode):
    """Counts copies while it is active; `torch.equal` and indexing with a mask wait for the device, too."""

    def __init__(self):
        super().__init__()
        self.to_device = self.to_host = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        masks = name in ("__getitem__", "__setitem__") and "bool" in str(getattr(args[1], "dtype", ""))
        self.to_device += name in TO_DEVICE
        self.to_host += name in TO_HOST or name == "equal" or masks
        return func(*args, **(kwargs or {}))
