"""The training loop: updates, divergence, metrics, evaluation and checkpoints."""

import csv
import math

import numpy as np
import pytest
import torch
from tiny import save_model_folder, tiny_model, tiny_tokenizer
from training_runs import TOKENIZER, assert_same_path, frozen_proposal, path_of, trainer, weights
from transformers import AutoModelForCausalLM

from ram.data.tokenization import Example, tokenize
from ram.errors import UserError
from ram.models import checkpoints, run_folder
from ram.training import metrics, optimizers, resume
from ram.training.losses import LOSSES
from ram.training.packing import collate
from trainers import BasicTrainer, Diverged


@pytest.mark.parametrize("loss", ["sft", "ours_sft", "ours_dpo", "ratio"])
def test_path_does_not_depend_on_micro_batches(tmp_path, loss):
    """Losses, gradient norms and weights agree for 1, 2, 4 and 8 micro-batches per update.

    The models are float64. RMSprop divides by the size of the gradient, so if the gradient is near 0, float32
    rounding moves the weight by a fraction of a whole step (about 1e-2 here), which differs between CPUs.
    """
    paths, finals = [], []
    for pieces in (1, 2, 4, 8):
        overrides = (f"loss={loss}", f"gradient_accumulation_steps={pieces}", "lr=1e-3")
        proposal = frozen_proposal() if loss == "ratio" else None
        run = trainer(tmp_path / str(pieces), *overrides, dtype=torch.float64, proposal=proposal)
        run.train()
        paths.append(path_of(run))
        finals.append(weights(run))
    assert len(paths[0]) == 3  # 20 examples: two full batches and one of 4
    for path in paths[1:]:
        assert_same_path(path, paths[0])
    for name, weight in finals[0].items():
        torch.testing.assert_close(finals[-1][name], weight, rtol=0, atol=1e-6)


def test_short_batch_is_averaged_over_its_size(tmp_path):
    """A batch of 3 gives the gradient of the mean over 3, not over the batch size of 8."""
    overrides = ("optimizer=SGD", "lr=0.5", "max_grad_norm=1e9", "gradient_accumulation_steps=4")
    run = trainer(tmp_path, *overrides, dtype=torch.float64)
    before, rows = weights(run), np.array([1, 5, 7])
    run.update(rows)
    model = tiny_model(len(TOKENIZER), seed=0, layers=2, dtype=torch.float64)
    batch = collate(run.train_data, rows, "target", 0)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    logps = logits.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    (-(logps * mask).sum() / 3).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights(run)[name], before[name] - 0.5 * p.grad, rtol=1e-5, atol=1e-6)


def test_small_learning_rate_moves_nearly_all_weights(tmp_path):
    """At lr=2e-7 nearly all float32 weights with a gradient move; rounded to bf16 hardly any would."""
    run = trainer(tmp_path, "loss=ours_sft", "lr=2e-7", "batch_size=4", n=40)
    before, touched = weights(run), {name: torch.zeros_like(p) for name, p in run.model.named_parameters()}
    update = run.optimizer.step

    def step():
        for name, p in run.model.named_parameters():
            touched[name] += (p.grad != 0).float()
        update()

    run.optimizer.step = step
    run.train()
    after = AutoModelForCausalLM.from_pretrained(run.run_dir / "LATEST", dtype="auto").state_dict()
    moved = reached = moved_in_bf16 = 0
    for name, start in before.items():
        assert after[name].dtype == torch.float32
        assert not torch.equal(after[name], start), name
        has_gradient = touched[name] > 0
        moved += ((after[name] != start) & has_gradient).sum().item()
        reached += has_gradient.sum().item()
        moved_in_bf16 += ((after[name].bfloat16() != start.bfloat16()) & has_gradient).sum().item()
    assert moved / reached >= 0.98
    assert moved_in_bf16 / reached < 0.05


def test_every_parameter_learns(tmp_path):
    """Training changes every weight tensor and lowers the training loss."""
    run = trainer(tmp_path, "lr=3e-3", "n_epochs=6")
    before = weights(run)
    run.train()
    path = path_of(run)
    assert path[-1][0] < 0.8 * path[0][0]
    assert all(not torch.equal(before[name], weight) for name, weight in weights(run).items())


