"""The systems of a leaderboard: their models, their decoding settings, and the folders of their answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ram.answers.jobs import AnswerJob, Pair
from ram.data import prompts
from ram.decoding.par import PARParams
from ram.errors import UserError, nearest
from ram.models import checkpoints
from ram.settings import recipes
from ram.settings.overrides import ROLES, system_override
from ram.settings.schema import SamplingSettings, Settings, check_sampling, merged
from ram.storage.files import fingerprint
from ram.vllm import laws


@dataclass(frozen=True)
class System:
    """One line of a leaderboard.

    Attributes:
        name: as in `evaluation.systems`.
        pair: the models that decode.
        settings: the `sampling` keys.
        params: the next-token settings among them.
        folder: where the answers go.
        corrects: the system whose answers this one rewrites (the Aligner baseline), or None.
    """

    name: str
    pair: Pair
    settings: SamplingSettings
    params: PARParams
    folder: Path
    corrects: str | None = None

    @property
    def is_pair(self) -> bool:
        return self.pair.is_pair

    @property
    def output(self) -> Path:
        """The answers in AlpacaEval's format; their statistics are in files beside it."""
        return self.folder / "output.json"

    @property
    def tag(self) -> str:
        """The settings that name the folder."""
        return self.folder.name.rpartition("#")[2]

    @property
    def generator(self) -> str:
        return self.settings.generator or "/".join(self.folder.parts[-2:])


def resolve_systems(
    config: Settings, task: str, stages: dict[str, recipes.Stage], overridden: set[str]
) -> dict[str, System]:
    """Return the systems of the recipe whose `only_if` holds, in its order.

    A corrector comes after the system that it corrects. A system's settings are the root's `sampling`, then
    the task's keys, then its own. A `sampling.key=` on the command line (`overridden`) replaces the task's
    key but not the system's own, which is part of its name.
    """
    systems: dict[str, System] = {}
    for name, spec in config.evaluation.systems.items():
        if recipes.applies(spec, config):
            systems[name] = _system(name, spec, task, config, stages, overridden, systems)
    return systems


def _system(
    name: str,
    spec: dict[str, Any],
    task: str,
    config: Settings,
    stages: dict[str, recipes.Stage],
    overridden: set[str],
    earlier: dict[str, System],
) -> System:
    where, corrects = f"evaluation.systems.{name}", spec.get("corrects")
    own = {key: spec[key] for key in spec if key not in ROLES}
    by_task = {k: v for k, v in config.evaluation.tasks[task].items() if f"sampling.{k}" not in overridden}
    known = vars(config.sampling)
    for key in [*own, *by_task]:
        if key not in known:
            raise UserError(f"evaluation: unknown sampling key {key!r}: {nearest(key, known)}")
    if "limit" in own:
        raise UserError(f"{where}.limit: systems are compared on the same rows; set sampling.limit")
    if corrects:
        own["for_aligner"] = True
        if corrects not in earlier or earlier[corrects].corrects:
            possible = [key for key, system in earlier.items() if not system.corrects]
            raise UserError(
                f"{where}.corrects={corrects!r}: no earlier system of itself; {nearest(corrects, possible)}"
            )
        if spec.get("proposal") or not spec.get("aligner"):
            raise UserError(f"{where}: a corrector is one model that rewrites answers; give `aligner` alone")
    settings = merged(config.sampling, by_task, own)
    check_sampling(settings)
    roles = [spec.get("proposal"), spec.get("aligner")]
    proposal, aligner = [role and recipes.model_source(role, stages) for role in roles]
    pair = Pair(proposal, aligner, settings.dtype, settings.tokenizer_path)
    if pair.is_pair and settings.backend == "endpoint":
        try:
            laws.check(settings.params)
        except ValueError as error:
            raise UserError(
                f"{where}: a server of a pair cannot keep {error}; or give "
                f"{system_override(name, 'backend', 'local')}"
            ) from None
    main = Path(aligner or proposal or "")
    assert config.evaluation.dataset is not None  # the pipeline refuses an evaluation without a data set
    place = Path(config.output_dir) / config.evaluation.dataset / task / main.parent.name
    corrected = earlier[corrects].folder.name if corrects else None
    folder, before = (
        place / f"{main.name}#{settings_tag(pair, settings, config.seed, corrected, rule)}"
        for rule in (False, True)
    )
    if before.is_dir() and not folder.is_dir():  # answers of an earlier version
        folder = before
    return System(name, pair, settings, settings.params, folder, corrects)


