"""The command of a pair's server, what its door refuses, and what it reports."""

import ast
import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from tiny import byte_tokenizer, save_model_folder, tiny_model

from ram.data import prompts
from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.models import checkpoints
from ram.storage.files import read_json, write_json
from ram.vllm import launch, laws, middleware

ROOT = Path(__file__).resolve().parents[2]
OPEN = PARParams("par", temperature=0.7, repetition_penalty=1.1)
CLOSED = PARParams("product", temperature=0.7, repetition_penalty=1.0)


def test_plugin_imports_little():
    """What vLLM's processes load needs torch, vLLM and `ram.decoding.par`: no other package of ours."""
    allowed = {"torch", "vllm", "ram.decoding", "ram.decoding.par", "ram.vllm"} | sys.stdlib_module_names
    for name in ("laws", "plugin", "model", "middleware"):
        tree = ast.parse((ROOT / "ram" / "vllm" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for found in names:
                assert found in allowed or found.split(".")[0] in allowed - {"ram"}, (name, found)


# ---- the door ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [OPEN, CLOSED], ids=["open", "closed"])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"min_tokens": 3}, "min_tokens"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"logit_bias": {"3": -100}}, "logit_bias"),
        ({"structured_outputs": {"regex": "a*"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"tools": [{}]}, "tools"),
        ({"min_p": 0.1}, "min_p"),
        ({"presence_penalty": -0.5}, "presence_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"temperature": 0.001}, "temperature=0.001"),
    ],
)
def test_requests_that_no_form_keeps(params, body, reason):
    found = middleware.refusal(body, params, laws.request_settings(params))
    assert found is not None and found.startswith(reason)


@pytest.mark.parametrize(
    ("body", "is_open", "is_closed"),
    [
        ({}, True, True),
        ({"temperature": None, "min_tokens": 0, "bad_words": [], "logit_bias": None}, True, True),
        ({"response_format": {"type": "text"}, "tools": [{}], "tool_choice": "none"}, True, True),
        (
            {"temperature": 0.7, "top_p": 1, "top_k": -1, "repetition_penalty": 1, "seed": 3, "n": 2},
            True,
            True,
        ),
        ({"temperature": "0.7", "logprobs": 5}, True, True),
        ({"temperature": 0}, True, False),
        ({"temperature": 1.0}, True, False),
        ({"top_p": 0.9}, True, False),
        ({"top_p": 1, "top_k": 5}, True, False),
        ({"top_p": 0.9, "top_k": 5}, False, False),
        ({"top_p": 0.9, "top_k": 5, "temperature": 0}, True, False),
        ({"repetition_penalty": 1.2}, True, False),
    ],
)
def test_settings_of_requests(body, is_open, is_closed):
    """In the open form a request chooses; in the closed one it takes the server's settings."""
    assert (middleware.refusal(body, OPEN, laws.request_settings(OPEN)) is None) == is_open
    assert (middleware.refusal(body, CLOSED, laws.request_settings(CLOSED)) is None) == is_closed


def test_defaults_of_the_server_count():
    """A server that was started with other defaults cannot keep a request that sets nothing."""
    assert middleware.refusal({}, CLOSED, {"temperature": 0.5}) is not None
    assert middleware.refusal({}, OPEN, {"min_p": 0.1}) is not None


def exchange(params, path, body=b"", method="POST", pieces=1, drafts=None, device="cpu"):
    """What a pair's server answers, (status, JSON), and what vLLM's application received, or None."""
    received, sent = [], []
    config = SimpleNamespace(
        hf_config=SimpleNamespace(
            ram={"aligner": "x/y/LATEST", "digests": {"aligner": "abc"}} | vars(params)
        ),
        model="models/big/LATEST",
        dtype="torch.float32",
        get_diff_sampling_param=lambda: laws.request_settings(params),
    )

    async def vllm_app(scope, receive, send):
        received.append(await middleware.read_body(receive))

    async def send(message):
        sent.append(message)

    size = -(-len(body) // pieces) or 1
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]

    async def receive():
        return messages.pop(0)

    vllm_config = SimpleNamespace(model_config=config, speculative_config=drafts)
    vllm_config.device_config = SimpleNamespace(device_type=device)
    app = SimpleNamespace(state=SimpleNamespace(vllm_config=vllm_config))
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "app": app}
    asyncio.run(middleware.PairGuard(vllm_app)(scope, receive, send))
    answer = (sent[0]["status"], json.loads(sent[1]["body"])) if sent else None
    return answer, received[0] if received else None


def test_kept_request_reaches_vllm_unchanged():
    body = json.dumps({"prompt": "é" * 50, "temperature": 0.3}).encode()
    assert exchange(OPEN, "/v1/completions", body, pieces=3) == (None, body)
    assert exchange(OPEN, "/v1/chat/completions", b"{broken") == (None, b"{broken")  # vLLM says what is wrong
    assert exchange(OPEN, "/tokenize", b"{}") == (None, b"{}")
    assert exchange(OPEN, "/health", method="GET") == (None, b"")


def test_refused_request_does_not_reach_vllm():
    body = json.dumps({"prompt": "x", "min_tokens": 2}).encode()
    (status, answer), received = exchange(CLOSED, "/v1/completions", body)
    assert (status, received) == (400, None)
    assert answer["error"]["message"].startswith("min_tokens") and answer["error"]["code"] == 400
    (status, answer), received = exchange(OPEN, "/v1/responses", b"{}")
    assert (status, received) == (400, None) and "/v1/completions" in answer["error"]["message"]


def test_drafts_of_the_cpu_build_are_greedy_only():
    """vLLM 0.32 loses temperature and limits of drafted positions there; a GPU keeps them."""
    body, greedy = b'{"prompt": "x"}', b'{"prompt": "x", "temperature": 0}'
    (status, answer), received = exchange(OPEN, "/v1/completions", body, drafts=object())
    assert (status, received) == (400, None) and "without drafts" in answer["error"]["message"]
    assert exchange(OPEN, "/v1/completions", greedy, drafts=object()) == (None, greedy)
    assert exchange(OPEN, "/v1/completions", body, drafts=object(), device="cuda") == (None, body)


def test_report_names_pair_form_settings_and_digests():
    (status, report), _ = exchange(OPEN, "/ram", method="GET")
    assert status == 200
    assert report == {
        "proposal": "big/LATEST",
        "aligner": "y/LATEST",
        "digests": {"aligner": "abc"},
        "form": "open",
        "settings": laws.fixed_settings(OPEN),
        "defaults": laws.request_settings(OPEN),
        "dtype": "float32",
    }


# ---- the command -------------------------------------------------------------------------------------------

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a pair of unequal vocabulary sizes and lengths, and of another tokenizer's model."""
    root = tmp_path_factory.mktemp("pair")
    for name, extra in (("proposal", 6), ("aligner", 2)):
        save_model_folder(root / name / "LATEST", tiny_model(len(TOKENIZER), 1, extra_rows=extra), TOKENIZER)
    config = root / "aligner" / "LATEST" / "config.json"
    write_json(config, read_json(config) | {"max_position_embeddings": 128})
    write_json(root / "aligner" / "LATEST" / checkpoints.CARD, {"add_bos": False})
    return [f"{role}={root / role / 'LATEST'}" for role in ("proposal", "aligner")]


def options(command):
    """The options of a `vllm serve` command that have values, JSON decoded."""
    values = {}
    for name, value in zip(command, command[1:], strict=False):
        if name.startswith("--") and not value.startswith("--"):
            values[name] = json.loads(value) if value.startswith('{"') else value
    return values


def test_command_of_an_open_pair(pair):
    found = launch.command([*pair, "sample_mode=par", "temperature=0.8", "top_p=0.9", "tensor_parallel=2"])
    values, folders = options(found), [argument.partition("=")[2] for argument in pair]
    assert found[:3] == ["vllm", "serve", folders[0]] and "--enforce-eager" in found
    overrides = values["--hf-overrides"]
    assert overrides["architectures"] == ["RAMPair"] and "vocab_size" not in overrides
    settings = laws.PairSettings.parse(overrides["ram"])
    assert settings.params == PARParams("par", temperature=0.8, top_p=0.9) and settings.aligner == folders[1]
    assert settings.digests == {
        role: checkpoints.weights_fingerprint(folder)
        for role, folder in zip(("proposal", "aligner"), folders, strict=True)
    }
    expected = {"temperature": 0.8, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.05}
    assert values["--override-generation-config"] == expected
    assert values["--tensor-parallel-size"] == "2" and values["--max-model-len"] == "128"
    assert values["--host"] == "127.0.0.1" and values["--served-model-name"] == "proposal+aligner"
    assert "--speculative-config" not in values


def test_command_with_drafts_and_options_of_vllm(pair):
    found = launch.command([*pair, "sample_mode=par", "drafts=4", "--", "--port", "8001"])
    values = options(found)
    assert found[-2:] == ["--port", "8001"]
    # vLLM compares the sizes in the two configs; the drafter is the aligner.
    assert values["--hf-overrides"]["vocab_size"] == len(TOKENIZER) + 2
    assert values["--speculative-config"] == {
        "method": "draft_model",
        "model": pair[1].removeprefix("aligner="),
        "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",
        "draft_tensor_parallel_size": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample_mode=par", "temprature=1"], "did you mean 'temperature'"),
        (["sample_mode=par", "drafts=-1"], "drafts=-1"),
        (["sample_mode=par", "tensor_parallel=two"], "tensor_parallel=two"),
        (["sample_mode=par", "top_k=5", "top_p=0.9"], "the other order"),
        (["sample_mode=par_kl"], "repetition_penalty=1.05"),
        (["sample_mode=snis", "n_candidates=4"], "serve.py"),
        (["sample_mode=par", "template=vicuna"], "template=vicuna"),
        (["--port=3"], "unknown key"),
        (["port"], "expected key=value"),
    ],
)
def test_command_lines_that_cannot_work(pair, arguments, message):
    with pytest.raises(UserError, match=message):
        launch.command([*pair, *arguments])


def test_command_needs_both_models(pair):
    with pytest.raises(UserError, match="no aligner"):
        launch.command(pair[:1])


def test_chat_template_is_that_of_training(pair):
    """vLLM renders a dialogue as `prompts.render_dialogue` does."""
    template = jinja2.Environment().from_string(launch.RAM_TEMPLATE)
    turns = [(True, "Hi {{ there }}"), (False, "Hello"), (True, "Why?\n")]
    messages = [{"role": "user" if user else "assistant", "content": text} for user, text in turns]
    assert template.render(messages=messages) == prompts.render_dialogue(turns)
    system = [{"role": "system", "content": "Be kind."}]
    assert template.render(messages=system + messages) == prompts.render_dialogue(turns, system="Be kind.")
    assert options(launch.command([*pair, "sample_mode=par"]))["--chat-template"] == launch.RAM_TEMPLATE


def test_python_without_vllm_is_told():
    with pytest.raises(UserError, match=r"no vLLM.*docs/vllm.md"):
        launch.check_installed()
