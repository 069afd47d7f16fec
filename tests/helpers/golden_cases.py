"""Cases of the golden record (golden_record.py): the overrides of command lines, apart by spaces."""

import re
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[2] / "config"

INTEGERS = """baselines=true lr=1 loss.alpha=0 max_grad_norm=1 heldout_fraction=0 sampling.div_threshold=1
    sampling.temperature=1 sampling.top_p=1 sampling.repetition_penalty=1 sampling.base_temperature=1
    sampling.base_top_p=1 sampling.base_repetition_penalty=1"""
FLOATS = re.sub(r"=([01])\b", r"=\1.0", INTEGERS)
EVERY = {"plain": "", "baselines": "baselines=true", "integers": INTEGERS}  # for every experiment
VARIANTS = {  # for the experiments in DETAILED, apart from keys that only some of them have
    "sizes, decoding": """seed=1 batch_size=8 gradient_accumulation_steps=8 n_epochs=2 n_examples=64
        warmup_steps=2 max_length=40 max_prompt_length=30 eval_every=10 keep_steps=1 sampling.limit=1
        sampling.top_k=5 sampling.base_top_k=20 sampling.kl_fallback=aligner sampling.dtype=float32
        sampling.eos_priority=true sampling.div_threshold=inf
        evaluation.systems.snis={proposal:proposal,aligner:aligner,sample_mode:snis,n_candidates:8}
        evaluation.systems.mds={proposal:proposal,aligner:aligner,sample_mode:mds,expert_temperature:1}
        evaluation.systems.alone={aligner:aligner,template:vicuna_v1.1,stop_str:null}
        evaluation.systems.proposal.backend=endpoint
        sampling.endpoint.urls=[http://localhost:8000/v1]""",
    "nulls, speed": """n_epochs=null n_examples=8 save_every=null n_eval_examples=null exp_flag=null
        exp_name=null divergence.min_sampled_logp_per_token=null sampling.stop_str=null
        sampling.system_key=null model.fsdp_policy_mp=null sampling.expert_temperature=null
        sampling.n_candidates=null trainer=BasicTrainer packed=false compile=true eval_batch_size=2
        debug=true resume=never wandb.enabled=true sampling.batch_size=2 sampling.speculative=false
        sampling.cuda_graphs=true""",
    "names": """exp_prefix=x_ exp_flag=v2 output_dir=out data_dir=data experiment_name=other lr=1e-6
        stage.aligner.lr=1 stage.aligner.exp_flag=v3 stage.aligner.loss.alpha=1 add_bos=true optimizer=SGD
        stage.aligner.loss.sampled_fraction=1 sampling.generator=me""",
}
DETAILED = {
    "demo": {
        "task, toy world": "evaluation.tasks.facts.temperature=1 world.entities=8 world.general_styles.rude=0"
    },
    "llama_hh": {
        "sampled": "baselines=true hh_negatives=sampled",
        "task": "evaluation.tasks.harmless.temperature=1",
    },
    "llama_uc": {
        "floats": FLOATS,
        "task, losses, models": """evaluation.tasks.helpful.temperature=1 sampling.base_temperature=0
            stage.aligner.loss=ours_dpo stage.aligner.loss.beta=2 pair.aligner=llama3b""",
        "ablation aligner_size": "ablation=aligner_size pair.aligner=llama3b",
        "ablation alpha 1e-5": "ablation=alpha ++stage.aligner.loss_settings.alpha=1e-5",
        "ablation alpha 1": "ablation=alpha ++stage.aligner.loss_settings.alpha=1",
        "ablation div_threshold": "ablation=div_threshold sampling.div_threshold=1",
        "ablation n_examples": "ablation=n_examples ++stage.aligner.n_examples=3750",
        "ablation sampled_fraction": """ablation=sampled_fraction
            ++stage.aligner.loss_settings.sampled_fraction=0.05""",
        "ablation temperatures": "ablation=temperatures sampling.temperature=0.1 sampling.base_temperature=1",
    },
}
JUDGES = [
    "judge=alpaca_eval",
    "judge=alpaca_eval judge.model=null judge.criterion=harmless",
    "judge=dummy",
    "judge=endpoint",
    "judge=endpoint judge.model=null judge.both_orders=true",
    "judge=endpoint judge.criterion=summary",
    "judge=exact",
    "judge=reward_model judge.model=reward",
    "judge=reward_model judge.model=reward judge.max_length=1",
]
SERVERS = {
    "defaults": "",
    "aligner": "aligner=b/LATEST limits.max_length=64 add_bos=true sampling.top_k=5",
    "aligners": "aligners={x:b/LATEST,y:c/LATEST} seed=3 sampling.expert_temperature=1.5",
}


def choices(group: str) -> list[str]:
    """Files of a group, without the recipe `pair`, whose models and data are the user's."""
    return sorted(path.stem for path in (CONFIG / group).glob("*.yaml") if path.stem != "pair")


# Experiments that are stored as differences from another one.
ALIKE = {"toy_facts": "demo", "qwen_hh": "llama_hh", "qwen_summ": "llama_summ", "qwen_uc": "llama_uc"}
QUICK = {  # checked by default: seconds; the others (pytest -m slow) take a minute
    "root": {"defaults", "formats"},
    "server": {"defaults", "aligner"},
    "single runs": {"loss dpo"},
    "demo": {"baselines", "integers"},
    "llama_hh": {"baselines"},
    "llama_uc": {"plain", "integers", "names"},
}


def command_lines(experiment: str) -> dict[str, str]:
    """The cases of an experiment, `plain` first."""
    cases = EVERY | (VARIANTS | DETAILED[experiment] if experiment in DETAILED else {})
    if experiment in ("demo_mixture", "demo_ratio"):  # they have no gated pair, so the key would be refused
        cases = {name: re.sub(r"sampling\.div_threshold=\S+", "", line) for name, line in cases.items()}
    return {name: f"experiment={experiment} {overrides}" for name, overrides in cases.items()}


def single_runs() -> dict[str, str]:
    """Runs without a recipe: every loss and every model."""
    cases = {f"loss {name}": f"model=llama1b loss={name} datasets=[hh]" for name in choices("loss")}
    cases["loss ratio"] += " proposal=models/large"
    models = [name for name in choices("model") if name != "blank_model"]
    cases |= {f"model {name}": f"model={name} datasets=[uc,hh]" for name in models}
    return cases | {"exp_name": "model=llama1b datasets=[hh] exp_name=mine lr=1"}
