"""The files of config/ and a command line to one configuration, by Hydra; what is wrong, in one line."""

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ram.errors import UserError, nearest

CONFIG_DIR = Path(__file__).resolve().parents[2] / "config"
GROUPS = ("model", "loss", "judge", "experiment", "ablation")
PLAIN = re.compile(r"(\+\+)?[\w.-]+=")  # of overrides: those that set one key


def compose(overrides: Sequence[str], name: str = "config") -> DictConfig:
    """The configuration that `python train.py OVERRIDES` sees; raises UserError for an unknown key or
    choice. name: the file of config/ to begin with.
    """
    try:
        with _readable():
            return _compose(overrides, name)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("hydra", "omegaconf", "antlr4"):
            raise
        raise UserError(_explain(overrides, error, name)) from None


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Makes a UserError of a file that is no YAML."""
    import yaml

    try:
        yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a file in config/"
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})") from None


def preflight(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra takes them, checked here because Hydra explains a refusal at length.

    A stage may be given any key, whether or not its recipe names it, so `stage.NAME.key=` becomes
    `++stage.NAME.key=`, and `stage.NAME.loss.key=`, where `loss` names the loss, goes to its `loss_settings`.
    Flags such as --help and --multirun are left to Hydra.
    """
    opened = ("stage.", "evaluation.tasks.", "evaluation.systems.", "evaluation.paper.")
    arguments = [f"++{argument}" if argument.startswith(opened) else argument for argument in arguments]
    arguments = [re.sub(r"^(\+\+stage\.[^.=]+\.(?:loss|model))\.", r"\1_settings.", a) for a in arguments]
    if not any(argument.startswith("-") for argument in arguments):
        repeated = any(key_of(argument) == "ablation" for argument in arguments)
        for each in _values(arguments) if repeated else [arguments]:
            compose(each)
    return arguments


def _values(arguments: Sequence[str]) -> list[list[str]]:
    """The arguments with every value of those that have several (key=a,b,c), one after the other."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices = []
    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except Exception:  # `compose` says what is wrong with it
            choices.append([argument])
            continue
        values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [None]
        key = argument.partition("=")[0]
        choices.append([argument if value is None else f"{key}={value}" for value in values])
    most = max(map(len, choices), default=0)
    return [[values[min(i, len(values) - 1)] for values in choices] for i in range(most)]


@functools.cache
def known_keys(overrides: tuple[str, ...]) -> dict[str, Any]:
    return leaves(compose(overrides))


@functools.cache
def all_keys() -> dict[str, Any]:
    """Every key that means something, with its default: config.yaml's, and what the groups' files add."""
    found = dict(known_keys(()))
    for group in ("loss", "judge"):
        for path in sorted((CONFIG_DIR / group).glob("*.yaml")):
            found = group_keys(group, path.stem) | found
    return found


@functools.cache
def group_keys(group: str, name: str) -> dict[str, Any]:
    """The keys of config/GROUP/NAME.yaml with their values, read from that file alone: composing all files
    takes half a second.
    """
    with _readable():
        return leaves(OmegaConf.create({group: OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml")}))


def key_of(override: str) -> str:
    """`++stage.aligner.lr=1e-6` -> `stage.aligner.lr`."""
    return override.partition("=")[0].lstrip("+~")


def _compose(overrides: Sequence[str], name: str) -> DictConfig:
    """What Hydra composes, in a quarter of the time: the files that were chosen are composed once, values are
    set in a copy. Hydra itself has whatever is no plain value, or cannot be set.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices = tuple(o for o in overrides if key_of(o) in GROUPS)
    values = [o for o in overrides if key_of(o) not in GROUPS]
    if all(PLAIN.match(o) for o in values):
        with contextlib.suppress(Exception):  # Hydra says what is wrong
            config = copy.deepcopy(by_hydra(choices, name, CONFIG_DIR))
            for o in OverridesParser.create().parse_overrides(values):
                OmegaConf.update(config, o.key_or_group, o.value(), merge=True, force_add=o.is_force_add())
            return config
    return copy.deepcopy(by_hydra(tuple(overrides), name, CONFIG_DIR))


@functools.lru_cache(maxsize=256)
def by_hydra(overrides: tuple[str, ...], name: str, folder: Path) -> DictConfig:
    """What `hydra.compose` makes of the files in a folder; not to be changed, since it is made once."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():  # inside @hydra.main
        return hydra.compose(name, overrides=list(overrides))
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


def _explain(overrides: Sequence[str], error: Exception, name: str) -> str:
    """Names the one override that cannot be used, with the nearest known key or choice."""
    groups: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            return f"{override!r}: expected key=value, e.g. seed=1"
        if name == "config" and key.lstrip("+") in GROUPS:
            choices = {path.stem for path in (CONFIG_DIR / key.lstrip("+")).glob("*.yaml")}
            if value not in choices:
                return f"unknown {key} {value!r}: {nearest(value, choices)}"
            groups.append(override)
    for override in overrides:
        key = key_of(override)
        try:
            _compose([*groups, override], name)
        except Exception:
            try:
                known = leaves(_compose(groups, name))
            except Exception:  # the files themselves do not fit together
                break
            if key not in known:
                return f"unknown key {key!r}: {nearest(key, known) or f'config/{name}.yaml lists them all'}"
            return f"{override}: not a value that {key} can take; quote text with special characters"
    return str(error).strip().splitlines()[0]


def leaves(config: DictConfig) -> dict[str, Any]:
    """Dotted key -> value of every leaf; a value that is missing or cannot be resolved counts as None."""
    found: dict[str, Any] = {}
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and len(node):
            found |= {f"{key}.{inner}": value for inner, value in leaves(node).items()}
        elif OmegaConf.is_missing(config, key):
            found[str(key)] = None
        else:
            value = config[key]
            found[str(key)] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return found
