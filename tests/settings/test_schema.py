"""The schema and the YAML files agree, values are not converted, and refusals name the key."""

from dataclasses import asdict, fields

import pytest
from small import settings

from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.settings import compose, recipes, schema, serving
from ram.settings.checks import check, keys_of, nested
from ram.training.losses import LOSSES
from utils import TABLES

ONLY_IN_RECIPES = {"pair", "hh_negatives", "hh_data"}
OPEN = {"stage", "world", "evaluation.tasks", "evaluation.systems", "evaluation.paper", "evaluation.ablation"}
OPEN |= {"model.architecture"}


def names(group):
    return sorted(path.stem for path in (compose.CONFIG_DIR / group).glob("*.yaml"))


def test_config_yaml_and_schema_have_the_same_keys():
    yaml = {
        key for key in compose.leaves(compose.defaults("config")) if not key.startswith(("loss.", "judge."))
    }
    declared = set(keys_of(schema.Settings)) - {"loss", "judge"}
    assert yaml == declared - ONLY_IN_RECIPES
    assert yaml >= OPEN


def test_serve_yaml_and_schema_have_the_same_keys():
    assert set(compose.leaves(compose.defaults("serve"))) == set(keys_of(serving.ServerSettings))


@pytest.mark.parametrize(
    "group, name", [(group, name) for group in ("loss", "judge") for name in names(group)]
)
def test_each_loss_and_judge_has_the_keys_of_its_file(group, name):
    values = compose.resolved(compose.compose([f"{group}={name}"]))[group]
    kind = LOSSES[name].settings if group == "loss" else TABLES.judges[name]
    assert set(values) == set(keys_of(kind))
    assert vars(check(kind, values)) == values


def test_every_default_passes():
    assert nested(settings()) == compose.defaults("config")
    config = serving.read_settings(["proposal=x"]).config
    assert nested(config) == compose.defaults("serve") | {"proposal": "x"}


def test_defaults_of_the_next_token_distribution_equal_the_yaml():
    """The server's only other default is the mode: the gate of `par_kl` can undo the alignment."""
    served = {key: compose.defaults("serve")["sampling"][key] for key in PARParams.field_names()}
    assert served == asdict(PARParams(sample_mode="par"))
    assert compose.defaults("config")["sampling"]["sample_mode"] == PARParams().sample_mode
    assert set(compose.defaults("serve")["sampling"]) == set(PARParams.field_names())


def test_numbers_are_not_converted():
    """Run names, tags and hashes show a number as it was given: `t1_...` for temperature 1."""
    config = settings("lr=1", "sampling.temperature=1", "sampling.top_p=1.0", "loss=ours_sft", "loss.alpha=1")
    values = [config.lr, config.sampling.temperature, config.sampling.params.temperature, config.loss.alpha]
    assert repr(values) == "[1, 1, 1, 1]" and repr(config.sampling.top_p) == "1.0"
    assert type(config.sampling.params) is PARParams


def test_merged_sampling_keys_are_checked_again():
    sampling = settings().sampling
    changed = schema.merged(sampling, {"top_p": 0.5, "endpoint": {"retries": 3}}, {"top_p": 0.25})
    assert (changed.top_p, changed.endpoint.retries, changed.endpoint.timeout) == (0.25, 3, 600)
    assert sampling.top_p == 0.9
    with pytest.raises(UserError, match=r"sampling.top_p=2: expected a number in \(0, 1\]"):
        schema.merged(sampling, {"top_p": 2})
    with pytest.raises(UserError, match="sampling.endpoint.retries=-1: expected a number in"):
        schema.merged(sampling, {"endpoint": {"retries": -1}})


def test_settings_are_immutable():
    config = settings()
    for section in (config, config.sampling, config.evaluation, config.loss):
        with pytest.raises(Exception, match="frozen|cannot assign"):
            setattr(section, next(iter(vars(section))), None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sampling.endpoint.concurrency=0",
            r"sampling.endpoint.concurrency=0: expected a number in \[1, inf\)",
        ),
        ("sampling.endpoint=3", "sampling.endpoint=3: expected keys below it, e.g. sampling.endpoint.urls"),
        ("wandb=null", "wandb=null: expected keys below it, e.g. wandb.enabled"),
        ("judge=null", "unknown judge 'null': Known: .*dummy"),
        ("local_dirs=[1]", r"local_dirs\[0\]=1: expected str"),
        ("lr=true", "lr=true: expected float, e.g. lr=2e-05"),
        ("seed=null", "seed=null: expected int, e.g. seed=0"),
        ("sampling.temperature=inf", "sampling.temperature=inf: expected 0"),
        (
            "sampling.temperature=hot",
            "sampling.temperature='hot': expected float, e.g. sampling.temperature=0.5",
        ),
        ("heldout_fraction=nan", "heldout_fraction=nan: expected a finite number"),
        ("resume=always", "resume='always': expected one of auto, never"),
        ("++judge.tone=1", "unknown key 'judge.tone'"),
        ("evaluation.systems.a=3", "evaluation.systems.a=3: expected keys below it"),
        ("report_dir=${nothing}", "report_dir: .*nothing"),
    ],
)
def test_refusal_names_the_key_and_the_expected_value(override, message):
    with pytest.raises(UserError, match=message) as error:
        settings(override)
    assert "\n" not in str(error.value)


def test_divergence_threshold_may_be_infinite():
    assert settings("sampling.div_threshold=inf").sampling.div_threshold == float("inf")


def test_record_without_a_newer_key_counts_as_trained_with_its_first_value():
    """Runs were trained before `loss.sampled_fraction` existed."""
    (stage,) = recipes.resolve(["model=llama1b", "datasets=[uc]", "loss=ours_sft"], TABLES)
    current = recipes.identity(stage.config)
    old = {key: value for key, value in current.items() if key != "loss.sampled_fraction"}
    assert recipes.recorded_identity({"settings": old}, current) == current
    (plain,) = recipes.resolve(["model=llama1b", "datasets=[uc]"], TABLES)
    current = recipes.identity(plain.config)
    assert recipes.recorded_identity({"settings": current}, current) == current


def test_every_field_is_declared_once():
    """A key of the next-token distribution is declared in PARParams alone."""
    own = schema.SamplingSettings.__annotations__
    assert not set(own) & set(PARParams.field_names())
    assert {field.name for field in fields(schema.SamplingSettings)} == set(own) | set(
        PARParams.field_names()
    )
