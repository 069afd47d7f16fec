"""Held-out likelihood: equal to training's loss, proper, reused, and honest about what it cannot rank."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import settings
from tiny import byte_tokenizer, tiny_model, tiny_tokenizer

from ram.answers import answer_files
from ram.data.tokenization import Example, tokenize
from ram.decoding import generation, scoring
from ram.decoding.par import PARParams
from ram.decoding.scoring import RAW, Row, Scheme
from ram.errors import UserError
from ram.evaluation import likelihood, likelihood_figures, steps
from ram.evaluation.context import open_context
from ram.models import checkpoints
from ram.settings import compose, recipes
from ram.storage.files import write_json
from ram.training.logps import padded_logps
from utils import TABLES

TOKENIZER = byte_tokenizer()
ROWS = [{"instruction": f"say {i}", "output": "xyz" * (1 + i % 4), "generator": "y"} for i in range(9)]
FULL = ["sampling.base_top_p=1.0", "sampling.top_p=1.0"]


@pytest.fixture
def open_task(tmp_path):
    """Open `llama_uc` on tiny models and a few rows, with a corrector and snis beside the pair."""
    common = ["experiment=llama_uc", f"output_dir={tmp_path / 'out'}"]
    common += ["sampling.max_length=60", "sampling.max_prompt_length=48", "evaluation.bootstrap=50"]
    common += ["evaluation.systems.alone={aligner:aligner}"]
    common += ["evaluation.systems.corrector={corrects:proposal,aligner:aligner}"]
    for name, own in {"product": "sample_mode:product", "snis": "sample_mode:snis,n_candidates:2"}.items():
        common += [f"evaluation.systems.{name}={{proposal:proposal,aligner:aligner,{own}}}"]
    stages = recipes.resolve(compose.preflight(common), TABLES)
    for stage in stages:
        if stage.kind == "train":
            model = tiny_model(len(TOKENIZER), seed=len(stage.name))
            checkpoints.export_model(model, TOKENIZER, stage.weights, "float32", {"add_bos": False})

    def make(*overrides, rows=ROWS):
        write_json(tmp_path / "rows.json", rows)
        config = settings(*common, "evaluation.likelihood=proposal", *overrides)
        path, folder = tmp_path / "rows.json", tmp_path / "report"
        return open_context(config, "helpful", path, folder, stages, config.judge, set())

    return make


def test_single_model_equals_its_training_loss(open_task, monkeypatch):
    """Same ids, same EOS: the sum of a row's log-probabilities is the negative SFT loss, in any chunks."""
    monkeypatch.setattr(likelihood, "AT_ONCE", 4)
    rows = [*ROWS, {"instruction": "long", "output": "w" * 70, "generator": "y"}]
    context = open_task(*FULL, rows=rows)
    likelihood.measure(context)
    prompts = context.job("alone").prompts
    examples = [Example(i, prompts[i], row["output"]) for i, row in enumerate(rows)]
    data = tokenize(examples, TOKENIZER, 60, 48)
    assert data.part("target", 9)[-1] != TOKENIZER.eos_token_id
    model = checkpoints.load_model(context.systems["alone"].pair.aligner, "float32")
    with torch.no_grad():
        sums, counts = padded_logps(model, data, range(len(rows)), ("target",), 0)
    figures = context.likelihood["alone"]
    logps = [row["laws"]["table"]["logp"] for row in figures]
    assert logps == pytest.approx(sums["target"].tolist(), rel=1e-5)
    assert [row["tokens"] for row in figures] == counts["target"]
    assert figures[9]["bytes"] == figures[9]["tokens"] < 70 and figures[0]["bytes"] == 3
    # The anchor is smoothed with itself, so its smoothed figures are its own.
    own = context.likelihood["proposal"][0]["laws"]["table"]
    assert own["smoothed"] == pytest.approx([own["logp"]] * 3, rel=1e-6) and own["kl"] == pytest.approx(0)


