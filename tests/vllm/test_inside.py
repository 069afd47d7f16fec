"""A pair inside vLLM has the distributions and the texts of `generate`."""

import json
import random
import subprocess
from collections import Counter

import pytest
import torch
from inside import (
    PYTHON,
    TOKENIZER,
    needs_vllm,
    pair_engine,
    report,
    run_jobs,
    save_quantised,
    save_random_pair,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from ram.decoding import generation
from ram.decoding.par import NEG_INF, PARParams, kl_divergence, token_logprobs
from ram.storage.files import read_rows
from ram.vllm import laws

pytestmark = [pytest.mark.slow, needs_vllm]
NUCLEUS = {"base_temperature": 1.2, "base_top_p": 0.9, "div_threshold": 6.3}
CASES = {
    "par": {"sample_mode": "par"},
    "par, EOS first": {"sample_mode": "par", "eos_priority": True},
    "par_kl, aligner's fall-back": {"sample_mode": "par_kl", "kl_fallback": "aligner"},
    "par_kl": {"sample_mode": "par_kl", "temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "product": {"sample_mode": "product", "temperature": 0.7, "top_p": 0.9},
    "mds": {"sample_mode": "mds", "temperature": 0.7, "top_p": 0.9, "expert_temperature": 0.8},
}
REQUESTS = [  # of the open form
    {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.3},
    {"temperature": 1.3, "top_p": 1.0, "top_k": 12, "repetition_penalty": 1.0},
    {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.3},
]
LENGTH = 3  # tokens of an answer


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def params_of(values, request):
    closed = {"repetition_penalty": 1.0} if request is None else request
    return PARParams(**NUCLEUS | values | closed)


def near_an_edge(logits, top_p):
    """Whether a prefix of the ranked tokens holds `top_p` of the mass to within 1e-4."""
    held = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    return top_p < 1 and bool(((held - top_p).abs() < 1e-4).any())


@torch.no_grad()
def compare(pair, size, eos, prompts, found, params):
    """Compare every position's distribution; return the number compared in each branch of the gate."""
    counts = {False: 0, True: 0}
    for prompt, ids, distributions in zip(prompts, found["ids"], found["logprobs"], strict=True):
        context = torch.tensor([prompt + ids])
        z_p, z_q = (model(context, use_cache=False).logits[0, :, :size] for model in pair)
        for step, distribution in enumerate(distributions):
            place = len(prompt) + step - 1
            a, b, seen = z_p[place : place + 1], z_q[place : place + 1], context[:, : place + 1]
            kl = float(kl_divergence(a, b))
            expected = token_logprobs(a, b, params, seen, eos)
            masked = b.masked_fill(token_logprobs(a, None, params) == NEG_INF, NEG_INF)
            edges = [(a / (params.base_temperature or 1), params.base_top_p)]
            edges += [(z / (params.temperature or 1), params.top_p) for z in (a, b, masked)]
            if abs(kl - params.div_threshold) < 1e-4 or any(near_an_edge(z, p) for z, p in edges):
                continue
            through = torch.full((1, size), NEG_INF)
            for token, value in distribution.items():
                if int(token) < size:
                    through[0, int(token)] = value
            if params.temperature == 0:  # vLLM reports the distribution that the argmax is taken of
                assert int(through.argmax()) == int(expected.argmax()) == ids[step]
            else:
                finite = expected > NEG_INF
                assert torch.equal(finite, through > NEG_INF)
                torch.testing.assert_close(through[finite], expected[finite], rtol=0, atol=1e-3)
            counts[params.sample_mode == "par_kl" and kl > params.div_threshold] += 1
    return counts


def test_distributions_of_every_mode(tmp_path):
    """Processed log-probabilities against `token_logprobs`, penalties and limits included."""
    proposal, aligner = save_random_pair(tmp_path)
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(2, 8))] for _ in range(25)]
    jobs = []
    for values in CASES.values():
        own = params_of(values, None)
        is_open = laws.form_of(own) == laws.OPEN
        wanted = REQUESTS if is_open else [laws.request_settings(own)]
        common = {"max_tokens": LENGTH, "logprobs": -1, "ignore_eos": True, "seed": 1}
        requests = [{"prompts": prompts, "sampling": common | request} for request in wanted]
        engine = pair_engine(aligner, **NUCLEUS | values | ({} if is_open else {"repetition_penalty": 1.0}))
        jobs.append({"model": proposal, "engine": engine | {"max_model_len": 64}, "requests": requests})
    results = run_jobs(jobs, tmp_path)
    pair = load(proposal), load(aligner)
    for (name, values), result in zip(CASES.items(), results, strict=True):
        counts = {False: 0, True: 0}
        is_open = laws.form_of(params_of(values, None)) == laws.OPEN
        for place, found in enumerate(result["requests"]):
            params = params_of(values, REQUESTS[place] if is_open else None)
            eos = (TOKENIZER.eos_token_id,)
            added = compare(pair, len(TOKENIZER), eos, prompts, found, params)
            counts = {branch: counts[branch] + n for branch, n in added.items()}
        report(f"{name}: {counts[False]} positions, {counts[True]} of them beyond the gate's threshold")
        assert sum(counts.values()) >= 50
        assert values["sample_mode"] != "par_kl" or min(counts.values()) >= 10


