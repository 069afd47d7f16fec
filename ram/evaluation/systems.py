"""The lines of a leaderboard: which models decode with which settings, and where their answers go."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ram.answers.jobs import AnswerJob, Pair
from ram.data import prompts
from ram.decoding.par import PARParams
from ram.errors import UserError, nearest
from ram.models import checkpoints
from ram.settings import compose, recipes
from ram.settings.schema import check_sampling, check_types, par_params
from ram.storage.files import fingerprint


@dataclass(frozen=True)
class System:
    """One line of a leaderboard: which models decode, with which settings, and where the answers go.

    corrects: the system whose answers this one, the Aligner baseline, rewrites.
    """

    name: str
    pair: Pair
    settings: DictConfig  # the `sampling` keys
    params: PARParams
    folder: Path
    corrects: str | None = None

    @property
    def output(self) -> Path:
        """AlpacaEval's rows; what else is known of each answer lies beside it."""
        return self.folder / "output.json"

    @property
    def tag(self) -> str:
        """The settings that name the folder."""
        return self.folder.name.rpartition("#")[2]

    @property
    def generator(self) -> str:
        return self.settings.generator or "/".join(self.folder.parts[-2:])


def resolve_systems(
    config: DictConfig, task: str, stages: dict[str, recipes.Stage], given: set[str]
) -> dict[str, System]:
    """All systems of the recipe that its keys ask for, in its order; a corrector stands after what it
    corrects.

    A system's settings are the root's `sampling`, then the task's keys, then its own. A `sampling.key=` on
    the command line (`given`) beats the task's key, not the system's: that is what its name says.
    """
    systems: dict[str, System] = {}
    for name, spec in OmegaConf.to_container(config.evaluation.systems, resolve=True).items():
        if recipes.applies(spec, config):
            systems[name] = _system(name, spec, task, config, stages, given, systems)
    return systems


def _system(name: str, spec: dict[str, Any], task: str, config, stages, given, earlier) -> System:
    where, corrects = f"evaluation.systems.{name}", spec.get("corrects")
    own = {key: spec[key] for key in spec if key not in ("proposal", "aligner", "corrects", "only_if")}
    by_task = {k: v for k, v in config.evaluation.tasks[task].items() if f"sampling.{k}" not in given}
    known = set(config.sampling)
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
    settings = OmegaConf.merge(config.sampling, by_task, own)
    check_types({f"sampling.{k}": v for k, v in compose.leaves(settings).items()}, compose.all_keys())
    params = check_sampling(settings)
    paths = [spec.get(role) and recipes.model_source(spec[role], stages) for role in ("proposal", "aligner")]
    pair = Pair(*paths, settings.dtype, settings.tokenizer_path)
    if all(paths) and settings.backend == "endpoint":
        raise UserError(
            f"{where}: an endpoint answers for one model, not for a pair; give {where}.backend=local"
        )
    main = Path(paths[1] or paths[0] or "")
    tag = settings_tag(pair, settings, config.seed, earlier[corrects].folder.name if corrects else None)
    folder = Path(config.output_dir) / config.evaluation.dataset / task / main.parent.name
    return System(name, pair, settings, params, folder / f"{main.name}#{tag}", corrects)


def settings_tag(pair: Pair, settings: DictConfig, seed: int, corrected: str | None = None) -> str:
    """The settings that a person looks for, and a hash of all that decide an answer.

    corrected: the folder of the answers that a corrector rewrites.
    """
    s = settings
    aligner = f"t{s.temperature}_p{s.top_p}_rp{s.repetition_penalty}" + (
        f"_k{s.top_k}" if s.top_k > 0 else ""
    )
    base = f"base_t{s.base_temperature}_p{s.base_top_p}" + (f"_k{s.base_top_k}" if s.base_top_k > 0 else "")
    parts = [aligner] * bool(pair.aligner) + [base] * bool(pair.proposal)
    if pair.aligner and pair.proposal:
        parts.append(s.sample_mode + (f"_dt{s.div_threshold}" if s.sample_mode == "par_kl" else ""))
    keys = (
        "max_length",
        "max_prompt_length",
        "stop_str",
        "template",
        "multiround",
        "input_key",
        "output_key",
        "system_key",
        "for_aligner",
        "tokenizer_path",
        "dtype",
    )
    law = pair.law(par_params(s))
    models = [path and Path(path).parts[-2:] for path in (pair.proposal, pair.aligner)]
    decides = [{key: s[key] for key in keys}, law, models, seed] + [corrected] * bool(corrected)
    return "_".join([*parts, fingerprint(decides)[:8]])


def job_of(
    system: System,
    rows: list[tuple[int, dict]],
    config: DictConfig,
    drafts: Sequence[str] | None = None,
) -> AnswerJob:
    """What has to be decoded for a system on a test file; `drafts`: the answers that a corrector rewrites."""
    key, records = system.settings.output_key, [row for _, row in rows]
    if drafts is not None:
        records = [row | {key: draft} for row, draft in zip(records, drafts, strict=True)]
    return AnswerJob(
        label=system.name,
        pair=system.pair,
        params=system.params,
        settings=system.settings,
        records=records,
        prompts=[prompts.from_record(row, system.settings) for row in records],
        row_ids=[index for index, _ in rows],
        seed=config.seed,
        add_bos=config.add_bos,
        key=key,
        extra={"generator": system.generator},
    )


def check_models(systems: dict[str, System], stages: list[recipes.Stage]) -> None:
    """Raises UserError where a system's models are not there, or were trained with other settings."""
    for system in systems.values():
        for path in (system.pair.proposal, system.pair.aligner):
            if path:
                checkpoints.find_model(path)
                # The seed is also that of decoding's noise; another one gives another file.
                recipes.check_trained(stages, path, ignore=["seed"])
        if system.corrects:  # its prompts are not known yet
            checkpoints.load_pair(None, system.pair.aligner, system.pair.tokenizer_path)
            checkpoints.check_context(system.pair.aligner, system.settings.max_length)