def test_step_writes_tables_and_columns(open_task, caplog):
    """Every system but the corrector and snis has figures; the sweep is chosen and reported on other rows."""
    context = open_task("evaluation.likelihood_sweep.div_threshold=[0,0.1,100]")
    likelihood.check(context)
    steps.measure_likelihood(context)
    assert set(context.systems) - set(context.likelihood) == {"corrector", "snis"}
    assert any("rewrites another system's answers" in note for note in context.notes)
    assert any("snis has no fixed distribution" in note for note in context.notes)
    columns = steps.likelihood_columns(context)
    for name, row in columns.items():
        assert row["nll_low"] <= row["nll"] <= row["nll_high"] and row["kl_to_anchor"] >= 0
        assert ("nll_difference" in row) == (name != "proposal")
        assert "margin" not in row  # the anchor has not answered, and no row has a rejected answer
    text = (context.folder / "likelihood.md").read_text()
    assert all(name in text for name in context.likelihood) and "nats per token" in text
    with open(context.folder / "likelihood_sweep.csv", newline="") as file:
        sweep = list(csv.DictReader(file))
    assert {row["system"] for row in sweep} == {"proposal+aligner[par_kl]"}
    assert [row["value"] for row in sweep] == ["0", "0.1", "100"]
    best = min(sweep, key=lambda row: float(row["nll_even"]))
    assert [row["chosen"] for row in sweep] == ["yes" if row is best else "" for row in sweep]
    # Threshold 0 always falls back, so it is the proposal.
    assert float(sweep[0]["nll"]) == pytest.approx(columns["proposal"]["nll"], rel=1e-6)


def test_finished_figures_are_reused(open_task, monkeypatch):
    """The second run loads no model; another sweep or other rows are measured again."""
    likelihood.measure(open_task())
    loads = []
    original = checkpoints.load_model
    monkeypatch.setattr(checkpoints, "load_model", lambda *args: loads.append(1) or original(*args))
    likelihood.measure(open_task())
    assert not loads
    likelihood.measure(open_task("evaluation.likelihood_sweep.div_threshold=[1]"))
    assert loads


def test_systems_of_the_same_models_share_a_pass(open_task, monkeypatch):
    """Each of three pairs and two single models has the figures that it has if it is measured alone."""
    passes = []
    original = scoring.score
    monkeypatch.setattr(
        scoring, "score", lambda *args, **kw: passes.append(len(args[3])) or original(*args, **kw)
    )
    together = open_task("evaluation.likelihood_sweep.div_threshold=[0,1]")
    likelihood.measure(together)
    assert len(passes) == 1 and len(together.likelihood) == 5
    apart = open_task("evaluation.likelihood_sweep.div_threshold=[0,1]", "overwrite=true")
    monkeypatch.setattr(likelihood, "groups", lambda works: [[work] for work in works])
    likelihood.measure(apart)
    assert len(passes) == 6 and apart.likelihood == together.likelihood


def test_pass_is_not_shared_by_works_over_other_ids(open_task):
    """A model with fewer vocabulary rows would narrow the distributions of the others."""
    context = open_task()
    anchor = context.systems["proposal"]
    tokens = likelihood.test_tokens(context, anchor)
    pair, single = (
        likelihood._work(context, context.systems[name], anchor, tokens) for name in ("product", "proposal")
    )
    assert likelihood.groups([pair, single]) == [[pair, single]]
    for rows in (7, None):
        other = replace(single, rows=rows)
        assert likelihood.groups([pair, other]) == [[pair], [other]]


def test_rejected_answers_give_margins(open_task):
    """The margin is log p(output) - log p(rejected); equal answers count half in the pairwise accuracy."""
    rows = [row | {"rejected": row["output"] if i % 2 else "no"} for i, row in enumerate(ROWS)]
    context = open_task(*FULL, rows=rows)
    likelihood.measure(context)
    figures = context.likelihood["proposal"]
    columns = steps.likelihood_columns(context)["proposal"]
    margins = [row["laws"]["table"]["smoothed"][0] - row["worse"] for row in figures]
    assert margins[1] == pytest.approx(0, abs=1e-5) and margins[0] != 0
    assert columns["margin"] == pytest.approx(np.mean(margins))
    assert 4 / 18 <= columns["pairwise_accuracy"] <= 14 / 18


def test_answers_of_the_anchor_are_the_worse_ones_only_if_they_are_of_these_rows(open_task):
    """Answers of other rows, as after another test file, are no reason to stop."""
    context = open_task()
    answer_files.answer_file(context.systems["proposal"].output, context.job("proposal"), False)
    likelihood.measure(context)
    assert "margin" in steps.likelihood_columns(context)["alone"]
    others = open_task(rows=ROWS[:5])
    likelihood.measure(others)
    assert "margin" not in steps.likelihood_columns(others)["alone"]


def test_settings_are_checked_before_any_model_loads(open_task):
    for overrides, message in [
        (["evaluation.likelihood=nobody"], "unknown evaluation.likelihood"),
        (["evaluation.likelihood=product"], "expected a system of one local model"),
        (["evaluation.likelihood_sweep.threshold=[1]"], "unknown key of evaluation.likelihood_sweep"),
        (["evaluation.likelihood_sweep.div_threshold=[-1]"], "expected a divergence in nats"),
    ]:
        with pytest.raises(UserError, match=message):
            likelihood.check(open_task(*overrides))


