"""The published recipes on real data and a small trained model; skipped if these are not available."""

import csv
import gzip
import itertools
import json

import pytest
import torch
from small import run
from tiny import SHARED, needs_shared

import pipeline
import train
from ram.data.prompts import split_dialogue
from ram.data.tokenization import Example, tokenize
from ram.models import checkpoints
from ram.storage.files import write_json, write_jsonl
from ram.training import logps

pytestmark = needs_shared
STORIES = SHARED / "models" / "tinystories-260k"
FRESH = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 4, max_position_embeddings: 512, "
    "tie_word_embeddings: true, initializer_range: 0.05}"
)


def head(path, n):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, n)]


def overrides(recipe, root, aligners):
    """Return overrides: the recipe with the small proposal, new two-layer aligners, and small sizes."""
    small = [
        f"experiment={recipe}",
        f"data_dir={root / 'data'}",
        f"output_dir={root / 'out'}",
        "max_length=160",
        "max_prompt_length=112",
        "batch_size=8",
        "gradient_accumulation_steps=2",
        "lr=2e-3",
        "n_examples=48",
        "heldout_fraction=0.1",
        "do_first_eval=true",
        "sampling.batch_size=32",
        "evaluation.bootstrap=100",
        f"++stage.proposal.model_settings.name_or_path={STORIES}",
        "++stage.proposal.lr=1e-4",
    ]
    for stage in aligners:
        small.append(f"++stage.{stage}.model_settings.architecture={FRESH}")
        small.append(f"++stage.{stage}.model_settings.tokenizer_name_or_path={STORIES}")
    return small


def heldout_losses(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "heldout"]


def check(root, dataset, sampled, tasks, n_test):
    """Assert that losses fell, training rows have samples, test rows have answers, and leaderboards exist."""
    runs = list((root / "out" / "model").iterdir())
    for run_dir in runs:
        losses = heldout_losses(run_dir)
        assert losses[-1] < losses[0], run_dir.name
        assert (run_dir / "LATEST" / "model.safetensors").is_file()
    rows = sampled.read_text().splitlines() if sampled.suffix == ".jsonl" else json.loads(sampled.read_text())
    assert len(rows) == 80 and all("sampling" in row for row in rows)
    for task in tasks:
        outputs = list((root / "out" / dataset / task).glob("*/*/output.json"))
        assert len(outputs) == 3
        for path in outputs:
            answers = [row["output"] for row in json.loads(path.read_text())]
            assert len(answers) == n_test and sum(map(bool, answers)) > n_test // 2
            assert all("\n\nHuman" not in answer for answer in answers)
        report = root / "out" / "report" / f"llama_{dataset.split('-')[0]}" / (task if len(tasks) > 1 else "")
        with open(report / "leaderboard.csv", newline="") as file:
            board = {row["system"]: row for row in csv.DictReader(file)}
        assert set(board) == {"proposal", "proposal+aligner[par_kl]", "proposal+aligner[par]"}
        assert int(board["proposal"]["n"]) == n_test
        assert 0 <= float(board["proposal+aligner[par_kl]"]["fallback_fraction"]) <= 1
        assert "proposal+aligner[par_kl]" in (report / "report.html").read_text()


@pytest.mark.slow
def test_tldr(tmp_path):
    """Warm-up, sampling, aligner and evaluation on real TL;DR posts."""
    rows = [
        {"instruction": row["prompt"], "output": row["label"].strip(), "generator": "human"}
        for row in head(SHARED / "data" / "tldr" / "tldr_1945.jsonl.gz", 86)
    ]
    write_jsonl(tmp_path / "data" / "train" / "openai_summarize_tldr.jsonl", rows[:80])
    write_json(tmp_path / "data" / "test" / pipeline.test_files["summ-sft"]["summ"], rows[80:])
    command = overrides("llama_summ", tmp_path, ["aligner"])
    run(train, *command)
    run(pipeline, *command)
    sampled = tmp_path / "data" / "train" / "openai_summarize_tldr_sampling_llama8b.jsonl"
    check(tmp_path, "summ-sft", sampled, ["summ"], 6)


def test_hh_helpful_and_harmless(tmp_path):
    """Both SFT stages, sampling (the paper's loss), aligner and both evaluations on real dialogues."""
    for subset in ("helpful", "harmless"):
        rows = head(SHARED / "data" / "hh" / f"{subset}-base.test.jsonl.gz", 46)
        write_jsonl(tmp_path / "data" / "train" / "hh" / f"{subset}-base.jsonl", rows[:40])
        tests = [
            dict(zip(("instruction", "output"), split_dialogue(row["chosen"]), strict=True))
            for row in rows[40:]
        ]
        write_json(tmp_path / "data" / "test" / pipeline.test_files["hh"][subset], tests)
    command = overrides("llama_hh", tmp_path, ["aligner_sft"]) + ["hh_negatives=sampled"]
    run(train, *command)
    run(pipeline, *command)
    sampled = tmp_path / "data" / "train" / "hh_sampling_llama8b.jsonl"
    check(tmp_path, "hh", sampled, ["helpful", "harmless"], 6)


def test_packed_equals_padded():
    """Log-probability sums of both answers and the gradient for 8 real dialogues."""
    examples = []
    for index, row in enumerate(head(SHARED / "data" / "hh" / "helpful-base.test.jsonl.gz", 8)):
        (prompt, chosen), (_, rejected) = (split_dialogue(row[key]) for key in ("chosen", "rejected"))
        examples.append(Example(index, prompt, chosen, rejected))
    data = tokenize(examples, checkpoints.load_tokenizer(STORIES), 512, 384)
    results = []
    for compute in (logps.packed_logps, logps.padded_logps):
        model = checkpoints.load_model(STORIES, "float32")
        if compute is logps.packed_logps:
            logps.use_packed(model)
        sums, _ = compute(model, data, range(8), ("target", "negative"), 0)
        (0.3 * sums["negative"] - sums["target"]).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((sums["target"].detach(), sums["negative"].detach(), gradient))
    for packed, padded in zip(*results, strict=True):
        assert (packed - padded).norm() <= 1e-5 * padded.norm()