def test_quantised_proposal_leaves_the_aligner_whole(tmp_path):
    """A pair of an 8-bit proposal, whose head is whole, and an aligner in float32."""
    proposal, aligner = save_random_pair(tmp_path, is_plain=True)  # 8 bits round much beside a large feature
    quantised = save_quantised(proposal, tmp_path / "quantised")
    rng = random.Random(4)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(2, 8))] for _ in range(25)]
    # With the whole vocabulary as nucleus the aligner decides alone, with temperature 0 the proposal.
    settings = [{"base_top_p": 1.0, "base_temperature": 1.0}, {"base_temperature": 0.0}]
    sampling = {"max_tokens": 1, "logprobs": -1, "ignore_eos": True, "seed": 1} | REQUESTS[0]
    request = {"prompts": prompts, "sampling": sampling}
    engines = [pair_engine(aligner, sample_mode="par", **values) for values in settings]
    jobs = [{"model": quantised, "engine": engine, "requests": [request]} for engine in engines]
    of_aligner, of_proposal = (result["requests"][0] for result in run_jobs(jobs, tmp_path))
    pair = load(proposal), load(aligner)
    params = PARParams("par", **settings[0] | REQUESTS[0])
    assert sum(compare(pair, len(TOKENIZER), (), prompts, of_aligner, params).values()) >= 20
    with torch.no_grad():
        logits = [pair[0](torch.tensor([ids])).logits[0, -1, : len(TOKENIZER)] for ids in prompts]
    same = sum(int(z.argmax()) == ids[0] for z, ids in zip(logits, of_proposal["ids"], strict=True))
    report(f"8-bit proposal: {same} of {len(prompts)} argmaxes are those of its float32 weights")
    assert same >= 15  # a guess would be one of 259


def test_texts_and_drafts(tmp_path, trained):
    """Greedy texts are those of `generate`, with and without drafts; drafts and speed are printed."""
    folder, models = trained
    tokenizer = AutoTokenizer.from_pretrained(models["proposal"])
    (questions,) = folder.glob("data/*/test/toy_test.json")
    texts = [f"\n\nHuman: {row['instruction']}\n\nAssistant: " for _, row in read_rows(questions)[:64]]
    prompts = [tokenizer(text).input_ids for text in texts]
    penalty = {"repetition_penalty": 1.1, "top_p": 1.0}
    greedy = {"temperature": 0.0, "max_tokens": 12} | penalty
    speed = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    speeds = [{"prompts": prompts[:n], "sampling": speed} for n in (1, 1, 16, 64)]  # once to warm up
    engine = pair_engine(models["aligner"], sample_mode="par", base_top_p=0.95, base_temperature=1.0)
    jobs = [{"engine": {}, "requests": speeds}, {"engine": engine, "requests": speeds}]
    jobs[1]["requests"] = [{"prompts": prompts, "sampling": greedy}, *speeds]
    for method in ("greedy", "probabilistic"):
        speculative = {"method": "draft_model", "model": models["aligner"], "num_speculative_tokens": 3}
        speculative |= {"draft_sample_method": method}
        request = {"prompts": prompts, "sampling": greedy}
        jobs.append({"engine": engine | {"speculative_config": speculative}, "requests": [request]})
    results = run_jobs([{"model": models["proposal"]} | job for job in jobs], tmp_path)

    pair = load(models["proposal"]), load(models["aligner"])
    params = PARParams("par", base_top_p=0.95, base_temperature=1.0, temperature=0.0, repetition_penalty=1.1)
    expected = generation.generate(*pair, tokenizer, prompts, params, max_new_tokens=12)
    wanted = [answer.token_ids for answer in expected]
    assert len({tuple(ids) for ids in wanted}) >= 20
    alone, plain, greedy_drafts, probable_drafts = results
    for result in (plain, greedy_drafts, probable_drafts):
        assert result["requests"][0]["ids"] == wanted
    # Not at temperature 1: the CPU build samples drafted positions with uninitialised temperatures.
    for name, result in {"greedy": greedy_drafts, "probabilistic": probable_drafts}.items():
        report(f"{name} drafts, temperature 0: {result['accepted']} of {result['drafted']} accepted")
        assert 0 < result["accepted"] <= result["drafted"]
    for name, result in {"proposal alone": alone, "pair": plain}.items():
        rates = [sum(map(len, r["ids"])) / r["seconds"] for r in result["requests"][-3:]]
        rounded = ", ".join(f"{rate:.0f}" for rate in rates)
        report(f"{name}: {rounded} tokens/s at 1, 16, 64 requests; {result['megabytes']:.0f} MB at most")


