"""Models on disk: where a name points, loading, the transformers folder that a run leaves, pairs that fit
together.

A folder that a run exports holds what `AutoModelForCausalLM.from_pretrained` reads, and `ram.json` with what
decoding must know and transformers has no place for (`add_bos`, lengths, the run it came from).
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

from tokenization import tokenizer_fingerprint
from utils import (
    UserError,
    fingerprint,
    log,
    pick_dtype,
    quiet_transformers,
    read_json,
    replacing,
    write_json,
)

CARD = "ram.json"
BLOCK = 1 << 20


def find_model(path: str | None, hub_id: str | None = None, quiet: bool = False) -> str:
    """The folder to load from, or the hub id where the folder is absent (a line says so).

    Raises UserError where neither can be found.
    """
    if path and Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{path} is no model folder: it has no config.json; give a transformers folder")
        return str(path)
    if not hub_id:
        raise UserError(
            f"no model at {path!r}: expected a transformers folder; train it first, or set "
            "RAM_MODEL_ROOT or model.name_or_path to where it lies"
        )
    if not quiet:
        log.info(
            f"no folder {path}: loading {hub_id} from the hub instead (RAM_MODEL_ROOT says where models lie)"
        )
    return hub_id


def load_tokenizer(source: str):
    """The fast tokenizer of a folder or hub id, with a padding token for collating (never learnt, never
    drawn).
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {source} ({_first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {source} has no EOS token: answers could not end; set eos_token in "
            "its tokenizer_config.json"
        )
    return tokenizer


def pad_id(tokenizer) -> int:
    """The id that fills a batch; labels and masks go by position, so it may be any."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def load_model(source: str, dtype: str = "auto", device: torch.device | str = "cpu", attention: str = "sdpa"):
    """A causal language model for decoding or as a start of training; weights are only read as
    safetensors.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    device = torch.device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=pick_dtype(dtype, device), attn_implementation=attention, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a model from {source} ({_first_line(error)})") from None
    return model.to(device).eval()


def new_model(architecture: dict, tokenizer, seed: int):
    """A model of the given transformers config with fresh float32 weights drawn from `seed`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(architecture)
    model_type = settings.pop("model_type")
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), pad_token_id=None, **special, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def export_model(model, tokenizer, folder: Path, dtype: str, card: dict[str, Any]) -> None:
    """Writes a transformers folder aside and renames it over `folder`; a cut run leaves the old one whole.

    dtype: float32 keeps every step of a small learning rate; bfloat16 undoes most of what LR 2e-7 changed.
    """
    target = pick_dtype(dtype, torch.device("cpu"))
    state = {name: tensor.to(target) for name, tensor in model.state_dict().items()}
    with replacing(folder) as aside:
        model.save_pretrained(aside, state_dict=state)
        config = read_json(aside / "config.json")
        write_json(aside / "config.json", config | {"dtype": dtype})
        tokenizer.save_pretrained(aside)
        write_json(aside / CARD, card)


def read_card(source: str) -> dict[str, Any]:
    """What an exported folder says of itself; empty for any other folder or a hub id."""
    path = Path(source) / CARD
    return read_json(path) if path.is_file() else {}


def check_context(source: str | None, longest: int) -> None:
    """Raises UserError where a folder's model holds fewer positions than `longest`; reads no weights."""
    config = Path(source) / "config.json" if source else None
    if config is None or not config.is_file():
        return
    limit = read_json(config).get("max_position_embeddings")
    if limit is not None and longest > limit:
        raise UserError(f"max_length={longest}, but {source} holds {limit} positions; lower max_length")


def weights_fingerprint(source: str) -> str:
    """Content hash of all in a folder that decides what its model says; of a hub model, of its name.

    Files above 64 MB are read in 64 blocks spread over their length: enough to tell two trainings apart, in
    no time.
    """
    if not Path(source).is_dir():
        return fingerprint(source)
    digest = hashlib.sha256()
    digest.update(str(read_card(source).get("add_bos")).encode())
    names = ("config.json", "generation_config.json", "tokenizer.json")
    settings = [path for path in (Path(source) / name for name in names) if path.is_file()]
    for path in [*settings, *sorted(Path(source).glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= 64 * BLOCK:
                digest.update(file.read())
                continue
            for block in range(64):
                file.seek(block * (size - BLOCK) // 63)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def load_pair(proposal: str | None, aligner: str | None, tokenizer_path: str | None = None):
    """The shared tokenizer of a pair and its `add_bos`, checked before any weight is read.

    Raises UserError where the two tokenizers differ, or one model was trained with a BOS and the other
    without.
    """
    sources = {
        name: path for name, path in (("proposal", proposal), ("aligner", aligner)) if path is not None
    }
    if not sources:
        raise UserError("neither a proposal nor an aligner was given")
    tokenizers = {name: load_tokenizer(path) for name, path in sources.items()}
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else next(iter(tokenizers.values()))
    for name, other in tokenizers.items():
        if tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer):
            raise UserError(
                f"the tokenizer of the {name} ({sources[name]}, {len(other)} tokens) differs from "
                f"{tokenizer_path or next(iter(sources.values()))} ({len(tokenizer)} tokens): a pair needs "
                "one vocabulary"
            )
        config = Path(sources[name]) / "config.json"
        rows = read_json(config).get("vocab_size") if config.is_file() else None
        if rows is not None and rows < len(tokenizer):
            raise UserError(
                f"the {name} ({sources[name]}) has {rows} vocabulary rows, the tokenizer {len(tokenizer)} "
                "tokens: they do not belong together"
            )
    bos = {name: card["add_bos"] for name, path in sources.items() if "add_bos" in (card := read_card(path))}
    if len(set(bos.values())) > 1:
        raise UserError(f"add_bos differs: {bos}; train both members of a pair alike")
    return tokenizer, next(iter(bos.values()), None)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def finished_run(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "done.json"
    return read_json(path) if path.is_file() else None