@pytest.mark.parametrize("loss, first", [("dpo", math.log(2)), ("ipo", 1.0)])
def test_reference_losses_start_at_margin_zero(tmp_path, loss, first):
    """With equal models DPO starts at log 2 and IPO at 1/(2 beta)^2. The reference stays frozen."""
    reference = tiny_model(len(TOKENIZER), seed=0, layers=2, dtype=torch.float64)
    frozen = {name: p.clone() for name, p in reference.named_parameters()}
    overrides = (f"loss={loss}", "lr=1e-4", "n_epochs=8")
    run = trainer(tmp_path, *overrides, reference=reference, dtype=torch.float64)
    run.train()
    path = path_of(run)
    assert path[0][0] == pytest.approx(first, abs=1e-5)
    assert path[-1][0] < path[0][0]
    assert all(torch.equal(frozen[name], p) for name, p in reference.named_parameters())


def test_bf16_compute_keeps_float32_weights(tmp_path):
    """fsdp_policy_mp=bfloat16 changes the forward pass; the weights stay in float32."""
    run = trainer(tmp_path, "model.fsdp_policy_mp=bfloat16", "lr=1e-3")
    exact = trainer(tmp_path / "exact", "lr=1e-3")
    run.train()
    exact.train()
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    path, exact_path = path_of(run), path_of(exact)
    assert path != exact_path
    torch.testing.assert_close(torch.tensor(path), torch.tensor(exact_path), rtol=0.05, atol=0.05)


def test_nan_loss_stops_before_the_update(tmp_path, monkeypatch):
    """A NaN loss stops the run. The weights before its update are saved; LATEST is not written."""
    run = trainer(tmp_path, "lr=1e-3", "batch_size=4")
    original, good = run.losses, {}

    def losses(data, rows, drawn=None):
        values, sums = original(data, rows, drawn)
        if run.updates == 2 and data is run.train_data:
            good.update(weights(run))
            return values * float("nan"), sums | {"loss": float("nan")}
        return values, sums

    monkeypatch.setattr(run, "losses", losses)
    with pytest.raises(Diverged, match=r"after 8 examples.*step-8"):
        run.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "step-8").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in good.items())
    assert not (tmp_path / "LATEST").exists()


def test_runaway_sampled_term_stops_before_the_update(tmp_path):
    """With alpha=1 the sampled term is unbounded. The floor stops the run and saves the weights.

    The number of updates before that depends on rounding, so save_every is off and nothing else is saved.
    """
    (tmp_path / "step-old").mkdir()  # a folder of another program is ignored
    run = trainer(
        tmp_path,
        "loss=ours_sft",
        "loss.alpha=1",
        "lr=1e-2",
        "n_epochs=60",
        "save_every=null",
        "divergence.min_sampled_logp_per_token=-12",
    )
    with pytest.raises(Diverged, match=r"runs away.*step-\d+;.*lower loss.alpha") as error:
        run.train()
    assert not (tmp_path / "LATEST").exists()
    assert f"step-{run.examples};" in str(error.value) and 0 < run.examples < 60 * 20
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"step-{run.examples}").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in weights(run).items())