@torch.no_grad()
def test_answers_with_drafts_follow_the_exact_law(tmp_path, trained):
    """At temperature 1: 3,000 draws of two tokens, the second one drafted, against the pair's law.

    vLLM's CPU build loses the temperatures of drafted positions; the helper mends that one function.
    """
    count, rng = 3000, random.Random(6)
    proposal, aligner = save_random_pair(tmp_path, is_plain=True)  # drafts need equal rows
    prompts = [[rng.randrange(256) for _ in range(rng.randint(2, 8))] for _ in range(16)]
    params = PARParams("par", **NUCLEUS, temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    pair, size = (load(proposal), load(aligner)), len(TOKENIZER)

    def law(ids):
        z_p, z_q = (model(torch.tensor([ids])).logits[:, -1, :size] for model in pair)
        return token_logprobs(z_p, z_q, params, None, ())[0].exp()

    def joint(prompt):
        first = law(prompt)
        likely = first.gt(1e-4).nonzero()[:, 0].tolist()
        return {(a, b): float(first[a] * p) for a in likely for b, p in enumerate(law([*prompt, a])) if p > 0}

    laws_of = [joint(prompt) for prompt in prompts[:16]]
    place = max(range(16), key=lambda i: sum(p * count >= 5 for p in laws_of[i].values()))
    expected = {cell: count * p for cell, p in laws_of[place].items() if count * p >= 5}
    assert len(expected) >= 8

    folder, models = trained
    tokenizer = AutoTokenizer.from_pretrained(models["proposal"])
    (questions,) = folder.glob("data/*/test/toy_test.json")
    texts = [f"\n\nHuman: {row['instruction']}\n\nAssistant: " for _, row in read_rows(questions)[:64]]
    drafting = {"prompts": [tokenizer(text).input_ids for text in texts]}
    drafting["sampling"] = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    drawing = {"prompts": [prompts[place]] * count}
    drawing["sampling"] = {"temperature": 1.0, "max_tokens": 2, "ignore_eos": True}
    toy = pair_engine(models["aligner"], sample_mode="par", base_top_p=0.95, base_temperature=1.0)
    flat = pair_engine(aligner, sample_mode="par", **NUCLEUS)
    for method in ("greedy", "probabilistic"):
        jobs = []
        for models_of, engine, request in (
            ((models["proposal"], models["aligner"]), toy, drafting),
            ((proposal, aligner), flat, drawing),
        ):
            drafts = {"method": "draft_model", "model": models_of[1], "num_speculative_tokens": 3}
            drafts["draft_sample_method"] = method
            job = {"model": models_of[0], "engine": engine | {"speculative_config": drafts}, "mended": True}
            jobs.append(job | {"requests": [request]})
        results = run_jobs(jobs, tmp_path)
        found = Counter(map(tuple, results[1]["requests"][0]["ids"]))
        cells = [(found[cell], mean) for cell, mean in expected.items()]
        cells.append((count - sum(n for n, _ in cells), count - sum(mean for _, mean in cells)))
        statistic = sum((n - mean) ** 2 / mean for n, mean in cells if mean > 0)
        deviations = (statistic - len(cells) + 1) / (2 * (len(cells) - 1)) ** 0.5  # of a chi-square
        report(
            f"{method} drafts, temperature 1: {results[0]['accepted']} of {results[0]['drafted']} accepted; "
            f"{count} answers of two tokens: chi-square {statistic:.1f} of {len(cells)} cells"
        )
        assert deviations < 4 and results[1]["drafted"] > 0


def test_texts_with_tensor_parallelism(tmp_path):
    """Two processes share both members."""
    proposal, aligner = save_random_pair(tmp_path)
    rng = random.Random(5)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(2, 8))] for _ in range(8)]
    sampling = {"temperature": 0.0, "max_tokens": 12, "repetition_penalty": 1.3}
    engine = pair_engine(aligner, sample_mode="par", **NUCLEUS) | {"tensor_parallel_size": 2}
    jobs = [{"model": proposal, "engine": engine, "requests": [{"prompts": prompts, "sampling": sampling}]}]
    (result,) = run_jobs(jobs, tmp_path)
    params = PARParams("par", temperature=0.0, repetition_penalty=1.3, **NUCLEUS)
    expected = generation.generate(
        load(proposal), load(aligner), TOKENIZER, prompts, params, max_new_tokens=12
    )
    assert result["requests"][0]["ids"] == [answer.token_ids for answer in expected]


