"""Whether each key of a command line changes something, and how a key of one system is written."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ram.decoding.par import MODEL_KEYS, PARParams
from ram.errors import UserError, nearest
from ram.settings.compose import GROUPS, key_of, leaves
from ram.settings.schema import Settings

if TYPE_CHECKING:
    from ram.settings.recipes import Stage

ROLES = ("proposal", "aligner", "corrects", "only_if")  # keys of a system that are not keys of `sampling`
IN_ONE_MODE = {"par_kl": ("div_threshold", "kl_fallback", "kl_direction"), "mds": ("expert_temperature",)}
IN_ONE_MODE |= {"snis": ("n_candidates",), "mixture": ("mixture_weight",)}


def unread(sample_mode: str) -> set[str]:
    """Return the settings of the next-token distribution that a pair in this mode does not read."""
    return {key for mode, keys in IN_ONE_MODE.items() if mode != sample_mode for key in keys}


def system_override(name: str, key: str, value: Any) -> str:
    """Return the argument that sets a key of a system, quoted for a shell.

    A name such as `proposal+aligner[par]` cannot be part of a dotted key, but it can be a key of a dict.
    """
    escaped = re.sub(r"([\\()\[\]{}:=,\s])", r"\\\1", name)
    return shlex.quote(f"evaluation.systems={{{escaped}: {{{key}: {value}}}}}")


def keys_given(overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each override with the dotted keys that it sets to a value, those below a dict included."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in overrides:
        key = key_of(override)
        if override.startswith("~") or key in GROUPS or key.startswith("hydra."):
            continue
        value = OverridesParser.create().parse_override(override).value()
        values = leaves(value, f"{key}.") if isinstance(value, dict) else {key: value}
        yield override, [key for key, value in values.items() if value is not None]


def check_used(
    overrides: Sequence[str],
    config: Settings,
    stages: "Mapping[str, Stage]",
    systems: Mapping[str, Mapping[str, Any]],
) -> None:
    """Check that every key of a command line changes a stage or a system.

    Args:
        overrides: the command line.
        config: the root configuration.
        stages: the stages whose `only_if` holds.
        systems: `evaluation.systems` whose `only_if` holds.

    Raises:
        UserError: a key changes nothing; the message names the systems that set it themselves.
    """
    # Of both, n_examples decides; n_epochs alone would be taken for the length of the run.
    both = any(key_of(override) == "n_examples" for override in overrides)
    for override, keys in keys_given(overrides):
        if both and key_of(override) == "n_epochs":
            continue
        reasons = [unused(key, config, stages, systems) for key in keys]
        if reasons and all(reasons):
            raise UserError(f"{override.lstrip('+')}: changes nothing: {reasons[0]}")


def unused(
    key: str, config: Settings, stages: "Mapping[str, Stage]", systems: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Return why a dotted key changes nothing, None if it changes something."""
    section, _, rest = key.partition(".")
    if section == "stage":
        name, _, key = rest.partition(".")
        if name not in stages:
            return f"stage {name!r} is left out, unless {condition(config.stage[name])}"
        stages = {name: stages[name]}
    if key == "n_epochs":
        counts = [stage.config.n_examples for stage in stages.values() if stage.kind == "train"]
        return "n_examples decides the length of every stage" if counts and None not in counts else None
    if section == "sampling":
        return unused_by_all(rest.partition(".")[0], config, stages, systems)
    if section == "evaluation" and rest.startswith("tasks."):
        _, _, key = rest.removeprefix("tasks.").partition(".")
        return unused_by_all(key.partition(".")[0], config, {}, systems) if key else None
    if section == "evaluation" and rest.startswith("systems."):
        return unused_by_one(rest.removeprefix("systems."), config, systems)
    return None


def unused_by_all(
    key: str, config: Settings, stages: "Mapping[str, Stage]", systems: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Return why no stage and no system uses a key of `sampling`, None if one does."""
    for stage in stages.values():
        decodes = {"sample": {"proposal": True}}
        if stage.kind == "train" and stage.config.sample_during_eval:
            decodes["train"] = {"aligner": True}
        if stage.kind in decodes and reads(decodes[stage.kind], key, config):
            return None
    readers = [name for name, spec in systems.items() if reads(spec, key, config)]
    if any(key not in systems[name] for name in readers):
        return None
    if not readers:
        return f"no stage or system here reads {key}"
    example = system_override(readers[0], key, "VALUE")
    return f"{', '.join(readers)} set {key} themselves; give it for one of them, as in {example}"


def unused_by_one(path: str, config: Settings, systems: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return why a key of one system, `NAME.KEY`, changes nothing, None if it changes something."""
    known = config.evaluation.systems
    # A name may have dots: the longest that fits is meant.
    name = max((name for name in known if f"{path}.".startswith(f"{name}.")), key=len, default=path)
    key = path.removeprefix(name).lstrip(".").partition(".")[0]
    if name not in systems:
        return f"system {name!r} is left out, unless {condition(known[name])}" if name in known else None
    if key in ("", *ROLES) or reads(systems[name], key, config):
        return None
    return f"{name} does not read {key}"


def reads(spec: Mapping[str, Any], key: str, config: Settings) -> bool:
    """Return whether a system, or a stage like it, reads a key of `sampling`; unknown keys count as read."""
    proposal, aligner = bool(spec.get("proposal")), bool(spec.get("aligner"))
    if not (proposal or aligner):
        return True  # refused elsewhere
    if key == "proposal_device" or key == "aligner_device":
        return proposal if key == "proposal_device" else aligner
    if key not in PARParams.field_names():
        return True
    if proposal and aligner:
        of_all = [
            config.sampling.sample_mode,
            *(t.get("sample_mode") for t in config.evaluation.tasks.values()),
        ]
        modes = [spec["sample_mode"]] if "sample_mode" in spec else filter(None, of_all)
        return key != "base_repetition_penalty" and any(key not in unread(mode) for mode in modes)
    return key in [f"base_{name}" if proposal else name for name in MODEL_KEYS]


def condition(spec: Mapping[str, Any]) -> str:
    """Return the keys that a stage or a system depends on, as a command line has them."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in spec.get("only_if", {}).items())


def check_names(config: Settings) -> None:
    """Raise UserError for an entry of `evaluation.systems` that names no model: a misspelt name."""
    systems = config.evaluation.systems
    known = [name for name, spec in systems.items() if spec.get("proposal") or spec.get("aligner")]
    for name in systems:
        if name not in known:
            raise UserError(f"evaluation.systems: unknown system {name!r}: {nearest(name, known)}")
