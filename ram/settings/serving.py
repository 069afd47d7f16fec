"""The server's configuration: config/serve.yaml with what the command line changes, checked before any model
loads; keys from the environment.
"""

import functools
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from omegaconf import DictConfig

from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.settings import compose
from ram.settings.schema import check_types, par_params

PROPOSAL = "proposal"  # the name by which the proposal answers alone
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Settings:
    """What a server runs with. config: config/serve.yaml's keys as attributes. aligners: name -> folder. key,
    admin_key: None where none is wanted.
    """

    config: SimpleNamespace
    params: PARParams
    aligners: dict[str, str]
    key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)


def read_settings(arguments: Sequence[str]) -> Settings:
    """The settings of `serve.py ARGUMENTS`; raises UserError for a key, value or name that cannot work."""
    overrides = [f"++{a}" if a.startswith(("aligners=", "aligners.")) else a for a in arguments]
    config = compose.compose(overrides, "serve")
    check_types(compose.leaves(config), compose.leaves(compose.compose([], "serve")))
    if not config.proposal:
        raise UserError("no proposal: give the frozen model's folder, proposal=FOLDER")
    aligners = {} if config.aligners is None else config.aligners
    if not isinstance(aligners, DictConfig | dict):
        raise UserError(f"aligners={aligners!r}: expected names and folders, aligners='{{NAME: FOLDER}}'")
    aligners = {str(name): folder for name, folder in aligners.items()}
    if config.aligner is not None:
        if "aligner" in aligners:
            raise UserError("aligner and aligners.aligner are both given: give one of them")
        aligners["aligner"] = config.aligner
    for name, folder in aligners.items():
        check_name(name)
        if not isinstance(folder, str) or not folder:
            raise UserError(f"aligners.{name}={folder!r}: expected a folder")
    if len(aligners) > config.limits.aligners:
        raise UserError(f"{len(aligners)} aligners: limits.aligners={config.limits.aligners}; raise it")
    if (config.limits.max_length or 0) > config.engine.max_tokens:
        raise UserError(
            f"limits.max_length={config.limits.max_length}: expected at most engine.max_tokens="
            f"{config.engine.max_tokens}"
        )
    if config.limits.choices > config.engine.max_waiting:
        raise UserError(
            f"limits.choices={config.limits.choices}: one request could fill the queue; expected at most "
            f"engine.max_waiting={config.engine.max_waiting}"
        )
    keys = [_key(config[name]) for name in ("key_env", "admin_key_env")]
    if keys[0] and keys[0] == keys[1]:
        raise UserError(f"{config.key_env} and {config.admin_key_env} hold the same key: give two")
    return Settings(_plain(config), par_params(config.sampling), aligners, *keys)


def _plain(config: DictConfig) -> SimpleNamespace:
    """Plain attributes: every request reads some, and OmegaConf takes its time for each."""
    values = ((str(key), value) for key, value in config.items())
    return SimpleNamespace(**{key: _plain(v) if isinstance(v, DictConfig) else v for key, v in values})


def check_name(name: str) -> None:
    """Raises UserError for a name that no aligner can have."""
    if not NAME.fullmatch(name) or name == PROPOSAL:
        raise UserError(
            f"aligner {name!r}: expected a name of letters, digits and . _ - (64 at most) other than "
            f"{PROPOSAL!r}"
        )


@functools.lru_cache(maxsize=256)  # asked for every request's Host
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, an address or `localhost`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(settings: Settings) -> None:
    """Raises UserError for a server that others would reach without a key."""
    if not is_loopback(settings.config.host) and settings.key is None:
        raise UserError(
            f"host={settings.config.host} is reached from elsewhere: put a key into the environment variable "
            f"{settings.config.key_env}, or listen on loopback"
        )


def _key(variable: str) -> str | None:
    key = os.environ.get(variable or "", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable} holds no key: expected printable ASCII characters")
    return key or None