@pytest.mark.parametrize(
    ("lr", "n", "message"),
    [
        ("1e38", 8, "after 8 examples: held-out loss nan"),  # the last update ruins the weights
        ("1e36", 8, "after 8 examples: held-out loss (nan|inf)"),  # the weights are still finite
        ("1e38", 20, "after 8 examples: the last update made weights that are not finite"),
        ("1e36", 20, "after 8 examples: loss (nan|inf)"),
    ],
)
def test_ruined_weights_are_never_saved(tmp_path, lr, n, message):
    """If an update makes the loss NaN or infinite, neither LATEST nor a step is left."""
    # A packed forward pass still has a finite loss with weights of 1e36; a padded one has not.
    run = trainer(tmp_path, f"lr={lr}", "save_every=8", "max_grad_norm=1e9", "packed=false", n=n)
    with pytest.raises(Diverged, match=rf"{message}.*; no good weights were saved; lower lr"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_ruined_weights_are_never_saved_without_heldout_data(tmp_path):
    """Without held-out data the weights themselves are checked."""
    run = trainer(tmp_path, "lr=1e38", "n_eval_examples=0", n=8)
    with pytest.raises(Diverged, match="weights that are not finite; no good weights were saved"):
        run.train()
    assert not (tmp_path / "LATEST").exists()


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_known_optimizer_can_train(tmp_path, name):
    """Each class can update a whole model with no argument but lr."""
    run = trainer(tmp_path, f"optimizer={name}", "lr=1e-3", n=8)
    before = weights(run)
    run.update(np.arange(8))
    assert any(not torch.equal(before[name], weight) for name, weight in weights(run).items())


@pytest.mark.parametrize("name", ["Optimizer", "LBFGS", "SparseAdam", "Muon", "lr_scheduler", "adamw"])
def test_unfit_optimizer_is_unknown(name):
    with pytest.raises(UserError, match=f"unknown optimizer '{name}': .*AdamW"):
        optimizers.pick_optimizer(name)


def test_metrics_csv_has_all_updates_and_evaluations(tmp_path):
    """Example counts are exact over two epochs whose last batches are smaller."""
    run = trainer(
        tmp_path, "loss=ours_sft", "n_epochs=2", "eval_every=16", "save_every=null", "do_first_eval=true"
    )
    final = run.train()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["split"] == "train"]
    assert [int(row["examples"]) for row in train] == [8, 16, 20, 28, 36, 40]
    assert [int(row["examples"]) for row in rows if row["split"] == "heldout"] == [0, 16, 36, 40]
    answers = sum(len(run.train_data.ids[part]) for part in ("target", "negative"))
    assert int(train[-1]["tokens"]) == 2 * answers
    assert set(rows[0]) == set(metrics.columns_of(LOSSES["ours_sft"]))
    for row in train:
        assert float(row["loss"]) == pytest.approx(
            -float(row["target_logp"]) + 1e-4 * float(row["sampled_logp"]), rel=1e-5
        )
    assert final["loss"] == pytest.approx(float(rows[-1]["loss"]), rel=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "metrics.csv", "states"]


def test_heldout_loss_is_the_mean_over_heldout_examples(tmp_path):
    """All held-out examples count, for any eval_batch_size."""
    run = trainer(tmp_path, "eval_batch_size=4", "loss=ours_sft", dtype=torch.float64)
    log = metrics.MetricsLog(tmp_path, run.settings)
    row = run.evaluate(log)
    log.close()
    with torch.no_grad():
        _, sums = run.losses(run.eval_data, np.arange(6))
    assert row["loss"] == pytest.approx(sums["loss"] / 6, rel=1e-6)


def test_n_examples_overrides_epochs(tmp_path):
    """n_examples=50 of 20 examples takes two and a half epochs."""
    run = trainer(tmp_path, "n_examples=50")
    assert (run.total_examples, run.total_updates) == (50, 3 + 3 + 2)
    run.train()
    assert (run.examples, run.updates) == (50, 8)


def factor(run, update):
    return optimizers.lr_factor(update, run.warmup, run.total_updates, run.settings.lr_schedule)


def test_learning_rate_schedule(tmp_path):
    """Warm-up is linear; warmup_steps below 1 is a share of the run's updates."""
    run = trainer(tmp_path, "warmup_steps=0.5", "n_epochs=4", "lr=1.0")
    assert run.total_updates == 12 and run.warmup == 6
    assert [round(factor(run, i), 4) for i in (0, 2, 5, 6, 11)] == [0.1429, 0.4286, 0.8571, 1.0, 1.0]
    cosine = trainer(tmp_path / "c", "warmup_steps=2", "n_epochs=4", "lr_schedule=cosine")
    assert factor(cosine, 2) == 1.0 and factor(cosine, 12) == pytest.approx(0.1)


def test_pad_is_not_learnt_and_eos_is(tmp_path):
    """If the pad token equals EOS, padding has no label and the EOS of an answer has one."""
    data = tokenize([Example(0, "a", "bb"), Example(1, "a", "bbbb")], TOKENIZER, 16, 8)
    batch = collate(data, [0, 1], "target", TOKENIZER.eos_token_id)
    eos = TOKENIZER.eos_token_id
    assert (batch["labels"] == eos).sum(dim=1).tolist() == [1, 1]
    assert batch["input_ids"][0].tolist()[-3:] == [eos, eos, eos]
    assert batch["labels"][0].tolist()[-2:] == [-100, -100]


