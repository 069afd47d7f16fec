"""Models on disk: where a name points, loading, the transformers folder that a run leaves, pairs that fit
together.

A folder that a run exports holds what `AutoModelForCausalLM.from_pretrained` reads, and `ram.json` with what
decoding must know and transformers has no place for (`add_bos`, lengths, the run it came from).
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

from ram.data.tokenization import tokenizer_fingerprint
from ram.errors import UserError, nearest, pick
from ram.log import log, pick_dtype, quiet_transformers
from ram.storage.files import fingerprint, read_json, replacing, write_json

CARD = "ram.json"
BLOCK = 1 << 20


# Whether code that lies in a model's folder may run; the entry points set it from the configuration. Said to
# transformers even where it is not allowed, or it would ask on the terminal.
remote_code = {"trust_remote_code": False}


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
        tokenizer = AutoTokenizer.from_pretrained(source, **remote_code)
    except Exception as error:  # a damaged file makes it raise a dozen unrelated types
        _check_trust(source, error)
        files = [Path(source) / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json")]
        if Path(source).is_dir() and not any(path.is_file() for path in files):
            raise UserError(
                f"no tokenizer in {source}: expected its tokenizer.json; copy the files of the tokenizer "
                "that the model was trained with"
            ) from None
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

    Raises UserError for a folder that is damaged or whose weights are not those of its config.json.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    device = torch.device(device)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=pick_dtype(dtype, device),
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **remote_code,
        )
    except Exception as error:  # a damaged file makes it raise a dozen unrelated types
        _check_trust(source, error)
        hint = "; is a file of it cut short, or of another model?" if Path(source).is_dir() else ""
        raise UserError(f"cannot load a model from {source} ({_first_line(error)}){hint}") from None
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise UserError(
            f"{source} lacks {len(missing)} weights that its config.json asks for ({missing[0]}, ...): its "
            "files do not belong together; fetch or train the model again"
        )
    return model.to(device).eval()


def load_reward_model(source: str, dtype: str, device: torch.device):
    """(tokenizer, model) of a sequence classifier with one label; raises UserError for anything else."""
    from transformers import AutoModelForSequenceClassification

    quiet_transformers()
    tokenizer = load_tokenizer(source)
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=pick_dtype(dtype, device),
            use_safetensors=True,
            output_loading_info=True,
            **remote_code,
        )
    except Exception as error:
        _check_trust(source, error)
        raise UserError(f"cannot load a reward model from {source} ({_first_line(error)})") from None
    if found["missing_keys"] or model.config.num_labels != 1:
        raise UserError(f"{source} is no reward model: expected a sequence classifier with one trained label")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id(tokenizer)
    return tokenizer, model.to(device).eval()


def new_model(architecture: dict, tokenizer, seed: int):
    """A model of the given transformers config with fresh float32 weights drawn from `seed`.

    Raises UserError where transformers does not know the config's keys or the model cannot be run.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = dict(architecture)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    kind = pick(CONFIG_MAPPING, settings.pop("model_type", None), "model.architecture.model_type")
    try:
        config = kind(vocab_size=len(tokenizer), pad_token_id=None, **special, **settings)
        known = kind()
        if stray := [key for key in settings if hasattr(config, key) and not hasattr(known, key)]:
            names = [name for name in vars(known) if not name.startswith("_")]
            raise UserError(f"unknown key model.architecture.{stray[0]}: {nearest(stray[0], names)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():  # some sizes that do not fit together show only here
                model(torch.zeros(1, 2, dtype=torch.int64))
    except UserError:
        raise
    except Exception as error:  # ValueError, ZeroDivisionError, RuntimeError, and the hub's own types
        raise UserError(
            f"model.architecture cannot be made into a model ({_first_line(error)}); expected model_type and "
            "sizes as in config/model/toy_small.yaml"
        ) from None
    return model


def export_model(
    model, tokenizer, folder: Path, dtype: str, card: dict[str, Any], state: dict | None = None
) -> None:
    """Writes a transformers folder aside and renames it over `folder`; a cut run leaves the old one whole.

    dtype: float32 keeps every step of a small learning rate; bfloat16 undoes most of what LR 2e-7 changed.
    state: the weights by name, where the model does not hold them whole; changed here.
    """
    target = pick_dtype(dtype, torch.device("cpu"))
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # of tied weights one
    state = model.state_dict() if state is None else state
    for name in list(state):  # one after the other: there is never a second copy of all
        value = state.pop(name)
        if name in once:
            state[name] = value.to(target)
    with replacing(folder) as aside:
        model.save_pretrained(aside, state_dict=state)
        config = read_json(aside / "config.json")
        kind = type(model).__name__.removeprefix("FSDP")  # as it was called before it was sharded
        write_json(aside / "config.json", config | {"dtype": dtype, "architectures": [kind]})
        tokenizer.save_pretrained(aside)
        write_json(aside / CARD, card)


def read_card(source: str) -> dict[str, Any]:
    """What an exported folder says of itself; empty for any other folder or a hub id."""
    path = Path(source) / CARD
    return read_json(path) if path.is_file() else {}


def check_context(source: str | None, longest: int, architecture: dict | None = None) -> None:
    """Raises UserError where a folder's model, or the fresh one of `architecture`, holds fewer positions than
    `longest`; reads no weights.
    """
    path = Path(source) / "config.json" if source else None
    if path is not None and path.is_file():
        config = read_json(path)
        if not isinstance(config, dict):
            raise UserError(f"{path}: expected a transformers config, found a {type(config).__name__}")
    else:
        config = {} if source else architecture or {}
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(limit, int) and longest > limit:
        what = source or "model.architecture"
        raise UserError(f"max_length={longest}, but {what} holds {limit} positions; lower max_length")


def deciding_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that decide its output: settings, tokenizer and weights."""
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    names.append("special_tokens_map.json")
    settings = [folder / name for name in names if (folder / name).is_file()]
    return [*settings, *sorted(folder.glob("*.safetensors"))]


def weights_fingerprint(source: str) -> str:
    """Content hash of all in a folder that decides what its model says; of a hub model, of its name.

    Files above 64 MB are read in 64 blocks spread over their length: enough to tell two trainings apart, in
    no time.
    """
    if not Path(source).is_dir():
        return fingerprint(source)
    digest = hashlib.sha256()
    digest.update(str(read_card(source).get("add_bos")).encode())
    for path in deciding_files(Path(source)):
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


def load_pair(
    proposal: str | None,
    aligner: str | None,
    tokenizer_path: str | None = None,
    drafter: str | None = None,
):
    """The shared tokenizer of a pair and its `add_bos`, checked before any weight is read.

    Raises UserError where the two tokenizers differ, or one model was trained with a BOS and the other
    without.
    """
    sources = {
        name: path
        for name, path in (("proposal", proposal), ("aligner", aligner), ("drafter", drafter))
        if path is not None
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
    sources.pop("drafter", None)  # a draft that is not confirmed is dropped, whatever it was trained on
    bos = {name: card["add_bos"] for name, path in sources.items() if "add_bos" in (card := read_card(path))}
    if len(set(bos.values())) > 1:
        raise UserError(f"add_bos differs: {bos}; train both members of a pair alike")
    return tokenizer, next(iter(bos.values()), None)


def _check_trust(source: str, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{source} needs code that lies in its folder to run: read it, then set trust_remote_code=true"
        ) from None


def _first_line(error: Exception) -> str:
    """The error's first line that says something: strict configs begin with the validator's name."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if line and not line.endswith(":")), "")
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{line}"[:200]
