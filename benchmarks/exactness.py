"""How often a token depends on how it is decoded: never in float32 on a CPU, sometimes in bfloat16.

    python benchmarks/exactness.py [--proposal FOLDER --aligner FOLDER --prompts FILE]

Decodes every prompt in ragged batches with drafts, and alone by the plain loop, with the same noise, and
counts the rows whose tokens part. A row is compared up to the first difference, since from there on the two
texts have different pasts. Without arguments it takes the demo's pair (`bash bin/demo.sh` first). The last
line is one JSON object.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ram.data.prompts import render
from ram.data.tokenization import encode_prompts
from ram.decoding import Generation, generation
from ram.decoding.par import PARParams
from ram.errors import UserError, run_entry_point
from ram.log import pick_device
from ram.models import checkpoints
from ram.storage.files import read_rows

DEMO = Path("_output/demo")


def demo_run(pattern: str) -> str:
    found = sorted(DEMO.glob(f"model/{pattern}*_@seed0/LATEST"))
    if not found:
        raise UserError(
            f"no run {pattern}* in {DEMO}/model: run `bash bin/demo.sh` first, or give the folders"
        )
    return str(found[0])


MODES = ("par", "par_kl", "product", "snis", "mds", "mixture")
# Fast and slow: drafts verified together, rows of different lengths together; one token of one row at a time.
FAST, SLOW = {"batch_size": 16}, {"batch_size": 1, "speculative": False}


def flips(fast: list[Generation], slow: list[Generation]) -> tuple[int, int]:
    """(rows that part, tokens compared up to there)."""
    parted = compared = 0
    for a, b in zip(fast, slow, strict=True):
        same = [x == y for x, y in zip(a.token_ids, b.token_ids, strict=False)]
        first = same.index(False) if False in same else len(same)
        parted += a.token_ids != b.token_ids
        compared += min(first + 1, len(same))
    return parted, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--proposal")
    parser.add_argument("--aligner")
    parser.add_argument(
        "--prompts", default=str(DEMO / "data/seed0/test/toy_test.json"), help="rows with `instruction`"
    )
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="seeds per prompt")
    args = parser.parse_args()
    proposal = args.proposal or demo_run("wu_sft_toy_")
    aligner = args.aligner or demo_run("ours_sft_toy_")
    tokenizer, _ = checkpoints.load_pair(proposal, aligner)
    texts = [render(row["instruction"]) for _, row in read_rows(args.prompts, ("instruction",))]
    device, found = pick_device(), {}
    for dtype in ("float32", "bfloat16"):
        pair = [checkpoints.load_model(path, dtype, device) for path in (proposal, aligner)]
        limit = pair[0].config.max_position_embeddings - args.new_tokens
        ids, _ = encode_prompts(tokenizer, texts, limit)
        # Prompts of one length would hide faults of padding: every second one loses its first tokens.
        ids = [row[3:] if index % 2 else row for index, row in enumerate(ids)]
        for mode in MODES:
            params = PARParams(
                mode,
                temperature=1.0,
                base_temperature=0.7,
                repetition_penalty=1.1,
                n_candidates=4 if mode == "snis" else None,
            )
            parted = compared = 0
            for seed in range(args.repeats):
                settings = {"max_new_tokens": args.new_tokens, "seed": seed}
                fast, slow = (
                    generation.generate(*pair, tokenizer, ids, params, **settings, **how)
                    for how in (FAST, SLOW)
                )
                new = flips(fast, slow)
                parted, compared = parted + new[0], compared + new[1]
            rows = len(ids) * args.repeats
            found[f"{dtype} {mode}"] = {"rows": rows, "flips": parted, "tokens": compared}
            print(
                f"{dtype:<9} {mode:<8} {parted:>5} of {rows:,} rows part, in {compared:>7,} tokens "
                f"({parted / compared:.3%})",
                flush=True,
            )
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({"flips": found, "environment": environment}))


if __name__ == "__main__":
    run_entry_point(main)
