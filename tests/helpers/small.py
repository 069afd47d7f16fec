"""Overrides that shrink the toy recipe, and running a command in this process."""

from pathlib import Path
from types import ModuleType

from ram.settings import compose
from ram.settings.schema import Settings, settings_of
from utils import TABLES

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "world.entities=8",
    "world.general_rows=200",
    "world.aligned_rows=12",
    "stage.general_proposal.n_examples=128",
    "stage.general_aligner.n_examples=128",
    "stage.proposal.n_examples=16",
    "stage.proposal_sft.n_examples=32",
    "stage.aligner.n_examples=64",
    "stage.aligner_sft_only.n_examples=64",
    "stage.corrector_warmup.n_examples=64",
    "stage.corrector.n_examples=32",
    "evaluation.bootstrap=50",
    "evaluation.examples=2",
    "evaluation.verify_rows=3",
    "eval_every=64",
    "sampling.batch_size=5",
]


def run(entry: ModuleType, *overrides: str) -> None:
    """Run an entry point such as `train` as `python train.py OVERRIDES` does after parsing."""
    checked = compose.preflight(list(overrides))
    entry.run(compose.compose(checked), checked)


def settings(*overrides: str) -> Settings:
    """Return the typed settings of a command line."""
    return settings_of(compose.compose(compose.preflight(list(overrides))), TABLES)
