"""Run engines of vLLM in vLLM's own Python: `vllm_run.py JOBS RESULTS`, both JSON.

JOBS is a list of {model, engine, requests}. `engine` has the arguments of `vllm.LLM`; a request has
`prompts`, lists of token ids, and `sampling`, the arguments of SamplingParams. RESULTS has for each job the
start's seconds and counts of drafts, and for each request its seconds and, per prompt, the ids and every
position's log-probabilities, id -> value. A job with `mended` replaces a function of vLLM's CPU build that
loses the temperatures of drafted positions.
"""

import gc
import json
import os
import resource
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.utils import cpu_triton_utils

ENGINE = {"dtype": "float32", "enforce_eager": True, "generation_config": "vllm", "max_num_seqs": 64}
ENGINE |= {"logprobs_mode": "processed_logprobs", "max_logprobs": -1, "disable_log_stats": False}


def expand(output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None):
    """Repeat each request's value for its drafted positions, as vLLM's kernel on GPUs does.

    `_expand_kernel_impl` of 0.32.0 fills a copy of `output`, of whole numbers, and drops it.
    """
    start = 0
    for value, end in zip(input_val.tolist(), cu_num_tokens.tolist(), strict=True):
        output[start:end] = replace_to if value == replace_from else value
        start = end


def run(job: dict) -> dict:
    if job.get("mended"):
        cpu_triton_utils._expand_kernel_impl = expand  # is registered when the engine starts
    start = time.monotonic()
    llm = LLM(job["model"], **ENGINE | job["engine"])
    result = {"start": time.monotonic() - start, "requests": []}
    for request in job["requests"]:
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        start = time.monotonic()
        answers = llm.generate(prompts, SamplingParams(**request["sampling"]), use_tqdm=False)
        seconds = time.monotonic() - start
        outputs = [answer.outputs[0] for answer in answers]
        laws = [[{k: v.logprob for k, v in law.items()} for law in o.logprobs or []] for o in outputs]
        ids = [list(output.token_ids) for output in outputs]
        result["requests"].append({"seconds": seconds, "ids": ids, "logprobs": laws})
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    result["drafted"] = counts.get("vllm:spec_decode_num_draft_tokens", 0)
    result["accepted"] = counts.get("vllm:spec_decode_num_accepted_tokens", 0)
    result["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = [run(job) for job in jobs]
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)
