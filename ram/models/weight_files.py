"""The safetensors files of a model folder, checked before they are loaded."""

from pathlib import Path

from ram.errors import UserError
from ram.models.vocabulary import read_config
from ram.storage.json_text import BadJSON, loads
from ram.storage.records import read_record

INDEX = "model.safetensors.index.json"
HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
REMEDY = "download or copy the model again"


def check_weight_files(folder: Path) -> None:
    """Check that config and index are whole, and that weights are stored as floats.

    transformers would open a file of any other folder, and read whole numbers as weights without a word.

    Raises:
        UserError: if a file cannot belong to a whole model.
    """
    if (folder / INDEX).is_file():
        names = read_record(folder / INDEX, {"weight_map": dict}, REMEDY)["weight_map"].values()
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise UserError(
                    f"{folder / INDEX}: names {str(name)[:80]!r}, which is no file beside it; {REMEDY}"
                )
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in read_config(config):
        return  # its whole numbers are weights
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(path).items():
            kind = tensor.get("dtype") if isinstance(tensor, dict) else None
            if name.endswith((".weight", ".bias")) and not str(kind).startswith(("F", "BF")):
                raise UserError(
                    f"{path}: {name[:80]} is stored as {str(kind)[:20]}, expected floating point; {REMEDY}"
                )


def read_header(path: Path) -> dict[str, object]:
    """Return the description of each tensor in a safetensors file; empty if transformers has to refuse it."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= HEADER else b""
    try:
        header = loads(text)
    except BadJSON:
        return {}
    return header if isinstance(header, dict) else {}