STARTS = """
import json, sys
from types import SimpleNamespace as Fake
from vllm.config import ModelConfig, ParallelConfig
from ram.vllm import model

proposal, aligner = sys.argv[1:]
config = ModelConfig(model=proposal, tokenizer=proposal, dtype="float32")
found = {}

def attempt(name, function):
    try:
        function()
        found[name] = "accepted"
    except Exception as error:
        found[name] = str(error)

def engine(name, key=None, value=None, part="model_config", speculative=None):
    text = object()
    parts = {
        "model_config": Fake(enable_prompt_embeds=False, logits_processors=None, skip_tokenizer_init=False,
                             runner_type="generate", hf_config=text, hf_text_config=text),
        "parallel_config": Fake(pipeline_parallel_size=1),
        "load_config": Fake(load_format="auto"),
    }
    if key:
        setattr(parts[part], key, value)
    lora = Fake() if name == "lora" else None
    attempt(name, lambda: model.check_engine(Fake(**parts, lora_config=lora, speculative_config=speculative)))

engine("as it is")
engine("lora")
engine("pipeline", "pipeline_parallel_size", 2, "parallel_config")
engine("processors", "logits_processors", ["x"])
engine("embeds", "enable_prompt_embeds", True)
engine("pooling", "runner_type", "pooling")
engine("images", "hf_config", object())
engine("loader", "load_format", "bitsandbytes", "load_config")
engine("eagle", speculative=Fake(method="eagle3"))
engine("drafts", speculative=Fake(method="draft_model"))
def members(name, tensor_parallel=1, first=config, second=aligner):
    parallel = ParallelConfig()
    parallel.tensor_parallel_size = tensor_parallel
    fake = Fake(model_config=first, parallel_config=parallel)
    attempt(name, lambda: model.aligner_model_config(fake, second))
members("members")
members("heads", tensor_parallel=4)
members("larger heads", first=ModelConfig(model=aligner, tokenizer=aligner, dtype="float32"), second=proposal)
attempt("vocabulary", lambda: model.shared_vocabulary(config, ModelConfig(model=aligner, dtype="float32")))
attempt("ends", lambda: model.shared_ends(config, Fake(model="x", hf_config=Fake(eos_token_id=[5, 256]),
                                                       try_get_generation_config=dict)))
print(json.dumps(found))
"""


def test_what_a_pair_cannot_do_is_refused_at_the_start(tmp_path):
    """Checked without starting an engine, on vLLM's own configurations where they decide."""
    proposal, aligner = save_random_pair(tmp_path)
    done = subprocess.run(
        [PYTHON, "-c", STARTS, proposal, aligner], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    accepted = {name for name, message in found.items() if message == "accepted"}
    assert accepted == {"as it is", "drafts", "members", "vocabulary"}, found
    reasons = {"lora": "--enable-lora", "pipeline": "--pipeline-parallel-size", "eagle": "drafts by eagle3"}
    reasons |= {"heads": "divisible", "larger heads": "heads of 64", "ends": "put all into eos_token_id"}
    assert all(reason in found[name] for name, reason in reasons.items()), found