def test_other_prompts_are_left_out(open_task):
    """A system with other lengths or prompts would score other tokens."""
    other = "evaluation.systems.short={aligner:aligner,max_length:52,max_prompt_length:40}"
    context = open_task(other, rows=[*ROWS, {"instruction": "s", "output": "w" * 99, "generator": "y"}])
    likelihood.measure(context)
    assert "short" not in context.likelihood
    assert any("prompts or lengths differ" in note for note in context.notes)


def test_no_nucleus_and_no_temperature_beats_the_true_distribution():
    """On data drawn from a model, its own distribution has the best figure, for each epsilon and anchor."""
    tokenizer = tiny_tokenizer("abcdefgh")
    models = {"true": tiny_model(len(tokenizer), 1), "other": tiny_model(len(tokenizer), 2)}
    prompts = [[i % 8, i // 8 % 8, i // 64] for i in range(200)]
    answers = generation.generate(models["true"], None, tokenizer, prompts, RAW, max_new_tokens=12, seed=4)
    rows = [Row(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    grid = {"temperature": (0.25, 0.5, 0.8, 1.25, 2.0), "top_p": (0.3, 0.7, 0.9, 0.97)}
    rivals = [PARParams(**{**vars(RAW), f"base_{key}": value}) for key in grid for value in grid[key]]
    every = [Scheme(params, "true", None) for params in (RAW, *rivals)]
    bases = scoring.score(models, tokenizer, rows, [Scheme(RAW, name, None) for name in models])
    scores = scoring.score(models, tokenizer, rows, every)

    def total(law, base, epsilon):
        pairs = zip(law, base, strict=True)
        return sum(float(likelihood.smoothed(a.logprobs, b.logprobs, epsilon).sum()) for a, b in pairs)

    for base in bases:
        for epsilon in likelihood.EPSILONS:
            best, *others = (total(law, base, epsilon) for law in scores)
            assert best > max(others)
    # Without smoothing a nucleus is infinitely bad, and its figure given coverage would rank first.
    narrow = scores[1 + len(grid["temperature"])]
    assert sum(float(row.logprobs.sum()) for row in narrow) == -math.inf
    inside = torch.cat([row.logprobs[row.covered] for row in narrow])
    assert inside.mean() > torch.cat([row.logprobs for row in scores[0]]).mean()


def test_table_temperature_keeps_the_exponent_of_the_product(open_task):
    """P^(1/a) Q^(1/b) is P Q^(a/b) at temperature 1; all other modes are at temperature 1."""
    context = open_task("sampling.repetition_penalty=1.3", "sampling.eos_priority=true")
    product = likelihood.table_params(context.systems["product"])
    assert product.temperature == pytest.approx(0.7 / 0.5) and product.base_temperature == 1.0
    pair = likelihood.table_params(context.systems["proposal+aligner[par_kl]"])
    assert pair.temperature == pair.base_temperature == pair.repetition_penalty == 1.0
    assert not pair.eos_priority
    # A value of a sweep is what the system would be given, so that the chosen value can be given to it.
    swept = likelihood.table_params(context.systems["product"], temperature=2.0)
    assert swept.temperature == pytest.approx(2.0 / 0.5)
    curve = likelihood.table_params(context.systems["proposal+aligner[par_kl]"], temperature=2.0)
    assert curve.temperature == 2.0 and curve.base_temperature == 1.0


def test_order_that_changes_with_epsilon_is_undecided():
    """The figures of two systems, one with a hole in its support, cross as the anchor's share grows."""

    def rows(smoothed):
        law = {"smoothed": smoothed, "uniform": -1.0, "covered": 1, "kl": 0.0}
        return [{"tokens": 1, "bytes": 1, "laws": {"table": law, "decoded": law}}] * 4

    systems = {"a": rows([-1.0, -1.0, -1.0]), "b": rows([-1.1, -0.9, -1.3]), "c": rows([-2.0, -2.0, -2.0])}
    columns = likelihood_figures.columns_of(systems, 20, 0)
    assert {name: row.get("nll_undecided") for name, row in columns.items()} == {
        "a": "b",
        "b": "a",
        "c": None,
    }
    assert columns["b"]["nll_difference"] == pytest.approx(0.1)
    text = likelihood_figures.markdown(columns, "a")
    assert "Undecided, because the order changes with epsilon: a against b" in text
