"""Compare gates of a pair by held-out likelihood: when should a token fall back to the proposal?

    python benchmarks/gates.py experiment=demo output_dir=_output/demo --seeds 0 1 2
    python benchmarks/gates.py experiment=demo_ratio --mixture --system 'proposal+aligner_sft_only[par]'

Every gate is a number per position and a threshold; above it, or below it, the proposal decides, else `par`.
Thresholds and the mixture's weight are chosen on the even rows; figures are of the odd ones, at temperature
1 and smoothed as in docs/likelihood.md: the mean over the seeds, with the least and the greatest. All gates
cost nothing at decoding: they are functions of the two models' logits.
"""

import argparse
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import pipeline
from ram.data.toy_world import example_row
from ram.decoding import scoring
from ram.decoding.par import NEG_INF, kl_divergence, next_token_law, wide
from ram.evaluation import likelihood
from ram.evaluation.context import open_context
from ram.models import checkpoints
from ram.settings import compose, recipes
from ram.settings.schema import settings_of
from ram.storage.files import read_rows, write_json
from utils import TABLES, setup_logging

QUANTILES = [i / 20 for i in range(1, 20)]
WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
Table = dict[str, tuple[str, float, float]]  # contender -> what was chosen, nats of the odd rows, share gated


def gates(z_p: torch.Tensor, z_q: torch.Tensor, log_nucleus: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each gate's number (N,), which is large if the aligner should not be trusted."""
    log_p, log_q = (torch.log_softmax(wide(z), dim=-1) for z in (z_p, z_q))
    outside = log_q.masked_fill(log_nucleus > NEG_INF, NEG_INF)
    return {
        "KL(P||Q)": kl_divergence(z_p, z_q),
        "KL(Q||P)": kl_divergence(z_q, z_p),
        "entropy of Q": -(log_q.exp() * log_q).sum(-1),
        "entropy of Q - entropy of P": (log_p.exp() * log_p).sum(-1) - (log_q.exp() * log_q).sum(-1),
        "mass of Q outside P's nucleus": outside.logsumexp(-1).exp(),
        "confidence of P": log_p.amax(-1).exp(),
    }


def mixture_answers(path: Path, styles: dict[str, float], folder: Path) -> Path:
    """Write a toy test file with answers in the styles of the mixture subset; return its path."""
    rng = random.Random(0)
    rows = [row | example_row(rng, row, styles) for _, row in read_rows(path)]
    write_json(folder / "mixture_test.json", rows)
    return folder / "mixture_test.json"


def measure(arguments: list[str], name: str, mixture: bool) -> Table:
    """Return the figures of one run of a recipe."""
    overrides = compose.preflight(arguments)
    config = settings_of(compose.compose(overrides), TABLES)
    for other in config.evaluation.systems.keys() - {name, "proposal"}:
        del config.evaluation.systems[other]
    stages = recipes.resolve(overrides, TABLES)
    task = next(iter(config.evaluation.tasks))
    path = pipeline.test_file(config, task)
    if mixture:
        path = mixture_answers(path, dict(config.world["mixture_styles"]), Path(config.output_dir))
    context = open_context(config, task, path, Path(config.report_dir), stages, config.judge, set())
    system, anchor = context.systems[name], context.systems["proposal"]
    rows = likelihood.test_tokens(context, anchor).targets
    params = likelihood.table_params(system)
    tokenizer, _ = context.job(name).encoded
    assert system.pair.proposal and system.pair.aligner
    models = {
        role: checkpoints.load_model(source, system.pair.dtype)
        for role, source in (("proposal", system.pair.proposal), ("aligner", system.pair.aligner))
    }
    row_of, laws, numbers = [], [], []
    with torch.inference_mode():
        for at in scoring.positions_of(models, tokenizer, rows, needs_seen=False):
            z_p, z_q = at.logits["proposal"], at.logits["aligner"]
            law = next_token_law(z_p, z_q, params)
            assert law.proposal_logprobs is not None
            token = at.tokens.unsqueeze(-1)
            raw, alone = (
                torch.log_softmax(wide(z), dim=-1).gather(-1, token).squeeze(-1) for z in (z_p, z_q)
            )
            pair, fallback = (
                values.gather(-1, token).squeeze(-1) for values in (law.logprobs, law.proposal_logprobs)
            )
            mixed = [torch.logaddexp(fallback + math.log1p(-w), alone + math.log(w)) for w in WEIGHTS]
            smooth = [
                likelihood.smoothed(own, raw, likelihood.EPSILONS[0]) for own in (pair, fallback, *mixed)
            ]
            row_of.append(at.rows)
            laws.append(torch.stack(smooth))
            numbers.append(gates(z_p, z_q, law.proposal_logprobs))
    even = torch.cat(row_of) % 2 == 0
    pair, fallback, *mixed = torch.cat(laws, dim=1)
    found: Table = {}

    def add(contender: str, chosen: str, nats: torch.Tensor, gated: torch.Tensor) -> None:
        found[contender] = chosen, -float(nats[~even].mean()), float(gated[~even].double().mean())

    never = torch.zeros_like(even)
    add("never: `par`", "", pair, never)
    add("always: the proposal", "", fallback, ~never)
    weight, best = max(zip(WEIGHTS, mixed, strict=True), key=lambda item: item[1][even].mean())
    add("no gate: `mixture`", f"{weight}", best, never)
    values = {gate: torch.cat([part[gate] for part in numbers]).double() for gate in numbers[0]}
    published = values["KL(P||Q)"] > 0.1
    add("KL(P||Q), published", "0.1", torch.where(published, fallback, pair), published)
    for gate, value in values.items():
        thresholds = value.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).unique()
        for side, compare in (("above", torch.gt), ("below", torch.lt)):
            options = [
                (t, torch.where(compare(value, t), fallback, pair), compare(value, t)) for t in thresholds
            ]
            threshold, nats, gated = max(options, key=lambda option: option[1][even].mean())
            add(f"{gate}, {side}", f"{threshold:.3g}", nats, gated)
    add("the better one of both, knowing the token", "", torch.maximum(pair, fallback), fallback > pair)
    return found


def main() -> None:
    """Print one line per contender, the best first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", help="key=value, as for pipeline.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--system", default="proposal+aligner[par]", help="a pair in par")
    parser.add_argument("--mixture", action="store_true", help="toy answers as in the mixture subset")
    args = parser.parse_intermixed_args()
    tables = [measure([*args.overrides, f"seed={seed}"], args.system, args.mixture) for seed in args.seeds]
    print("| gate | chosen | nats | least to greatest | fell back |\n|---|---|--:|---|--:|")
    lines = {}
    for contender in tables[0]:
        chosen, nats, shares = zip(*(table[contender] for table in tables), strict=True)
        mean = statistics.mean(nats)
        ends = f"{min(nats):.3f} to {max(nats):.3f}"
        share = f"{statistics.mean(shares):.2f}"
        lines[contender] = mean, f"| {contender} | {', '.join(chosen)} | {mean:.3f} | {ends} | {share} |"
    for _, line in sorted(lines.values()):
        print(line)


if __name__ == "__main__":
    setup_logging()
    main()
