"""Resolving configurations into stages: shipped files, names, precedence, and early refusals."""

from pathlib import Path

import pytest

from ram.errors import UserError
from ram.evaluation.systems import resolve_systems
from ram.settings import compose, recipes
from ram.settings.schema import settings_of
from utils import TABLES

CONFIG = Path(compose.CONFIG_DIR)
PUBLISHED = ("llama_uc", "llama_summ", "llama_hh", "qwen_uc", "qwen_summ", "qwen_hh")


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIG / "experiment").glob("*.yaml")))
def test_every_shipped_recipe_resolves(name):
    overrides = [f"experiment={name}"]
    if name == "pair":  # its models and data are the user's
        overrides += ["pair.proposal=llama8b", "pair.aligner=llama1b", "datasets=[uc]"]
    stages = recipes.resolve(overrides, TABLES)
    assert len({stage.output for stage in stages}) == len(stages)
    config = compose.compose(overrides)
    assert config.experiment_name == name and config.evaluation.systems and config.evaluation.tasks


# run folder of each trained stage; (lr, accumulation, warm-up, lengths, examples) as published
EXPECTED = {
    "llama_uc": {
        "proposal": ("wu_sft_uc_llama8b_b64_lr1e-06", 1e-6, 2, 0.5, (2048, 1024), 10048),
        "aligner": ("ours_sft_uc_llama1b_b64_lr2e-07", 2e-7, 4, 0.1, (2048, 1024), None),
    },
    "llama_summ": {
        "proposal": ("wu_sft_summ-sft_llama8b_b64_lr1e-06", 1e-6, 2, 0.5, (1152, 640), 10048),
        "aligner": ("ours_sft_summ-sft_llama1b_b64_lr2e-07", 2e-7, 2, 0.1, (1152, 640), None),
    },
    "llama_hh": {
        "aligner_sft": ("sft_hh_llama1b_b64_lr1e-06", 1e-6, 4, 0.1, (2048, 1024), None),
        "proposal": ("sft_hh_llama8b_b64_lr1e-06", 1e-6, 4, 0.1, (2048, 1024), None),
        "aligner": ("ours_sft_hh_llama1b_b64_lr2e-07", 2e-7, 4, 0.1, (2048, 1024), None),
    },
    "qwen_uc": {
        "proposal": ("wu_sft_uc_qwen14b_b64_lr1e-06", 1e-6, 4, 0.5, (2048, 1024), 10048),
        "aligner": ("ours_sft_uc_qwen3b_b64_lr1e-06", 1e-6, 4, 0.1, (2048, 1024), None),
    },
    "qwen_summ": {
        "proposal": ("wu_sft_summ-sft_qwen14b_b64_lr1e-06", 1e-6, 2, 0.5, (1152, 640), 10048),
        "aligner": ("ours_sft_summ-sft_qwen3b_b64_lr2e-07", 2e-7, 2, 0.1, (1152, 640), None),
    },
    "qwen_hh": {
        "aligner_sft": ("sft_hh_qwen3b_b64_lr1e-06", 1e-6, 4, 0.1, (2048, 1024), None),
        "proposal": ("sft_hh_qwen14b_b64_lr1e-06", 1e-6, 4, 0.1, (2048, 1024), None),
        "aligner": ("ours_sft_hh_qwen3b_b64_lr2e-07", 2e-7, 4, 0.1, (2048, 1024), None),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_keep_their_settings(name):
    """Run names, learning rates, accumulation, warm-up, lengths and sizes of the published runs."""
    found = {}
    for stage in recipes.resolve([f"experiment={name}"], TABLES):
        c = stage.config
        if stage.kind == "train":
            found[stage.name] = (
                stage.output.name,
                c.lr,
                c.gradient_accumulation_steps,
                c.warmup_steps,
                (c.max_length, c.max_prompt_length),
                c.n_examples,
            )
            assert (c.batch_size, c.optimizer, c.max_grad_norm, c.add_bos) == (64, "RMSprop", 10.0, False)
        else:
            s = c.sampling
            assert (s.base_temperature, s.base_top_p, s.base_top_k, s.base_repetition_penalty) == (
                0.5,
                0.95,
                10,
                1.05,
            )
            assert (s.max_length, s.max_prompt_length, s.stop_str) == (
                c.max_length,
                c.max_prompt_length,
                "\n\nHuman",
            )
    assert found == EXPECTED[name]


# aligner temperature, base temperature
SETTINGS = {
    ("llama_uc", "helpful"): (0.7, 0.5),
    ("llama_summ", "summ"): (0.3, 0.5),
    ("llama_hh", "helpful"): (0.5, 0.7),
    ("llama_hh", "harmless"): (0.3, 0.7),
    ("qwen_uc", "helpful"): (0.3, 0.7),
    ("qwen_summ", "summ"): (0.3, 0.5),
    ("qwen_hh", "helpful"): (0.7, 0.5),
    ("qwen_hh", "harmless"): (0.3, 0.5),
}


def test_the_eight_published_evaluations():
    """Temperatures per task, and each evaluation reads the folder that its training recipe writes."""
    import pipeline

    found = {}
    for name in PUBLISHED:
        config = settings_of(compose.compose([f"experiment={name}"]), TABLES)
        stages = {stage.name: stage for stage in recipes.resolve([f"experiment={name}"], TABLES)}
        for task in config.evaluation.tasks:
            system = resolve_systems(config, task, stages, set())["proposal+aligner[par_kl]"]
            found[name, task] = (system.params.temperature, system.params.base_temperature)
            assert system.params.sample_mode == "par_kl" and system.params.div_threshold == 0.1
            assert system.pair.aligner == str(stages["aligner"].weights)
            assert system.pair.proposal == str(stages["proposal"].weights)
            run = stages["aligner"].output.name
            assert str(system.folder).startswith(f"_output/{config.evaluation.dataset}/{task}/{run}/LATEST#")
            assert task in pipeline.test_files[config.evaluation.dataset]
    assert found == SETTINGS


def test_hh_negatives_choose_the_second_term():
    """`rejected` trains on the data set's pairs; `sampled` adds the sample stage and its file."""
    published = {s.name: s for s in recipes.resolve(["experiment=llama_hh"], TABLES)}
    paper = {s.name: s for s in recipes.resolve(["experiment=llama_hh", "hh_negatives=sampled"], TABLES)}
    assert list(published["aligner"].config.datasets) == ["hh"] and "sample" not in published
    assert list(paper["aligner"].config.datasets) == ["hh_llama8b"]
    assert (
        paper["sample"].output == paper["aligner"].reads[0] == Path("_data/train/hh_sampling_llama8b.jsonl")
    )


def test_what_a_stage_writes_is_what_the_next_reads():
    """Weights and samples flow from stage to stage by the same path on both sides."""
    stages = {s.name: s for s in recipes.resolve(["experiment=llama_uc", "pair.proposal=llama3b"], TABLES)}
    assert stages["sample"].source == str(stages["proposal"].weights)
    assert stages["sample"].output == stages["aligner"].reads[0]
    assert stages["sample"].output.name == "ultrachat_round_one_sampling_llama3b.json"
    hh = {s.name: s for s in recipes.resolve(["experiment=qwen_hh"], TABLES)}
    assert hh["aligner"].source == str(hh["aligner_sft"].weights)


@pytest.mark.parametrize(
    ("root", "own", "expected"),
    [
        ("lr=1e-5", "stage.aligner.lr=2e-5", 2e-5),
        ("lr=1e-5", "stage.aligner={lr: 2e-5}", 2e-5),
        ("lr=1e-5", "stage.proposal={lr: 2e-5}", 1e-5),
    ],
)
def test_key_of_a_stage_wins_over_that_of_all_however_it_is_written(root, own, expected):
    assert learning_rates(root, own)["aligner"] == expected


def learning_rates(*overrides):
    return {
        s.name: s.config.lr
        for s in recipes.resolve(["experiment=llama_uc", *overrides], TABLES)
        if s.kind == "train"
    }


def test_command_line_beats_recipe_and_stage_beats_root():
    """A root key reaches every stage, a stage's key that stage alone, whichever order they are given in."""
    assert learning_rates() == {"proposal": 1e-6, "aligner": 2e-7}
    assert learning_rates("lr=1e-5") == {"proposal": 1e-5, "aligner": 1e-5}
    assert learning_rates("++stage.aligner.lr=1e-4") == {"proposal": 1e-6, "aligner": 1e-4}
    for order in (("lr=1e-5", "++stage.aligner.lr=1e-4"), ("++stage.aligner.lr=1e-4", "lr=1e-5")):
        assert learning_rates(*order) == {"proposal": 1e-5, "aligner": 1e-4}


def test_loss_keys_reach_the_stages_that_have_them():
    """`loss.alpha=` changes the aligner and its run name, and does not trouble the SFT stages."""
    stages = {s.name: s for s in recipes.resolve(["experiment=llama_uc", "loss.alpha=0.01"], TABLES)}
    assert stages["aligner"].config.loss.alpha == 0.01
    assert stages["aligner"].output.name == "ours_sft_uc_llama1b_b64_lr2e-07_a0.01"
    assert stages["proposal"].output.name == "wu_sft_uc_llama8b_b64_lr1e-06"


def test_a_stage_takes_any_key():
    """preflight opens stages for keys that their recipe does not name."""
    overrides = compose.preflight(
        ["experiment=llama_uc", "stage.aligner.exp_flag=v2", "stage.aligner.seed=3"]
    )
    aligner = recipes.resolve(overrides, TABLES)[-1]
    assert aligner.output.name.endswith("_@v2") and aligner.config.seed == 3


def test_identity_ignores_only_what_changes_no_weight():
    """Two runs are the same run exactly where every key that can change a weight is the same."""
    base = ["model=llama1b", "datasets=[uc]"]

    def identity(*overrides):
        return recipes.identity(recipes.resolve([*base, *overrides], TABLES)[0].config)

    for same in ("wandb.enabled=true", "eval_every=7", "output_dir=x", "exp_name=y", "n_eval_examples=3"):
        assert identity(same) == identity(), same
    for other in (
        "lr=3e-5",
        "seed=1",
        "max_length=600",
        "batch_size=8",
        "loss=ours_sft",
        "n_examples=5",
        "add_bos=true",
        "optimizer=AdamW",
        "export_dtype=bfloat16",
        "heldout_fraction=0.1",
        "warmup_steps=3",
    ):
        assert identity(other) != identity(), other


TRAIN = ["model=llama1b", "datasets=[uc]"]
REFUSED = {
    "key": ([*TRAIN, "lrr=1"], r"unknown key 'lrr': did you mean 'lr'"),
    "inner key": ([*TRAIN, "sampling.temprature=1"], r"did you mean 'sampling.temperature'"),
    "model": (
        ["model=lama1b", "datasets=[uc]"],
        r"unknown model 'lama1b': did you mean 'llama1b'\? Known: .*qwen14b",
    ),
    "loss": ([*TRAIN, "loss=our_sft"], r"unknown loss 'our_sft': did you mean 'ours_sft'"),
    "experiment": (["experiment=lama_uc"], r"did you mean 'llama_uc'"),
    "data set": (["model=llama1b", "datasets=[ucc]"], r"unknown data set 'ucc': did you mean 'uc'"),
    "no data set": (["model=llama1b"], r"datasets is not set"),
    "sampled variant": (["model=llama1b", "datasets=[shp_llama8b]"], r"has no sampled variant"),
    "no model": (["datasets=[uc]"], r"no model: give model=NAME"),
    "no value": ([*TRAIN, "lr"], r"expected key=value"),
    "type": ([*TRAIN, "lr=abc"], r"lr='abc': expected float"),
    "bool": ([*TRAIN, "debug=3"], r"debug=3: expected bool"),
    "int": ([*TRAIN, "batch_size=1.5"], r"batch_size=1.5: expected int"),
    "mode": ([*TRAIN, "stage.x.kind=1"], r"stage"),
    "lengths": ([*TRAIN, "max_prompt_length=512"], r"max_prompt_length=512 .*less than max_length=512"),
    "accumulation": (
        [*TRAIN, "batch_size=6", "gradient_accumulation_steps=4"],
        r"batch_size=6 is not a multiple",
    ),
    "token budget": (
        [*TRAIN, "loss=dpo", "tokens_per_pass=1000"],
        r"tokens_per_pass=1000: .* 2 x max_length = 1024 tokens",
    ),
    "trainer": ([*TRAIN, "trainer=BasicTrainr"], r"unknown trainer .* did you mean 'BasicTrainer'"),
    "dropped trainer": ([*TRAIN, "trainer=TensorParallelTrainer"], r"use trainer=FSDPTrainer"),
    "optimizer": ([*TRAIN, "optimizer=RMSProp"], r"unknown optimizer 'RMSProp': did you mean 'RMSprop'"),
    "master weights": (
        [*TRAIN, "model.policy_dtype=bfloat16"],
        r"only float32; narrower weights do not move",
    ),
    "list": ([*TRAIN, "stages=aligner"], r"stages='aligner': expected list, e.g. stages=\[aligner\]"),
    "list of names": (
        ["model=llama1b", "datasets=uc"],
        r"datasets='uc': expected list, e.g. datasets=\[uc\]",
    ),
    "null section": ([*TRAIN, "sampling=null"], r"sampling=null: expected keys below it, e.g. sampling."),
    "not finite": ([*TRAIN, "lr=nan"], r"lr=nan: expected a finite number"),
    "no examples": ([*TRAIN, "n_examples=0"], r"n_examples=0: expected a number in \[1, inf\)"),
    "no epochs": ([*TRAIN, "n_epochs=-1"], r"n_epochs=-1: expected a number in \[1, inf\)"),
    "held-out share": ([*TRAIN, "heldout_fraction=1.0"], r"heldout_fraction=1.0: .*\[0, 1\)"),
    "seed": ([*TRAIN, "seed=-1"], r"seed=-1: expected a number in \[0, inf\)"),
    "beta": ([*TRAIN, "loss=dpo", "loss.beta=0"], r"loss.beta=0: expected a number in \(0, inf\)"),
    "smoothing": ([*TRAIN, "loss=dpo", "loss.label_smoothing=0.5"], r"label_smoothing=0.5: .*\[0, 0.5\)"),
    "loss name": ([*TRAIN, "loss.name=dpo"], r"loss.beta is not set.*choose a loss by loss=dpo"),
    "reference type": (
        [*TRAIN, "loss=dpo", "model.reference_dtype=int8"],
        r"reference_dtype='int8': .*one of",
    ),
    "folder name": ([*TRAIN, "exp_name=../x"], r"exp_name='../x': expected a name that a folder can have"),
    "schedule": ([*TRAIN, "lr_schedule=linear"], r"lr_schedule='linear': expected one of constant, cosine"),
    "wandb": ([*TRAIN, "wandb.mode=on"], r"wandb.mode='?\w+'?: expected"),
    "rows at once": ([*TRAIN, "sampling.batch_size=0"], r"sampling.batch_size=0: expected"),
    "settings of a stage": (
        ["experiment=demo", "++stage.aligner.loss_settings=3"],
        r"stage.aligner.loss_settings=3: expected keys below it",
    ),
    "samples at evaluation": (
        [*TRAIN, "sample_during_eval=true", "sampling.sample_mode=snis"],
        r"n_candidates",
    ),
    "alpha": ([*TRAIN, "loss=ours_sft", "loss.alpha=2"], r"\Aloss.alpha=2: expected a number in \[0, 1\]"),
    "share": (
        [*TRAIN, "loss=ours_sft", "loss.sampled_fraction=0"],
        r"loss.sampled_fraction=0: expected a number in \(0, 1\]",
    ),
    "share above 1": ([*TRAIN, "loss=ours_sft", "loss.sampled_fraction=1.5"], r"fraction=1.5: expected"),
    "lr": ([*TRAIN, "lr=0"], r"lr=0: expected"),
    "root model in a recipe": (["experiment=llama_uc", "model=llama3b"], r"pair.aligner="),
    "stage": (
        ["experiment=llama_uc", "++stage.alinger.lr=1"],
        r"unknown stage 'alinger': did you mean 'aligner'",
    ),
    "key of a stage": (["experiment=llama_uc", "++stage.aligner.lrr=1"], r"unknown key 'lrr'"),
    "kind": (
        ["experiment=llama_uc", "stage.aligner.kind=trian"],
        r"unknown kind of stage.aligner 'trian'.*'train'",
    ),
    "sample mode": (
        ["experiment=llama_uc", "sampling.sample_mode=parr"],
        r"sampling.sample_mode='parr': expected one of",
    ),
    "snis": (["experiment=llama_uc", "sampling.sample_mode=snis"], r"n_candidates"),
    "top_p": (
        ["experiment=llama_uc", "sampling.base_top_p=1.5"],
        r"base_top_p=1.5: expected a number in \(0, 1\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    """What was given, what was expected, what to do: one line, raised without loading a model or data."""
    overrides, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        recipes.resolve(overrides, TABLES)
    assert "\n" not in str(error.value)


def test_settings_of_a_stages_loss():
    """`stage.NAME.loss.key=` reaches the one stage."""
    overrides = compose.preflight(["experiment=demo", "stage.aligner.loss.alpha=0.5"])
    stages = {stage.name: stage for stage in recipes.resolve(overrides, TABLES)}
    assert stages["aligner"].config.loss.alpha == 0.5
    assert not hasattr(stages["proposal"].config.loss, "alpha")


@pytest.mark.parametrize("text", ["\n\nHuman", "\\n", "it's", "a\\'b", "x\\", "null", "1", "{a: 1}"])
def test_text_of_a_stage_is_taken_as_it_is(text):
    config = recipes.stage_config({"kind": "sample", "sampling": {"stop_str": text}}, "sample", [])
    assert config.sampling.stop_str == text


def test_references_follow_a_stages_values():
    spec = {"kind": "train", "max_length": 100, "eval_every": 7, "lr": 1}
    config = recipes.stage_config(spec, "x", ["seed=3", "exp_flag=seed${seed}", "eval_every=9"])
    assert (config.sampling.max_length, config.save_every, config.exp_flag) == (100, 9, "seed3")


def test_missing_inputs_name_who_makes_them(tmp_path):
    """A file that an earlier stage writes names that stage; any other the script that makes data."""
    stages = recipes.resolve(
        ["experiment=llama_uc", f"data_dir={tmp_path}", f"output_dir={tmp_path}"], TABLES
    )
    with pytest.raises(UserError, match="ultrachat_round_one.json, which does not exist: .*prepare_data.sh"):
        recipes.check_inputs(stages, stages)
    with pytest.raises(UserError, match=r"run stage 'sample' first"):
        recipes.check_inputs(stages, stages[2:])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "ultrachat_round_one.json").write_text("[]")
    recipes.check_inputs(stages, stages)
    with pytest.raises(UserError, match="no model at .*wu_sft_uc_llama8b_b64_lr1e-06/LATEST"):
        recipes.check_inputs(stages, [stages[1]])


@pytest.mark.parametrize(
    ("reference", "label"),
    [("runs/mine/LATEST", "mine"), ("runs/mine/step-8", "mine"), ("models/p", "p"), ("org/name", "name")],
)
def test_models_are_called_by_their_run(tmp_path, monkeypatch, reference, label):
    """Not LATEST, which would be the name of every proposal's samples."""
    monkeypatch.chdir(tmp_path)
    if not reference.startswith("org"):
        (tmp_path / reference).mkdir(parents=True)
    assert recipes.label_of(reference) == label
