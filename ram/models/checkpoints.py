"""Models on disk: finding, loading and exporting them, and checking that the models of a pair match.

An exported folder can be read by `AutoModelForCausalLM.from_pretrained`. Its card, `ram.json`, stores what
decoding needs and transformers has no place for: `add_bos`, lengths, the training run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ram.errors import UserError, nearest, pick
from ram.log import log, pick_dtype, quiet_transformers
from ram.models import hub, vocabulary
from ram.models.abilities import max_positions
from ram.models.lora import merged_weights, plain_name
from ram.models.weight_files import check_weight_files
from ram.storage.files import file_sha256, fingerprint, read_json, replacing, write_json
from ram.storage.provenance import cached_sha256
from ram.storage.records import read_record, write_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = "ram.json"
# Masks and tables that older versions of transformers stored beside the weights; they are computed now.
BUFFERS = r"(masked_bias|attn\.bias|attention\.bias|inv_freq|position_ids)$"
BLOCK = 1 << 20  # bytes


# Whether code in a model's folder may run; the entry points set it from the configuration. It is passed to
# transformers even if false, because without it transformers would ask on the terminal.
remote_code = {"trust_remote_code": False}
# EOS of each tokenizer that was loaded, by its source; a model's configuration may name another.
_eos: dict[str, Any] = {}


def find_model(path: str | None, hub_id: str | None = None, quiet: bool = False) -> str:
    """Return the folder to load a model from, or the hub id if the folder does not exist.

    Args:
        path: A transformers folder.
        hub_id: The model's name on the hub.
        quiet: Do not log that the hub is used.

    Raises:
        UserError: If the folder is not a model folder, or if it does not exist and there is no hub id.
    """
    if path and Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{path} is not a model folder: no config.json; give a transformers folder")
        if (Path(path) / "adapter_config.json").is_file():  # transformers would load the base alone
            raise UserError(
                f"{path} holds an adapter (adapter_config.json) beside a model's weights and would be loaded "
                "without it: merge the adapter into them (peft's merge_and_unload), or remove its files"
            )
        return str(path)
    if not hub_id:
        raise UserError(
            f"no model at {path!r}: expected a transformers folder; train it first, or set "
            "RAM_MODEL_ROOT or model.name_or_path to its location"
        )
    if not quiet:
        log.info(f"no folder {path}: loading {hub_id} from the hub (for local models, set RAM_MODEL_ROOT)")
    return hub_id


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id; raises UserError if it is unusable or has no EOS."""
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **remote_code)
    except Exception as error:  # a damaged file makes it raise a dozen unrelated types
        _check_access(source, error)
        files = [Path(source) / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json")]
        if Path(source).is_dir() and not any(path.is_file() for path in files):
            raise UserError(
                f"no tokenizer in {source}: expected its tokenizer.json; copy the files of the tokenizer "
                "used for the model's training"
            ) from None
        raise UserError(f"no tokenizer in {source} ({_first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {source} has no EOS token, so answers could not end; set eos_token in "
            "its tokenizer_config.json"
        )
    vocabulary.id_range(tokenizer)  # refuses absurd ids
    _eos[source] = tokenizer.eos_token_id
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """Return the id to pad batches with; any id will do, since labels and masks depend on position only."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def load_model(
    source: str, dtype: str = "auto", device: torch.device | str = "cpu", attention: str = "sdpa"
) -> PreTrainedModel:
    """Load a causal language model in eval mode, for decoding or as the start of training.

    Weights are read from safetensors files only, since pickled ones could run code.

    Args:
        source: Folder or hub id.
        dtype: See `pick_dtype`.
        device: The device to load to.
        attention: transformers' attention implementation, for models that have it; others get "eager".

    Raises:
        UserError: If the folder is damaged or its weights do not match its config.json.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    check_weight_files(Path(source))
    device = torch.device(device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source,
            dtype=pick_dtype(dtype, device),
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **remote_code,
        )
    except Exception as error:  # a damaged file makes it raise a dozen unrelated types
        _check_access(source, error)
        if attention != "eager" and "does not support an attention implementation" in str(error):
            log.info(f"{source}: loaded with eager attention, since its model has no {attention} attention")
            return load_model(source, dtype, device, "eager")
        hint = "; is one of its files truncated or of another model?" if Path(source).is_dir() else ""
        raise UserError(f"cannot load a model from {source} ({_first_line(error)}){hint}") from None
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would initialise them at random
        raise UserError(
            f"{source} lacks {len(missing)} weights that its config.json requires ({missing[0]}, ...): its "
            "files do not match; download or train the model again"
        )
    surplus = sorted(name for name in report["unexpected_keys"] if not re.search(BUFFERS, name))
    if surplus:  # transformers would leave them out
        raise UserError(
            f"{source} has {len(surplus)} weights that its config.json has no place for ({surplus[0]}, ...): "
            "its files do not match; take config.json and weights from one model"
        )
    model.tokenizer_eos = _eos.get(source)  # ends answers, also if the configuration names another EOS
    return model.to(device).eval()


def load_reward_model(
    source: str, dtype: str, device: torch.device
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load a reward model: a sequence classifier with one label.

    Raises:
        UserError: If it cannot be loaded or is another kind of model.
    """
    from transformers import AutoModelForSequenceClassification

    quiet_transformers()
    check_weight_files(Path(source))
    tokenizer = load_tokenizer(source)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=pick_dtype(dtype, device),
            use_safetensors=True,
            output_loading_info=True,
            **remote_code,
        )
    except Exception as error:
        _check_access(source, error)
        raise UserError(f"cannot load a reward model from {source} ({_first_line(error)})") from None
    if report["missing_keys"] or model.config.num_labels != 1:
        raise UserError(
            f"{source} is not a reward model: expected a sequence classifier with one trained label"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id(tokenizer)
    return tokenizer, model.to(device).eval()


def new_model(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Create a model with random float32 weights.

    Args:
        architecture: `model_type` and further keys of its transformers config.
        tokenizer: Determines the vocabulary size and special tokens.
        seed: The weights depend on this seed only; the global random state is not changed.

    Raises:
        UserError: If transformers does not know a key, or the model cannot be built or run.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = dict(architecture)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    kind: Any = pick(CONFIG_MAPPING, settings.pop("model_type", None), "model.architecture.model_type")
    try:
        config = kind(vocab_size=vocabulary.id_range(tokenizer), pad_token_id=None, **special, **settings)
        # A config stores unknown keys as attributes; compare with one that was built from defaults.
        default = kind()
        unknown = [key for key in settings if hasattr(config, key) and not hasattr(default, key)]
        if unknown:
            names = [name for name in vars(default) if not name.startswith("_")]
            raise UserError(f"unknown key model.architecture.{unknown[0]}: {nearest(unknown[0], names)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():  # some inconsistent sizes fail only in a forward pass
                model(torch.zeros(1, 2, dtype=torch.int64))
    except UserError:
        raise
    except Exception as error:  # ValueError, ZeroDivisionError, RuntimeError, and huggingface_hub's types
        raise UserError(
            f"model.architecture is not a valid model ({_first_line(error)}); expected model_type and "
            "sizes as in config/model/toy_small.yaml"
        ) from None
    return model


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str,
    card: dict[str, Any],
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a transformers folder and rename it over `folder`; if interrupted, the old one stays whole.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: The folder to write.
        dtype: dtype of the weights. bfloat16 rounds away most of the changes of a small learning rate such
            as 2e-7; float32 keeps them.
        card: Content of `ram.json`.
        state: The full weights by name, for a sharded model; it is emptied. Adapters are merged.
    """
    target = pick_dtype(dtype, torch.device("cpu"))
    # Tied weights appear in the state under several names, but only once here.
    names = {plain_name(name) for name, _ in (*model.named_parameters(), *model.named_buffers())}
    state = dict(model.state_dict()) if state is None else state
    # One tensor at a time, so that there are never two copies of all weights in memory, and none on a GPU.
    weights = merged_weights(model, state)
    exported = {name: value.to("cpu", target) for name, value in weights if name in names}
    with replacing(folder) as partial:
        model.save_pretrained(partial, state_dict=exported)
        config = read_json(partial / "config.json")
        architecture = type(model).__name__.removeprefix("FSDP")  # sharding adds this prefix
        write_json(partial / "config.json", config | {"dtype": dtype, "architectures": [architecture]})
        tokenizer.save_pretrained(partial)
        write_record(partial / CARD, card)


def read_card(source: str) -> dict[str, Any]:
    """Return the content of an exported folder's card; empty for other folders and hub ids."""
    path = Path(source) / CARD
    remedy = "copy the file again, or remove it: add_bos and lengths then come from the configuration"
    return read_record(path, {}, remedy) if path.is_file() else {}


def trained_template(source: str) -> str | None:
    """Return the template that a folder's model was trained with; None if it is not known."""
    card = read_card(source)
    # Earlier versions trained with one template and did not note it; converted models were not trained here.
    return card.get("template", "ram" if "run" in card else None)


def check_context(source: str | None, longest: int, architecture: dict[str, Any] | None = None) -> None:
    """Raise UserError if a model has fewer positions than `longest`; reads config.json only.

    Args:
        source: Folder or hub id; None for a new model. A hub model is not checked.
        longest: Length of the longest sequence, in tokens.
        architecture: The config of a new model.
    """
    path = Path(source) / "config.json" if source else None
    if path is not None and path.is_file():
        config = vocabulary.read_config(path)
    else:
        config = {} if source else architecture or {}
    limit = max_positions(config)
    if limit is not None and longest > limit:
        name = source or "model.architecture"
        raise UserError(f"max_length={longest}, but {name} holds {limit} positions; lower max_length")


def deciding_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that decide its output: settings, tokenizer and weights."""
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    names.append("special_tokens_map.json")
    if not (folder / "tokenizer.json").is_file():
        names += ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"]
    settings = [folder / name for name in names if (folder / name).is_file()]
    return [*settings, *sorted(folder.glob("*.py")), *sorted(folder.glob("*.safetensors"))]


def tokenizer_fingerprint(source: str) -> str:
    """Return a content hash of a folder's tokenizer; of the name for a hub id."""
    if not Path(source).is_dir():
        return fingerprint(source)
    others = ("config.json", "generation_config.json")
    files = [path for path in deciding_files(Path(source)) if path.name not in others]
    return fingerprint([[path.name, file_sha256(path)] for path in files if path.suffix != ".safetensors"])


def weights_fingerprint(source: str) -> str:
    """Return a content hash of all files in a folder that affect the model's output.

    For a hub id, the name is hashed. A file above 64 MB counts with its digest, which is kept beside it.
    """
    return _fingerprint(source, lambda path, digest: digest.update(cached_sha256(path).encode()))


def earlier_fingerprint(source: str) -> str:
    """Return `weights_fingerprint` by earlier versions: of 64 blocks of each file above 64 MB."""

    def add_blocks(path: Path, digest: Any) -> None:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for block in range(64):
                file.seek(block * (size - BLOCK) // 63)
                digest.update(file.read(BLOCK))

    return _fingerprint(source, add_blocks)


def _fingerprint(source: str, add_large: Callable[[Path, Any], None]) -> str:
    if not Path(source).is_dir():
        return fingerprint(source)
    digest = hashlib.sha256()
    digest.update(str(read_card(source).get("add_bos")).encode())
    for path in deciding_files(Path(source)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        if size <= 64 * BLOCK:
            digest.update(path.read_bytes())
        else:
            add_large(path, digest)
    return digest.hexdigest()


def load_pair(
    proposal: str | None,
    aligner: str | None,
    tokenizer_path: str | None = None,
    drafter: str | None = None,
) -> tuple[PreTrainedTokenizerBase, bool | None]:
    """Load the tokenizer of a pair and check that the models match; reads no weights.

    Args:
        proposal: Folder or hub id of the proposal, if there is one.
        aligner: Folder or hub id of the aligner, if there is one.
        tokenizer_path: Folder or hub id of the tokenizer to use; by default that of the first model.
        drafter: Folder or hub id of a draft model, if there is one.

    Returns:
        The tokenizer, and `add_bos` from the models' cards (None if no card has it).

    Raises:
        UserError: If the tokenizers differ in more than EOS and unused ids, a model has no row for EOS, or
            only one of proposal and aligner was trained with a BOS token.
    """
    roles = {"proposal": proposal, "aligner": aligner, "drafter": drafter}
    sources = {name: path for name, path in roles.items() if path is not None}
    if not sources:
        raise UserError("no model: give a proposal or an aligner")
    tokenizers = {name: load_tokenizer(path) for name, path in sources.items()}
    # The largest one knows the EOS of all.
    first = max(tokenizers, key=lambda name: vocabulary.id_range(tokenizers[name]))
    tokenizer, first_source = tokenizers[first], sources[first]
    if tokenizer_path:
        tokenizer, first_source = load_tokenizer(tokenizer_path), tokenizer_path
    rows = {name: vocabulary.rows_in(path) for name, path in sources.items()}
    ranges = [vocabulary.id_range(other) for other in (tokenizer, *tokenizers.values())]
    size = min([*ranges, *(count for count in rows.values() if count is not None)])
    shared = vocabulary.shared_fingerprint(tokenizer, size)
    for name, other in tokenizers.items():
        if other is not tokenizer and vocabulary.shared_fingerprint(other, size) != shared:
            raise UserError(
                f"the tokenizer of the {name} ({sources[name]}, {len(other)} tokens) differs from "
                f"{first_source} ({len(tokenizer)} tokens): a pair needs one vocabulary"
            )
        vocabulary.check_ids(
            [cast(int, tokenizer.eos_token_id)], rows[name], f"the {name} ({sources[name]})", "EOS"
        )
    # The drafter may differ in add_bos: wrong drafts are rejected, so they cost speed only.
    sources.pop("drafter", None)
    cards = {name: read_card(path) for name, path in sources.items()}
    add_bos = {name: card["add_bos"] for name, card in cards.items() if "add_bos" in card}
    if len(set(add_bos.values())) > 1:
        raise UserError(f"add_bos differs: {add_bos}; train both models of a pair with the same add_bos")
    return tokenizer, next(iter(add_bos.values()), None)


def _check_access(source: str, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{source} needs the code in its folder: review the code, then set trust_remote_code=true"
        ) from None
    hub.check_gated(source, error)


def _first_line(error: Exception) -> str:
    """Return the first informative line of an error; transformers' first line may be a validator's name."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if line and not line.endswith(":")), "")
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{line}"[:200]
