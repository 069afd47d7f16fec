"""Reading a training state without running code that somebody may have put into it.

DCP stores the index of a state, and values that are no tensors, as pickles. Of the index, only classes that
hold our data are unpickled; all else is read by torch with `weights_only=True`.
"""

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from ram.errors import UserError

METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((METADATA, name) for name in ("TensorProperties", "TensorStorageMetadata", "ChunkStorageMetadata")),
    (METADATA, "BytesStorageMetadata"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a state needs no {module}.{name}")


class SafeReader(FileSystemReader):
    """Reads a state's files; refuses an index that names a class which no state of ours has."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: {error}; it was not written by this program: remove the folder, or set resume=never"
            ) from None
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """Puts values that are no tensors into a state, read without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        buffer.seek(0)
        super().load_bytes(read_item, buffer)
