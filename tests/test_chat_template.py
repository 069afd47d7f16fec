"""`template=chat` from a file of messages to a server: training, decoding, serving, refusals."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from chatty import CHATML, END, save_chatty
from served import ask, listening, post
from small import run, settings
from transformers import AutoTokenizer

import train
from ram.answers.jobs import AnswerJob, Pair
from ram.data import prompts
from ram.data.tokenization import encode
from ram.errors import UserError
from ram.models import checkpoints
from ram.models.run_folder import LATEST
from ram.serving import api, http
from ram.serving.registry import Models
from ram.settings import serving
from ram.settings.schema import merged
from ram.vllm import launch

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def write_messages(path: Path, count: int = 12) -> Path:
    """Write a file of dialogues in the form that chat models are trained on."""
    answers = [{"role": "assistant", "content": f"{index} rains."} for index in range(count)]
    rows = [
        {"messages": [{"role": "user", "content": f"What is {index}?"}, answer]}
        for index, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_chatty(folder: Path, *overrides: str) -> Path:
    """Train a tiny model on a file of messages; return the folder of its weights."""
    keys = {"model.name": "m", "model.name_or_path": folder / "base", "output_dir": folder / "out"}
    keys |= {"datasets": f"[{write_messages(folder / 'my.jsonl')}]", "exp_name": "r", "template": "chat"}
    keys |= {"max_length": 160, "max_prompt_length": 120, "n_examples": 8, "heldout_fraction": 0.2}
    keys |= {"data_dir": folder, "do_first_eval": "false"}
    run(train, *(f"{key}={value}" for key, value in keys.items()), *overrides)
    return folder / "out" / "model" / "r" / LATEST


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_chatty(folder / "base")
    return train_chatty(folder)


def rendered(folder: Path, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the ids that another engine makes with the folder's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_template_travels_with_the_weights(trained: Path):
    """The card, the chat template, and the EOS that ends an answer in it."""
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert checkpoints.trained_template(str(trained)) == "chat"
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, END)


def test_token_ids_are_cached_in_the_output_folder(trained: Path):
    """The data set's name is a path; nothing is written beside the user's file."""
    cached = sorted(path.name.split(".")[:3] for path in (trained.parents[2] / "cache").iterdir())
    assert cached == [["my", "jsonl", "heldout"], ["my", "jsonl", "train"]]
    assert sorted(path.name for path in trained.parents[3].iterdir()) == ["base", "my.jsonl", "out"]


def test_server_renders_as_other_engines_do(trained: Path):
    """No key says so: the card does. An answer ends at the template's mark."""
    config = serving.read_settings([f"proposal={trained}", f"aligners={{a: {trained}}}", "port=0"])
    models, listener = Models(config), http.listen(config)
    url = http.url_of(config, listener.getsockname()[1])
    expected = rendered(trained, QUESTION)
    with listening(models, api.create_app(models), listener):
        tokens = post(f"{url}/tokenize", json={"model": "a", "messages": QUESTION}).json()["tokens"]
        answer = ask(url, {"model": "a", "messages": QUESTION, "max_tokens": 4, "seed": 1}).json()
        refused = ask(url, {"model": "a", "messages": [{"role": "user", "content": "x" * 400}]})
    assert tokens == expected
    assert answer["usage"]["prompt_tokens"] == len(expected)
    end = AutoTokenizer.from_pretrained(trained).convert_tokens_to_ids(END)
    assert models.served["a"].ends == (end,) and models.served["a"].stops == []
    assert refused.status_code == 400 and "does not fit" in refused.json()["error"]["message"]


def test_template_ends_answers_of_a_model_with_another_end(tmp_path: Path):
    """A base model with a chat template: the server and other servers are told, `eos_priority` too."""
    folder = save_chatty(tmp_path / "base")
    models = Models(serving.read_settings([f"proposal={folder}", "port=0", "template=chat"]))
    try:
        served = models.served["proposal"]
        (request,) = models.requests(served, [[1, 2]], models.law({}), 4, 0, ())
        end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(END)
        assert served.ends == (end,) and end in models.engine.engine.ticket(request).eos
    finally:
        models.engine.close(wait=False)
    chat = job(folder, template="chat")
    assert chat.stop_ids(chat.encoded[0]) == [end] and chat.stops(chat.encoded[0]) == []


def job(folder: Path, **changes: object) -> AnswerJob:
    """Return the job of answering one question with a folder's model."""
    sampling = merged(settings("max_length=160", "max_prompt_length=120").sampling, changes)
    pair = Pair(str(folder), None)
    record = {"instruction": "Why?", "output": ""}
    prompt = prompts.from_record(record, sampling, pair.chat(sampling.template))
    return AnswerJob("job", pair, sampling.params, sampling, [record], [prompt], [0], 0, False, "output", {})


def test_decoding_by_another_template_is_told(trained: Path, caplog: pytest.LogCaptureFixture):
    chat, ram = job(trained, template="chat"), job(trained)
    tokenizer, ids = chat.encoded
    assert ids == [rendered(trained, QUESTION[1:])] and tokenizer.eos_token == END
    assert not caplog.records and chat.stops(tokenizer) == chat.stop_ids(tokenizer) == []
    tokenizer, (ids,) = ram.encoded
    assert ids == encode(tokenizer, ["\n\nHuman: Why?\n\nAssistant: "])[0]
    assert f"{trained} was trained with template=chat, but decodes with template=ram" in caplog.text


def test_missing_template_is_refused_before_training(tmp_path: Path):
    save_chatty(tmp_path / "base", template=None)
    with pytest.raises(UserError, match=r"base has no chat template: set template=ram, or model.tokenizer_"):
        train_chatty(tmp_path, "dry_run=true")
    with pytest.raises(UserError, match="has no chat template"):
        Models(serving.read_settings([f"proposal={tmp_path}/base", "template=chat", "port=0"]))


def test_vllm_keeps_the_template_of_training(trained: Path):
    """The folder's tokenizer has it, so no other one is given."""
    pair = [f"proposal={trained}", f"aligner={trained}", "sample_mode=par"]
    assert "--chat-template" not in launch.command(pair)
    assert "--chat-template" in launch.command([*pair, "template=ram"])
