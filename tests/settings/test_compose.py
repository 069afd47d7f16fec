"""One configuration from files and a command line: every shipped choice, the same as Hydra alone makes."""

import shutil

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from ram.errors import UserError
from ram.settings import compose, recipes
from ram.settings.schema import settings_of
from utils import TABLES

RUN = ["model=llama1b", "datasets=[uc]"]


def names(group):
    return sorted(path.stem for path in (compose.CONFIG_DIR / group).glob("*.yaml"))


@pytest.mark.parametrize("group, name", [(g, n) for g in ("model", "loss", "judge") for n in names(g)])
def test_every_shipped_choice_composes(group, name):
    config = compose.compose([f"{group}={name}"])
    expected = {"model": lambda: config.model.name.replace("-", "_"), "loss": lambda: config.loss.name}
    assert expected.get(group, lambda: config.judge.name)() == name
    assert getattr(settings_of(config, TABLES), group).name


def both(overrides, name="config"):
    """What is composed and what Hydra composes: contents, types and interpolations, or why there is none."""
    found = []
    for way in (compose._compose, lambda o, n: compose.by_hydra(tuple(o), n, compose.CONFIG_DIR)):
        try:
            config = way(overrides, name)
        except Exception as error:
            found.append((type(error), str(error)))
        else:
            found.append((repr(OmegaConf.to_container(config)), OmegaConf.is_struct(config)))
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        ["lr=1", "lr=1e-6", "sampling.stop_str='\\n\\nHuman: it\\'s'", "exp_name=null", "stages=[a,'b c']"],
        ["judge=endpoint", "judge.urls=[http://a:1/v1]", "loss=dpo", "loss.beta=0.1", "++model.extra.deep=2"],
        ["++stage.x.kind=train", "++stage.x={lr: 1, sampling: {top_p: 0.5}}", "sampling={temperature: 2}"],
        ["experiment=demo", "++stage.aligner.lr=1e-4", "pair.aligner=toy_tiny", "world.entities=5"],
        ["save_every=${batch_size}", "report_dir=${output_dir}/x", "sampling=null"],
        ["+stage.x={kind: train}", "lr=2", "~wandb.project"],
        ["hydra.job.name=x", "lr=3"],
        ["lr=1e-5,2e-5"],
        ["++lr.x=1"],
        ["loss=our_sft", "lr=1"],
        ["lr", "seed=1"],
        ["seed=[1"],
        ["experiment=demo", "experiment=llama_uc"],
        ["lr@x=1"],
    ],
)
def test_what_hydra_makes(overrides):
    """Values of every kind, and all that is refused, are as Hydra has them."""
    fast, slow = both(overrides)
    assert fast == slow


def test_unknown_key_is_refused_by_one_composition(monkeypatch):
    """Hydra refuses the same keys, later: it would compose the files three times more for its message."""
    for overrides in (["lrr=1"], ["experiment=demo", "pair.alinger=toy"], ["loss=dpo", "loss.bta=1"]):
        fast, slow = both(overrides)
        assert fast[0] is ConfigAttributeError and slow[0].__name__ == "ConfigCompositionException"
    compositions = []
    original = compose.by_hydra
    original.cache_clear()
    monkeypatch.setattr(compose, "by_hydra", lambda *args: compositions.append(args) or original(*args))
    with pytest.raises(UserError, match="unknown key 'pair.alinger': did you mean 'pair.aligner'"):
        compose.compose(["experiment=demo", "seed=1", "pair.alinger=toy"])
    assert set(compositions) == {(("experiment=demo",), "config", compose.CONFIG_DIR)}


LENGTHS = {"demo": ["batch_size=32", "n_examples=4800"], "qwen_hh": []}


@pytest.mark.parametrize("recipe", ["demo", "qwen_hh"])
def test_stages_are_what_hydra_makes(recipe):
    """A stage's values, set directly, give the configuration that Hydra makes of them as overrides."""
    overrides = [f"experiment={recipe}", "seed=3", "++stage.aligner.lr=1e-4", "loss.alpha=0.5"]
    spec = compose.compose(overrides).stage.aligner
    direct = recipes.stage_config(OmegaConf.to_container(spec, resolve=True), "aligner", overrides)
    as_overrides = [f"model={spec.model}", f"loss={spec.loss}", f"datasets=[{spec.datasets[0]}]", *overrides]
    hydra = compose.by_hydra((*as_overrides, f"lr={spec.lr}", *LENGTHS[recipe]), "config", compose.CONFIG_DIR)
    assert compose.resolved(direct) == compose.resolved(hydra)


def test_hydra_is_asked_for_the_files_alone(monkeypatch):
    """Values do not make it compose anew."""
    asked, by_hydra = [], compose.by_hydra
    monkeypatch.setattr(compose, "by_hydra", lambda *args: (asked.append(args[0]), by_hydra(*args))[1])
    compose.compose(["lr=1", "experiment=demo", "++stage.aligner.lr=2", "sampling.top_p=0.5"])
    assert asked == [("experiment=demo",)]


def test_what_was_composed_can_be_changed():
    """Nobody else sees it."""
    compose.compose(RUN).lr = 7.0
    compose.compose(RUN).datasets.append("hh")
    again = compose.compose(RUN)
    assert again.lr != 7.0 and again.datasets == ["uc"]


def test_model_root_is_configurable(monkeypatch, tmp_path):
    monkeypatch.setenv("RAM_MODEL_ROOT", str(tmp_path))
    assert compose.compose(["model=llama1b"]).model.name_or_path == f"{tmp_path}/Llama-3.2-1B"


def test_every_key_of_a_file_must_mean_something(tmp_path, monkeypatch):
    """A key that a YAML file misspells is refused, not ignored."""
    shutil.copytree(compose.CONFIG_DIR, tmp_path / "config")
    monkeypatch.setattr(compose, "CONFIG_DIR", tmp_path / "config")
    for group, name, line, key in (
        ("experiment", "llama_uc", "batch_sise: 2", "batch_sise"),
        ("experiment", "llama_uc", "sampling: {base_temprature: 1}", "sampling.base_temprature"),
        ("model", "llama1b", "blok_name: x", "model.blok_name"),
    ):
        path = tmp_path / "config" / group / f"{name}.yaml"
        text = path.read_text()
        path.write_text(f"{text}\n{line}\n")
        compose.by_hydra.cache_clear()
        overrides = ["experiment=llama_uc"] if group == "experiment" else RUN
        with pytest.raises(UserError, match=f"unknown key '{key}'.*did you mean"):
            recipes.resolve(overrides, TABLES)
        path.write_text(text)
    compose.by_hydra.cache_clear()
    recipes.resolve(RUN, TABLES)


def test_broken_yaml_names_file_and_line(tmp_path, monkeypatch):
    """An edited YAML that does not parse is named with its line."""
    shutil.copytree(compose.CONFIG_DIR, tmp_path / "config")
    broken = tmp_path / "config" / "loss" / "sft.yaml"
    broken.write_text("name: sft\nalpha: [1\n")
    monkeypatch.setattr(compose, "CONFIG_DIR", tmp_path / "config")
    with pytest.raises(UserError, match=r"loss/sft.yaml, line \d: not valid YAML"):
        compose.compose(["loss=sft"])