def settings_tag(
    pair: Pair,
    settings: SamplingSettings,
    seed: int,
    corrected: str | None = None,
    earlier: bool = False,
) -> str:
    """Return the settings that people look for, and a hash of all settings that decide an answer.

    Args:
        pair: the system's models.
        settings: its `sampling` keys.
        seed: of decoding.
        corrected: the folder name of the answers that a corrector rewrites.
        earlier: by the rule of earlier versions, see `Pair.law`.
    """
    s = settings
    aligner = f"t{s.temperature}_p{s.top_p}_rp{s.repetition_penalty}" + (
        f"_k{s.top_k}" if s.top_k > 0 else ""
    )
    base = f"base_t{s.base_temperature}_p{s.base_top_p}" + (f"_k{s.base_top_k}" if s.base_top_k > 0 else "")
    parts = []
    if pair.aligner:
        parts.append(aligner)
    if pair.proposal:
        parts.append(base)
    if pair.is_pair:
        reverse = "_reverse" if s.kl_direction == "reverse" else ""
        own = {"par_kl": f"{reverse}_dt{s.div_threshold}", "mixture": f"_w{s.mixture_weight}"}
        parts.append(s.sample_mode + own.get(s.sample_mode, ""))
    lengths = ("max_length", "max_prompt_length", "stop_str", "template", "multiround")
    fields = ("input_key", "output_key", "system_key", "for_aligner", "tokenizer_path", "dtype")
    law = pair.law(s.params, earlier)
    models = [path and Path(path).parts[-2:] for path in (pair.proposal, pair.aligner)]
    decisive = [{key: getattr(s, key) for key in (*lengths, *fields)}, law, models, seed]
    if corrected:
        decisive.append(corrected)
    return "_".join([*parts, fingerprint(decisive)[:8]])


def sizes_of(systems: dict[str, System], name: str) -> list[int | None]:
    """Return the number of weights of a system's models, its proposal's or what it corrects first."""
    system = systems[name]
    before = sizes_of(systems, system.corrects) if system.corrects else []
    return [*before, *(weights_in(path) for path in (system.pair.proposal, system.pair.aligner) if path)]


def weights_in(folder: str) -> int | None:
    """Return the number of weights in a folder's files, None if it has none, as a name on the hub."""
    total = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total or None


def job_of(
    system: System,
    rows: list[tuple[int, dict]],
    config: Settings,
    drafts: Sequence[str] | None = None,
) -> AnswerJob:
    """Return a system's answer job on a test file. A corrector needs `drafts`, the answers to rewrite."""
    key, records = system.settings.output_key, [row for _, row in rows]
    chat = system.pair.chat(system.settings.template)
    if drafts is not None:
        records = [row | {key: draft} for row, draft in zip(records, drafts, strict=True)]
    return AnswerJob(
        label=system.name,
        pair=system.pair,
        params=system.params,
        settings=system.settings,
        records=records,
        prompts=[prompts.from_record(row, system.settings, chat) for row in records],
        row_ids=[index for index, _ in rows],
        seed=config.seed,
        add_bos=config.add_bos,
        key=key,
        extra={"generator": system.generator},
    )


def check_models(systems: dict[str, System], stages: Sequence[recipes.Stage]) -> None:
    """Raise UserError if a system's models do not exist or were trained with other settings."""
    for system in systems.values():
        for path in (system.pair.proposal, system.pair.aligner):
            if path:
                checkpoints.find_model(path)
                # The seed also decides decoding's random numbers, so another one is allowed here.
                recipes.check_trained(stages, path, ignore=["seed"])
        if system.corrects:  # its prompts contain answers that may not exist yet
            checkpoints.load_pair(None, system.pair.aligner, system.pair.tokenizer_path)
            checkpoints.check_context(system.pair.aligner, system.settings.max_length)
