"""The server's configuration: config/serve.yaml, the command line and keys from the environment.

It is checked before any model loads.
"""

import functools
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from omegaconf import OmegaConf
from pydantic import InstanceOf

from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.settings import compose
from ram.settings.checks import (
    Count,
    CountOrZero,
    Dtype,
    Length,
    NotNegative,
    Positive,
    Section,
    check,
    interval,
)

if TYPE_CHECKING:
    from ram.settings.schema import Tables

PROPOSAL = "proposal"  # the name by which the proposal answers alone
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class EngineSettings(Section):
    max_rows: Count
    max_tokens: Length
    max_waiting: Count


class LimitSettings(Section):
    max_length: Length | None
    choices: Count
    messages: Count
    body_bytes: Count
    body_seconds: Positive
    seconds: Positive
    aligners: Count


class WorkerSettings(Section):
    controller: str
    address: str | None
    exposed: bool


class ServerSettings(Section):
    """The keys of config/serve.yaml, which has their defaults and explanations."""

    proposal: str | None
    aligners: dict[str, str]
    aligner: str | None
    dtype: Dtype
    proposal_device: str
    aligner_device: str
    trust_remote_code: bool
    template: str | None
    add_bos: bool | None
    host: str
    port: Annotated[int, interval("[0, 65535]")]
    key_env: str
    admin_key_env: str
    aligner_root: str | None
    allowed_hosts: list[str]
    trusted_proxies: list[str]
    shutdown_seconds: NotNegative
    seed: CountOrZero | None
    max_new_tokens: Count
    sampling: InstanceOf[PARParams]
    engine: EngineSettings
    limits: LimitSettings
    worker: WorkerSettings


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        config: the keys of config/serve.yaml.
        params: settings of the next-token distribution, unless a request gives others.
        aligners: name -> folder.
        key, admin_key: None if the server asks for none.
    """

    config: ServerSettings
    params: PARParams
    aligners: dict[str, str]
    key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)


def read_settings(arguments: Sequence[str], tables: "Tables | None" = None) -> Settings:
    """Return the settings of `serve.py ARGUMENTS`.

    Args:
        arguments: the command line. With `experiment=NAME`, keys that serve.yaml does not have are the
            recipe's, and `seed` belongs to both.
        tables: names that the files at the top define, to resolve a recipe with.

    Raises:
        UserError: a key is unknown, a value cannot work, or a name cannot be an aligner's.
    """
    compose.check_flags(arguments, "serve")
    recipe, overrides = [], list(arguments)
    if any(compose.key_of(argument) == "experiment" for argument in arguments):
        assert tables is not None
        own = {*compose.leaves(compose.defaults("serve")), "aligners"}
        of_serve = [a for a in arguments if {compose.key_of(a), compose.key_of(a).split(".")[0]} & own]
        recipe = [a for a in arguments if a not in of_serve or compose.key_of(a) == "seed"]
        overrides = of_serve
    overrides = [f"++{a}" if a.startswith(("aligners=", "aligners.")) else a for a in overrides]
    composed = compose.compose(overrides, "serve")
    if recipe and tables is not None:
        from ram.settings.served import of_recipe  # only recipes need the settings of training

        for key, value in of_recipe(recipe, tables).items():
            OmegaConf.update(composed, key, value, force_add=True)
        compose.set_overrides(composed, overrides)
    values = compose.resolved(composed)
    aligners = {} if values["aligners"] is None else values["aligners"]
    if not isinstance(aligners, dict):
        raise UserError(f"aligners={aligners!r}: expected names and folders, aligners='{{NAME: FOLDER}}'")
    aligners = {str(name): folder for name, folder in aligners.items()}
    for name, folder in aligners.items():
        if not isinstance(folder, str) or not folder:
            raise UserError(f"aligners.{name}={folder!r}: expected a folder")
    sampling = check(PARParams, values["sampling"], "sampling.", "serve")
    config = check(ServerSettings, values | {"aligners": aligners, "sampling": sampling}, source="serve")
    if not config.proposal:
        raise UserError("no proposal: give the frozen model, proposal=FOLDER, or a recipe, experiment=NAME")
    if config.aligner is not None:
        if "aligner" in aligners:
            raise UserError("aligner and aligners.aligner are both given: give one of them")
        if not config.aligner:
            raise UserError("aligner='': expected a folder")
        aligners = aligners | {"aligner": config.aligner}  # a new dict: config.aligners stays as it was given
    for name in aligners:
        check_name(name)
    if len(aligners) > config.limits.aligners:
        raise UserError(f"{len(aligners)} aligners: limits.aligners={config.limits.aligners}; raise it")
    if (config.limits.max_length or 0) > config.engine.max_tokens:
        raise UserError(
            f"limits.max_length={config.limits.max_length}: expected at most engine.max_tokens="
            f"{config.engine.max_tokens}"
        )
    share = max((config.engine.max_rows + config.engine.max_waiting) // 2, 1)
    if config.limits.choices > share:
        raise UserError(
            f"limits.choices={config.limits.choices}: one request could fill the queue; expected at most "
            f"{share}, half of engine.max_rows + engine.max_waiting"
        )
    key, admin_key = _key(config.key_env), _key(config.admin_key_env)
    if key and key == admin_key:
        raise UserError(f"{config.key_env} and {config.admin_key_env} hold the same key: give two")
    return Settings(config, config.sampling, aligners, key, admin_key)


def check_name(name: str) -> None:
    """Raise UserError for a name that no aligner can have."""
    if not NAME.fullmatch(name) or name == PROPOSAL:
        raise UserError(
            f"aligner {name!r}: expected a name of letters, digits and . _ - (64 at most) other than "
            f"{PROPOSAL!r}"
        )


@functools.lru_cache(maxsize=256)  # asked for every request's Host
def is_loopback(host: str) -> bool:
    """Return whether `host`, an address or `localhost`, can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(settings: Settings) -> None:
    """Raise UserError for a server that other machines could reach without a key."""
    if not is_loopback(settings.config.host) and settings.key is None:
        raise UserError(
            f"host={settings.config.host} is reached from elsewhere: put a key into the environment variable "
            f"{settings.config.key_env}, or listen on loopback"
        )


def _key(variable: str) -> str | None:
    """Return the key in an environment variable, None if there is none."""
    key = os.environ.get(variable or "", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable} holds no key: expected printable ASCII characters")
    return key or None
