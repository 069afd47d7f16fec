"""What the console shows, the manual, and hints for arguments as other programs have them."""

import os
import subprocess
import sys

import pytest
from small import ROOT

from ram import collect_env, log
from ram.errors import UserError
from ram.models import checkpoints, hub
from ram.settings import compose
from ram.settings.aliases import ALIASES


@pytest.fixture
def console(tmp_path):
    """The log with a file, as a command opens it; afterwards as the tests have it."""
    log.setup_logging(tmp_path / "_log" / "x.log")
    yield tmp_path / "_log" / "x.log"
    log.setup_logging()
    log.use_console("full")


@pytest.mark.parametrize(
    ("mode", "shown"), [("brief", "b\nc\n"), ("full", "a\nb\nc\n"), ("auto", "a\nb\nc\n")]
)
def test_log_file_has_what_a_brief_console_leaves_out(mode, shown, console, capsys):
    log.use_console(mode)
    log.log.info("a")
    log.notice("b")
    log.log.warning("c")
    assert "".join(line[-2:] for line in capsys.readouterr().out.splitlines(keepends=True)) == shown
    assert [line[-1] for line in console.read_text().splitlines()] == ["a", "b", "c"]


def test_log_goes_on_if_its_reader_has_ended(console, monkeypatch):
    """As in `serve.py | head`: the line about SIGTERM raised an error, so the server could not be stopped."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        log.log.info("a")
        log.log.info("b")
    assert [line[-1] for line in console.read_text().splitlines()] == ["a", "b"]


def test_bar_of_a_stage_has_its_name_and_the_time_left(console, capsys, monkeypatch):
    """Without a terminal it is a line now and then; here at once."""
    log.use_console("brief")
    monkeypatch.setattr(log, "BAR_SECONDS", {True: 0.0, False: 0.0})
    with log.labelled("stage 3 of 9  aligner"):
        with log.progress(total=4, main=True, desc="a_long_run_name") as bar:
            bar.set_postfix_str("loss 0.5", refresh=False)
            bar.update(1)
        list(log.progress([1], desc="evaluate"))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("stage 3 of 9  aligner   25 %") and "left, loss 0.5" in line for line in lines)
    assert any(line.startswith("stage 3 of 9  aligner  evaluate  100 %") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "demo"], "--experiment: write experiment=demo, without dashes"),
        (["--learning-rate=1e-4"], "--learning-rate=1e-4: write lr=1e-4, without dashes"),
        (["--lr", "seed=1"], "--lr: write lr=VALUE, without dashes"),
        (["--expriment", "demo"], "--expriment: keys are written key=value, .*did you mean 'experiment'"),
        (["learning_rate=1", "model=llama1b"], "unknown key 'learning_rate': did you mean 'lr'"),
        (["num_train_epochs=1"], "unknown key 'num_train_epochs': did you mean 'n_epochs'"),
        (["beta=1", "loss=dpo"], "unknown key 'beta': did you mean 'loss.beta'"),
    ],
)
def test_argument_as_other_programs_have_it_is_told_how_to_be_written(arguments, message):
    with pytest.raises(UserError, match=message):
        compose.preflight(arguments)


def test_flags_of_hydra_are_accepted():
    compose.preflight(["--multirun", "lr=1e-5,1e-4"])
    compose.preflight(["--cfg", "job"])


def test_every_alias_means_a_key():
    known = {key for name in ("config", "serve") for key in compose.leaves(compose.defaults(name))}
    known |= {
        key
        for loss in ("dpo", "ours_sft")
        for key in compose.leaves(compose.resolved(compose.compose([f"loss={loss}"])))
    }
    assert {ours for keys in ALIASES.values() for ours in keys} <= known
    assert not set(ALIASES) & set(compose.leaves(compose.defaults("config"))) - {"epochs"}


def test_help_prints_the_manual():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Train: a recipe with")
    assert "lr: 2e-5                        # learning rate after the warm-up" in done.stdout


def test_report_of_the_environment_has_versions_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("RAM_MODEL_ROOT", "/models")
    text = "\n".join(collect_env.lines())
    assert "hf_secret" not in text and "HF_TOKEN=(set)" in text and "RAM_MODEL_ROOT=/models" in text
    for name in ("commit: ", "python: ", "torch build: ", "hydra-core: "):
        assert name in text


def test_gated_model_says_how_to_log_in(monkeypatch):
    """transformers wraps the hub's error; its first line names neither the model nor a remedy."""

    class GatedRepoError(Exception):
        pass

    def refuse(*_args, **_kwargs):
        try:
            raise GatedRepoError("403")
        except GatedRepoError as error:
            raise OSError("We could not connect") from error

    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    for load in (checkpoints.load_tokenizer, checkpoints.load_model):
        with pytest.raises(
            UserError, match=r"org/m is gated: ask for access at https://huggingface.co/org/m.*auth"
        ):
            load("org/m")


def test_weights_that_cannot_be_reached_have_a_reason(monkeypatch):
    assert hub.unreachable("org/m") == "HF_HUB_OFFLINE is set, and it is not in the cache"

    def fail(*_args):
        raise OSError

    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", fail)
    assert hub.unreachable("org/m") == "no connection to the hub: OSError"
