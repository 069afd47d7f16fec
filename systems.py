"""The lines of a leaderboard: which models decode with which settings, and where their answers go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import prompts
import recipes
import sampling
from files import fingerprint
from par import PARParams
from utils import UserError, nearest
from validation import check_sampling, check_types, par_params


@dataclass(frozen=True)
class System:
    """One line of a leaderboard: which models decode, with which settings, and where the answers go."""

    name: str
    pair: sampling.Pair
    settings: DictConfig  # the `sampling` keys
    params: PARParams
    folder: Path

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


def resolve_system(
    name: str,
    spec: dict[str, Any],
    task: str,
    config: DictConfig,
    stages: dict[str, recipes.Stage],
    given: set[str],
) -> System:
    """A system of the recipe: the root's `sampling`, then the task's keys, then the system's own.

    A `sampling.key=` on the command line beats the task's key, not the system's: that is what its name says.
    """
    own = {key: value for key, value in spec.items() if key not in ("proposal", "aligner")}
    by_task = {k: v for k, v in config.evaluation.tasks[task].items() if f"sampling.{k}" not in given}
    known = set(config.sampling)
    for key in [*own, *by_task]:
        if key not in known:
            raise UserError(f"evaluation: unknown sampling key {key!r}: {nearest(key, known)}")
    if "limit" in own:
        raise UserError(
            f"evaluation.systems.{name}.limit: systems are compared on the same rows; set sampling.limit"
        )
    settings = OmegaConf.merge(config.sampling, by_task, own)
    check_types({f"sampling.{k}": v for k, v in recipes.leaves(settings).items()}, recipes.all_keys())
    params = check_sampling(settings)
    paths = [spec.get(role) and recipes.model_source(spec[role], stages) for role in ("proposal", "aligner")]
    pair = sampling.Pair(*paths, settings.dtype, settings.tokenizer_path)
    if all(paths) and settings.backend == "endpoint":
        raise UserError(
            f"evaluation.systems.{name}: an endpoint answers for one model, not for a pair; give "
            f"evaluation.systems.{name}.backend=local"
        )
    main = Path(paths[1] or paths[0] or "")
    dataset = config.evaluation.dataset
    tag = settings_tag(pair, settings, config.seed)
    folder = Path(config.output_dir) / dataset / task / main.parent.name / f"{main.name}#{tag}"
    return System(name, pair, settings, params, folder)


def settings_tag(pair: sampling.Pair, settings: DictConfig, seed: int) -> str:
    """The settings that a person looks for, and a hash of all that decide an answer."""
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
    decides = [{key: s[key] for key in keys}, law, models, seed]
    return "_".join([*parts, fingerprint(decides)[:8]])


def job_of(system: System, rows: list[tuple[int, dict]], config: DictConfig) -> sampling.Job:
    """What has to be decoded for a system on a test file."""
    return sampling.Job(
        label=system.name,
        pair=system.pair,
        params=system.params,
        settings=system.settings,
        records=[row for _, row in rows],
        prompts=[prompts.from_record(row, system.settings) for _, row in rows],
        row_ids=[index for index, _ in rows],
        seed=config.seed,
        add_bos=config.add_bos,
        key=system.settings.output_key,
        extra={"generator": system.generator},
    )
