"""Early stopping: end a run if its held-out loss no longer falls, and keep the best saved weights.

Only saved steps count, so that the best weights are on disk. The decision depends on counters that a training
state holds, not on time: a resumed run stops where an uninterrupted one does.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ram.errors import UserError
from ram.log import log
from ram.models.run_folder import LATEST
from ram.storage.files import replacing

if TYPE_CHECKING:
    from ram.settings.schema import Settings

Best = list | None  # examples and held-out loss of the best saved step


def check(settings: "Settings", n_heldout: int) -> None:
    """Raise UserError if a run that stops early has no held-out examples to decide by."""
    if settings.early_stopping is not None and not n_heldout:
        raise UserError(
            f"early_stopping={settings.early_stopping}, but there are no held-out examples: give "
            "heldout_fraction above 0, or a data set that has a test split"
        )


def is_over(settings: "Settings", examples: int, best: Best, quiet: bool = False) -> bool:
    """Return whether the last `early_stopping` saved steps were all worse than the best one before them."""
    if settings.early_stopping is None or best is None:
        return False
    assert settings.save_every is not None
    over = examples - best[0] >= settings.early_stopping * settings.save_every
    if over and not quiet:
        log.info(f"stopped  after {examples:,} examples: the held-out loss was lowest after {best[0]:,}")
    return over


def keep_best(
    settings: "Settings", best: Best, last: float, run_dir: Path, is_writer: bool
) -> dict[str, float]:
    """Replace the final weights by the best saved ones if these have a lower held-out loss.

    Args:
        settings: the run's.
        best: the best saved step.
        last: held-out loss of LATEST.
        run_dir: the folder of the steps and of LATEST.
        is_writer: whether this process changes it.

    Returns:
        The held-out loss of LATEST if it was replaced.
    """
    if settings.early_stopping is None or best is None or last <= best[1]:
        return {}
    examples, loss = best
    if is_writer:
        with replacing(run_dir / LATEST) as partial:
            shutil.copytree(run_dir / f"step-{examples}", partial)
    log.info(
        f"{LATEST} has the weights after {examples:,} examples: held-out loss {loss:.4f}, not {last:.4f}"
    )
    return {"loss": loss}
