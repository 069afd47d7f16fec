"""Compare gates of a pair by held-out likelihood: when should a token fall back to the proposal?

    python benchmarks/gates.py experiment=demo output_dir=_output/demo seed=0

Every gate is a number per position and a threshold; above it the proposal decides, below it `par`. Thresholds
are chosen on the even rows and reported on the odd ones, at temperature 1 and smoothed as in
docs/likelihood.md. All gates cost nothing at decoding: they are functions of the two models' logits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import pipeline
from ram.decoding import scoring
from ram.decoding.par import NEG_INF, kl_divergence, next_token_law, wide
from ram.evaluation import likelihood
from ram.evaluation.context import open_context
from ram.models import checkpoints
from ram.settings import compose, recipes
from ram.settings.schema import settings_of
from utils import TABLES, setup_logging

SYSTEM = "proposal+aligner[par]"
QUANTILES = [i / 20 for i in range(1, 20)]


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


def main(arguments: list[str]) -> None:
    """Print one line per gate: nats per token on the even rows, on the odd rows, and the share gated."""
    overrides = compose.preflight(arguments)
    config = settings_of(compose.compose(overrides), TABLES)
    for name in config.evaluation.systems.keys() - {SYSTEM, "proposal"}:
        del config.evaluation.systems[name]
    stages = recipes.resolve(overrides, TABLES)
    task = next(iter(config.evaluation.tasks))
    path = pipeline.test_file(config, task)
    context = open_context(config, task, path, Path(config.report_dir), stages, config.judge, set())
    system, anchor = context.systems[SYSTEM], context.systems["proposal"]
    rows = likelihood.test_tokens(context, anchor).targets
    params = likelihood.table_params(system)
    tokenizer, _ = context.job(SYSTEM).encoded
    assert system.pair.proposal and system.pair.aligner
    models = {
        name: checkpoints.load_model(source, system.pair.dtype)
        for name, source in (("proposal", system.pair.proposal), ("aligner", system.pair.aligner))
    }
    row_of, laws, numbers = [], [], []
    with torch.inference_mode():
        for at in scoring.positions_of(models, tokenizer, rows, needs_seen=False):
            z_p, z_q = at.logits["proposal"], at.logits["aligner"]
            law = next_token_law(z_p, z_q, params)
            assert law.proposal_logprobs is not None
            raw = torch.log_softmax(wide(z_p), dim=-1)
            token = at.tokens.unsqueeze(-1)
            base, pair, fallback = (
                values.gather(-1, token).squeeze(-1) for values in (raw, law.logprobs, law.proposal_logprobs)
            )
            smooth = [likelihood.smoothed(own, base, likelihood.EPSILONS[0]) for own in (pair, fallback)]
            row_of.append(at.rows)
            laws.append(torch.stack(smooth))
            numbers.append(gates(z_p, z_q, law.proposal_logprobs))
    even = torch.cat(row_of) % 2 == 0
    pair, fallback = torch.cat(laws, dim=1)

    def line(name: str, threshold: str, gated: torch.Tensor) -> None:
        chosen = torch.where(gated, fallback, pair)
        print(
            f"| {name} | {threshold} | {-chosen[even].mean():.3f} | {-chosen[~even].mean():.3f} | "
            f"{gated.double().mean():.2f} |"
        )

    print("| gate | threshold | nats, even rows | nats, odd rows | fell back |\n|---|--:|--:|--:|--:|")
    never = torch.zeros_like(even)
    line("never: `par`", "–", never)
    line("always: the proposal", "–", ~never)
    values = {name: torch.cat([part[name] for part in numbers]).double() for name in numbers[0]}
    line("KL(P||Q), published", "0.1", values["KL(P||Q)"] > 0.1)
    for name, value in values.items():
        thresholds = value.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).unique()
        best = max(thresholds, key=lambda t: torch.where(value > t, fallback, pair)[even].mean())
        line(name, f"{best:.3g}", value > best)
        best = max(thresholds, key=lambda t: torch.where(value < t, fallback, pair)[even].mean())
        line(f"{name}, below", f"{best:.3g}", value < best)
    better = fallback > pair  # knows the answer: a bound that no gate reaches
    line("the better one of both, knowing the token", "–", better)


if __name__ == "__main__":
    setup_logging()
    main(sys.argv[1:])