def test_debug_writes_nothing(tmp_path):
    """debug=true writes neither weights nor metrics, even if the run diverges."""
    (tmp_path / "metrics.csv").write_text("old")
    trainer(tmp_path, "debug=true", "save_every=8").train()
    with pytest.raises(Diverged):
        trainer(tmp_path, "debug=true", "save_every=8", "lr=1e36").train()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
    assert (tmp_path / "metrics.csv").read_text() == "old"


def test_samples_during_evaluation_are_logged(tmp_path, caplog):
    run = trainer(tmp_path, "sample_during_eval=true", "n_eval_model_samples=2")
    run.train()
    assert sum("sample   'Q:" in record.message for record in caplog.records) == 2


def test_failed_export_keeps_the_earlier_one(tmp_path, monkeypatch):
    """A failing save leaves the earlier folder unchanged and no partial folder beside it."""
    folder = tmp_path / "LATEST"
    checkpoints.export_model(tiny_model(len(TOKENIZER), 0), TOKENIZER, folder, "float32", {"add_bos": False})
    before = checkpoints.weights_fingerprint(str(folder))
    monkeypatch.setattr(
        TOKENIZER, "save_pretrained", lambda path: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        checkpoints.export_model(tiny_model(len(TOKENIZER), 1), TOKENIZER, folder, "float32", {})
    assert checkpoints.weights_fingerprint(str(folder)) == before
    assert [p.name for p in tmp_path.iterdir()] == ["LATEST"]


def test_unfit_pair_is_refused_before_weights_are_read(tmp_path):
    """Different vocabularies, too few rows and different add_bos are refused."""
    same = save_model_folder(tmp_path / "a", tiny_model(len(TOKENIZER), 0), TOKENIZER)
    other = save_model_folder(tmp_path / "b", tiny_model(5, 0), tiny_tokenizer("abc"))
    with pytest.raises(UserError, match="tokenizer of the aligner"):
        checkpoints.load_pair(same, other)
    small = save_model_folder(tmp_path / "rows", tiny_model(5, 0), TOKENIZER)
    with pytest.raises(UserError, match="5 vocabulary rows, but EOS has the token id 256"):
        checkpoints.load_pair(same, small)
    for name, bos in (("c", True), ("d", False)):
        checkpoints.export_model(
            tiny_model(len(TOKENIZER), 0), TOKENIZER, tmp_path / name, "float32", {"add_bos": bos}
        )
    with pytest.raises(UserError, match="add_bos differs"):
        checkpoints.load_pair(str(tmp_path / "c"), str(tmp_path / "d"))


def test_activation_checkpointing_does_not_change_the_losses(tmp_path):
    """Recomputed activations give the same losses and gradient norms."""
    plain, recomputed = trainer(tmp_path / "a"), trainer(tmp_path / "b", "activation_checkpointing=true")
    for run in (plain, recomputed):
        run.train()
    assert recomputed.model.is_activation_checkpointing
    torch.testing.assert_close(
        torch.tensor(path_of(recomputed)), torch.tensor(path_of(plain)), rtol=1e-5, atol=0
    )


def test_wandb_logs_offline(tmp_path):
    """wandb.enabled=true writes an offline run into the run folder, without an account or a network."""
    run = trainer(tmp_path, "wandb.enabled=true", "save_every=null")
    run.train()
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_newest_and_best_steps_are_kept(tmp_path, monkeypatch):
    """keep_steps=1 keeps the newest step and the one with the lowest held-out loss, which states remember."""
    losses = iter([9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    run = trainer(
        tmp_path,
        "batch_size=4",
        "eval_every=4",
        "save_every=4",
        "n_examples=24",
        "keep_steps=1",
        "do_first_eval=true",
    )
    monkeypatch.setattr(BasicTrainer, "heldout_averages", lambda self: {"loss": next(losses)})
    metrics = run.train()
    assert [path.name for path in run_folder.saved_steps(tmp_path)] == ["step-8", "step-20"]
    assert (metrics["best_step"], metrics["best_loss"]) == (8, 3.0)
    state = resume.newest(tmp_path, {})
    assert state["best"] == [8, 3.0]
