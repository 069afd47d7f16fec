"""Compose the files of config/ and a command line with Hydra, and refuse a wrong one in a single line."""

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from ram.errors import UserError, nearest
from ram.settings.aliases import HYDRA_FLAGS, as_override, hint

CONFIG_DIR = Path(__file__).resolve().parents[2] / "config"
GROUPS = ("model", "loss", "judge", "experiment", "ablation")
PLAIN = re.compile(r"(\+\+)?(?!hydra\.)[\w.-]+=")  # an override that sets the value of one key


def compose(overrides: Sequence[str], name: str = "config") -> DictConfig:
    """Return the configuration of a command line, with its references such as ${seed} unresolved.

    Args:
        overrides: arguments such as `lr=1e-6` and `model=llama1b`.
        name: the file of config/ to begin with.

    Raises:
        UserError: a key or a choice of a file is unknown, or a file is not valid YAML.
    """
    try:
        with _readable():
            return _compose(overrides, name)
    except Exception as error:
        libraries = ("hydra", "omegaconf", "antlr4")
        if type(error).__module__.split(".")[0] not in libraries and not isinstance(error, ValueError):
            raise
        raise UserError(_explain(overrides, error, name)) from None


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turn the error of a file that is not valid YAML into a UserError."""
    import yaml

    try:
        yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else "a file in config/"
        raise UserError(f"{place}: not valid YAML ({getattr(error, 'problem', error)})") from None


def preflight(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command as Hydra takes them, checked because Hydra's own refusals are long.

    Stages and systems accept keys that their recipe does not list, so `stage.NAME.key=` becomes
    `++stage.NAME.key=`. As `stage.NAME.loss` is the loss's name, `stage.NAME.loss.key=` becomes
    `++stage.NAME.loss_settings.key=`. Arguments with flags such as --multirun are left to Hydra.
    """
    check_flags(arguments)
    opened = r"(stage|evaluation\.(tasks|systems|paper|likelihood_sweep))[.=]"
    arguments = [f"++{argument}" if re.match(opened, argument) else argument for argument in arguments]
    arguments = [re.sub(r"^(\+\+stage\.[^.=]+\.(?:loss|model))\.", r"\1_settings.", a) for a in arguments]
    if not any(argument.startswith("-") for argument in arguments):
        repeated = any(key_of(argument) == "ablation" for argument in arguments)
        for overrides in _values(arguments) if repeated else [arguments]:
            compose(overrides)
    return arguments


def check_flags(arguments: Sequence[str], name: str = "config") -> None:
    """Raise UserError for a flag, such as `--lr 1e-4`, that is not one of Hydra's; say how it is written."""
    for flag, following in zip(arguments, [*arguments[1:], None], strict=False):
        if flag.startswith("-") and not (name == "config" and HYDRA_FLAGS.match(flag)):
            known = {*leaves(defaults(name)), "experiment", *(GROUPS if name == "config" else ())}
            raise UserError(as_override(flag, following, known))


def _values(arguments: Sequence[str]) -> list[list[str]]:
    """Return one list of overrides per value of the arguments that have several (key=a,b,c)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices = []
    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except Exception:  # `compose` explains what is wrong with it
            choices.append([argument])
            continue
        values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [None]
        key = argument.partition("=")[0]
        choices.append([argument if value is None else f"{key}={value}" for value in values])
    most = max(map(len, choices), default=0)
    return [[values[min(i, len(values) - 1)] for values in choices] for i in range(most)]


@functools.cache
def defaults(name: str) -> dict[str, Any]:
    """Return a file of config/ with its defaults, as nested dicts."""
    return resolved(compose([], name))


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts, every reference such as ${seed} replaced by its value."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {reason}; check the references, ${{...}}, in its value") from None


def unresolved(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts with its references as they are."""
    return cast(dict[str, Any], OmegaConf.to_container(config))


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of every leaf of nested dicts; an empty dict is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def has_key(config: DictConfig, key: str) -> bool:
    """Return whether a configuration has a dotted key, whatever its value."""
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, section) if section else config
    return isinstance(parent, DictConfig) and name in parent


def set_values(config: DictConfig, values: Mapping[str, Any]) -> None:
    """Set dotted keys of an unresolved configuration, so that references to them follow."""
    for key, value in values.items():
        if not has_key(config, key):
            known = leaves(unresolved(config))
            raise UserError(f"unknown key {key!r}: {hint(key, known) or 'see config/config.yaml'}")
        OmegaConf.update(config, key, value, merge=True)


def set_overrides(config: DictConfig, overrides: Sequence[str]) -> None:
    """Set the values of a command line, other than choices of files, in a configuration."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values = [o for o in overrides if key_of(o) not in GROUPS and not key_of(o).startswith("hydra.")]
    for override in OverridesParser.create().parse_overrides(values):
        if not override.is_delete():
            key, force = override.key_or_group, override.is_force_add() or override.is_add()
            OmegaConf.update(config, key, override.value(), merge=True, force_add=force)


def manual(name: str) -> str:
    """Return the text of a file of config/, whose comments explain the keys, and of the files it includes."""
    text = (CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    included = re.findall(r"^  - (\w+/\w+)", text, flags=re.MULTILINE)
    parts = [
        f"# {path}.yaml\n{(CONFIG_DIR / f'{path}.yaml').read_text(encoding='utf-8')}" for path in included
    ]
    return "\n".join([text, *parts])


def key_of(override: str) -> str:
    """Return the key of an override: `++stage.aligner.lr=1e-6` -> `stage.aligner.lr`."""
    return override.partition("=")[0].lstrip("+~")


def _compose(overrides: Sequence[str], name: str) -> DictConfig:
    """Return what Hydra composes, in a quarter of the time.

    The chosen files are composed once; values are set in a copy. Hydra itself composes anything that is not a
    plain `key=value` or that cannot be set.
    """
    unknown: Exception | None = None
    choices = tuple(o for o in overrides if key_of(o) in GROUPS)
    if all(PLAIN.match(o) for o in overrides if key_of(o) not in GROUPS):
        with contextlib.suppress(Exception):  # Hydra raises the error that `_explain` expects
            config = copy.deepcopy(by_hydra(choices, name, CONFIG_DIR))
            try:
                set_overrides(config, overrides)
            except (ConfigKeyError, ConfigAttributeError) as error:  # there is no such key, for Hydra neither
                unknown = error
            else:
                return config
    if unknown:
        raise unknown
    return copy.deepcopy(by_hydra(tuple(overrides), name, CONFIG_DIR))


@functools.lru_cache(maxsize=256)
def by_hydra(overrides: tuple[str, ...], name: str, folder: Path) -> DictConfig:
    """Return Hydra's own composition of the files in a folder. It is cached: copy it before a change."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():  # inside @hydra.main
        return hydra.compose(name, overrides=list(overrides))
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


def _explain(overrides: Sequence[str], error: Exception, name: str) -> str:
    """Return a line that names the override that cannot be used, and the nearest known key or choice."""
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
        if override in groups:
            continue
        try:
            _compose([*groups, override], name)
        except Exception:
            try:
                known = leaves(unresolved(_compose(groups, name)))
            except Exception:  # the chosen files do not compose
                break
            if key not in known and not any(other.startswith(f"{key}.") for other in known):
                return f"unknown key {key!r}: {hint(key, known) or f'config/{name}.yaml lists them all'}"
            return f"{override}: not a value that {key} can take; quote text with special characters"
    return str(error).strip().splitlines()[0]
