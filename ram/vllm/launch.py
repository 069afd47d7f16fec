"""Make and run the `vllm serve` command of a pair, for bin/serve_vllm.sh.

Everything that can be known without loading a model is checked first.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ram.decoding.par import PARParams
from ram.errors import UserError, nearest, run_entry_point
from ram.log import pick_device, pick_dtype
from ram.models import checkpoints, vocabulary
from ram.models.abilities import max_positions
from ram.vllm import laws

KEYS = ("proposal", "aligner", "dtype", "tensor_parallel", "drafts", "drafter", "template")
# The template `ram` of ram/data/prompts.py for vLLM's chat protocol.
RAM_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% else %}"
    "{{ '\\n\\nHuman: ' if m.role == 'user' else '\\n\\nAssistant: ' }}{{ m.content }}{% endif %}{% endfor %}"
    "{{ '\\n\\nAssistant: ' }}"
)
SWITCHES = ["--enforce-eager"]  # the compiled form has not been compared on a GPU


def command(arguments: Sequence[str]) -> list[str]:
    """Return the `vllm serve` command for `key=value` arguments; what follows `--` is added as it is.

    Raises:
        UserError: A key or value is wrong, the models do not fit, or no form keeps the settings.
    """
    arguments = list(arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    values = dict(_parse(argument) for argument in arguments[:split])
    extra = arguments[split + 1 :]
    known = PARParams.field_names()
    for key in values:
        if key not in (*KEYS, *known):
            raise UserError(f"unknown key {key!r}: {nearest(key, [*KEYS, *known])}")
    for role in ("proposal", "aligner"):
        if not isinstance(values.get(role), str):
            raise UserError(f"no {role}: give {role}=FOLDER")
    proposal, aligner = (checkpoints.find_model(values[role]) for role in ("proposal", "aligner"))
    drafter = checkpoints.find_model(values.get("drafter", aligner))
    tensor_parallel, drafts = (
        _count(values, key, least) for key, least in (("tensor_parallel", 1), ("drafts", 0))
    )
    try:
        params = PARParams(**{key: value for key, value in values.items() if key in known})
        laws.check(params)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None

    tokenizer, add_bos = checkpoints.load_pair(proposal, aligner, drafter=drafter)
    digests = {"proposal": proposal, "aligner": aligner}
    pair = {"aligner": aligner, **params.identity()}
    pair["digests"] = {role: checkpoints.weights_fingerprint(path) for role, path in digests.items()}
    overrides: dict[str, Any] = {"architectures": ["RAMPair"], "ram": pair}
    if drafts:  # vLLM compares the sizes in both configs
        overrides["vocab_size"] = vocabulary.rows_in(drafter)
    result = ["vllm", "serve", proposal, "--hf-overrides", json.dumps(overrides), *SWITCHES]
    result += ["--middleware", "ram.vllm.middleware.PairGuard", "--logprobs-mode", "processed_logprobs"]
    # By itself vLLM narrows float32 files.
    dtype = str(pick_dtype(values.get("dtype", "auto"), pick_device())).removeprefix("torch.")
    result += ["--dtype", dtype, "--generation-config", "vllm"]
    result += ["--override-generation-config", json.dumps(laws.request_settings(params))]
    result += ["--served-model-name", f"{Path(proposal).parent.name}+{Path(aligner).parent.name}"]
    result += ["--tensor-parallel-size", str(tensor_parallel), "--host", "127.0.0.1"]
    lengths = [positions for path in (proposal, aligner) if (positions := _positions(path))]
    if lengths:
        result += ["--max-model-len", str(min(lengths))]
    if drafts:
        speculative = {"method": "draft_model", "model": drafter, "num_speculative_tokens": drafts}
        speculative["draft_sample_method"] = "probabilistic"
        result += [
            "--speculative-config",
            json.dumps(speculative | {"draft_tensor_parallel_size": tensor_parallel}),
        ]
    trained = map(checkpoints.trained_template, (aligner, proposal))
    template = values.get("template") or next(filter(None, trained), "ram")
    if template == "ram":
        result += ["--chat-template", (str(tokenizer.bos_token) if add_bos else "") + RAM_TEMPLATE]
    elif template not in ("chat", "tokenizer"):
        raise UserError(f"template={template}: expected ram, or tokenizer for the tokenizer's own")
    return result + extra


def _parse(argument: str) -> tuple[str, Any]:
    key, sign, value = argument.partition("=")
    if not sign:
        raise UserError(f"{argument!r}: expected key=value; options of vLLM follow after --")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _count(values: dict[str, Any], key: str, least: int) -> int:
    value = values.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key}={value}: expected a count >= {least}")
    return value


def _positions(path: str) -> int | None:
    config = Path(path) / "config.json"
    return max_positions(vocabulary.read_config(config)) if config.is_file() else None


def check_installed() -> None:
    """Raise UserError if this Python has no vLLM, or vLLM would not find the pair."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{sys.executable} has no vLLM: activate its environment or set PYTHON, see docs/vllm.md"
        )
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(plugin.value.startswith("ram.vllm.") for plugin in plugins):
        raise UserError("vLLM's environment lacks this project: pip install --no-deps -e . (docs/vllm.md)")


def main() -> None:
    """Print the command, then replace this process by it."""
    check_installed()
    program = command(sys.argv[1:])
    sys.stdout.write(shlex.join(program) + "\n")
    sys.stdout.flush()
    module, arguments = "vllm.entrypoints.cli.main", program[1:]
    if not list(importlib.metadata.distributions(name="vllm")):
        # The CPU build has another name, and its `vllm` command ends when it looks up its own version.
        module, arguments = "vllm.entrypoints.launchers.api_server.entry", ["--model", *program[2:]]
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    run_entry_point(main)
