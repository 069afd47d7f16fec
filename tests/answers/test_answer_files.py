"""Whole-file generation: order, restarts, what a file is made from, and that every setting arrives."""

import functools
import json
import os
import random
from dataclasses import asdict, replace
from itertools import islice
from types import SimpleNamespace

import pytest
from tiny import byte_tokenizer, save_model_folder, tiny_model, tiny_tokenizer

import train
from ram.answers import answer_files
from ram.answers.jobs import Job, Pair
from ram.data.prompts import render
from ram.data.tokenization import encode_prompts
from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.models import checkpoints
from ram.settings import recipes, schema
from ram.storage import provenance
from ram.storage.files import write_json
from utils import TABLES

TOKENIZER = byte_tokenizer()
ROWS = [
    {"instruction": "why? " * (7 * i % 10), "output": f"answer {i}", "id": i, "tags": ["é", None]}
    for i in range(10)
]  # the longest prompts, which are decoded first, stand in the middle
LONGEST_PROMPT, NEW_TOKENS = 60, 12
write_rows = functools.partial(write_json, "train/ultrachat_round_one.json")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Three model folders of one tokenizer: two sizes to pair, and other weights of the first."""
    root = tmp_path_factory.mktemp("models")
    models = {"large": (1, 2), "small": (2, 1), "other": (3, 2)}
    for name, (seed, layers) in models.items():
        save_model_folder(root / name, tiny_model(len(TOKENIZER), seed, layers), TOKENIZER)
        os.utime(root / name / "model.safetensors", (seed, seed))  # no two written at the same time
    return {name: str(root / name) for name in models}


@functools.cache
def resolved(*overrides):
    (stage,) = recipes.resolve(overrides, TABLES)
    return stage


@pytest.fixture
def resolve(tmp_path, folders, monkeypatch):
    """The sample stage that `train.py` would run with some overrides, over a data set of its own."""
    monkeypatch.chdir(tmp_path)
    write_rows(ROWS)

    def stage(*overrides, proposal=folders["large"]):
        return resolved(
            f"+stage.sample={{kind: sample, proposal: {proposal}, dataset: uc}}",
            "data_dir=.",
            f"sampling.max_prompt_length={LONGEST_PROMPT}",
            f"sampling.max_length={LONGEST_PROMPT + NEW_TOKENS}",
            "sampling.batch_size=3",
            "sampling.base_temperature=1.0",
            "sampling.dtype=float32",
            *overrides,
        )

    return stage


class Decoding(list):
    """Every call of `decoding.generate_iter` with its arguments and the order of its answers."""

    stop_after = None  # raise Ctrl-C after so many answers

    @property
    def counts(self):
        return [len(call.prompts) for call in self]


@pytest.fixture
def decoded(monkeypatch):
    """Watches what is decoded, and may interrupt it."""
    calls, original = Decoding(), generation.generate_iter

    def generate_iter(proposal, aligner, tokenizer, prompts, params, **kwargs):
        models = (proposal, aligner)
        calls.append(SimpleNamespace(models=models, prompts=prompts, params=params, order=[], **kwargs))
        answers = original(*models, tokenizer, prompts, params, **kwargs)
        for index, answer in islice(answers, calls.stop_after):
            calls[-1].order.append(index)
            yield index, answer
        if calls.stop_after is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate_iter", generate_iter)
    return calls


def sample(stage, overwrite=False):
    """Runs the stage and gives the file it leaves."""
    train.sample_stage(stage, overwrite)
    return stage.output.read_bytes()


def interrupt(stage, decoded, after, overwrite=False):
    """Runs the stage, stops it after so many answers and gives what decoding was called with."""
    decoded.stop_after = after
    with pytest.raises(KeyboardInterrupt):
        sample(stage, overwrite)
    decoded.stop_after = None
    return decoded[-1]


def change_row(resolve, row_id, key, value):
    """Changes one row of the data set and gives the stage that reads it."""
    rows = [row | {key: value} if row["id"] == row_id else row for row in ROWS]
    write_rows(rows)
    return resolve()


def part_file(stage):
    return stage.output.with_name(stage.output.name + ".part")


def old(path):
    return path.with_name(path.name + ".old")


def texts(data):
    return [row["sampling"] for row in json.loads(data)]


# ---- what is written ---------------------------------------------------------------------------------------
def test_rows_keep_order_and_fields(resolve, folders, decoded):
    """Every row comes back in its place with all its fields and the answer that `decoding` gives for it."""
    stage = resolve("seed=4")
    rows = json.loads(sample(stage))
    assert sorted(decoded[0].order) == list(range(10)) != decoded[0].order  # by length, not as in the file
    ids, cut = encode_prompts(TOKENIZER, [render(row["instruction"]) for row in ROWS], LONGEST_PROMPT)
    assert 0 < cut < len(ROWS)
    models = train.sample_job(stage)[0].load()[:2]
    settings = {"max_new_tokens": NEW_TOKENS, "seed": 4, "stop": ["\n\nHuman"]}
    expected = generation.generate(*models, TOKENIZER, ids, PARParams(base_temperature=1.0), **settings)
    assert rows == [row | {"sampling": g.text} for row, g in zip(ROWS, expected, strict=True)]
    assert not part_file(stage).exists()


def test_row_ids_are_those_of_the_file(resolve):
    """A bad row that is skipped does not change the answers to the rows behind it."""
    whole = texts(sample(resolve()))
    change_row(resolve, 3, "instruction", 5)
    rows = json.loads(sample(resolve("on_bad_row=skip"), overwrite=True))
    assert [row["id"] for row in rows] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [row["sampling"] for row in rows] == whole[:3] + whole[4:]


def test_limit_takes_the_first_rows(resolve):
    """`limit` answers only the first rows, as they are answered without it."""
    limited = json.loads(sample(resolve("sampling.limit=4")))
    assert [row["id"] for row in limited] == [0, 1, 2, 3]
    whole = texts(sample(resolve(), overwrite=True))
    assert [row["sampling"] for row in limited] == whole[:4]


# ---- stopped and started again -----------------------------------------------------------------------------
def test_interrupted_run_continues(resolve, decoded):
    """A run that is stopped twice decodes no answer again and leaves the file of an uninterrupted one."""
    stage = resolve()
    whole = sample(stage)
    stage.output.unlink()
    interrupt(stage, decoded, after=4)
    interrupt(stage, decoded, after=2)
    assert not stage.output.exists()
    assert sample(stage) == whole
    assert decoded.counts == [10, 10, 6, 4]
    assert not part_file(stage).exists()


@pytest.mark.parametrize(
    "cut, left",
    [
        (lambda data: data[:-1], 7),  # the last line's end alone
        (lambda data: data[:-20], 7),
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 2], 7),
        (lambda data: data[:30], 10),  # in the header
        (lambda data: b"", 10),
    ],
    ids=["no newline", "mid-line", "first byte", "header", "empty"],
)
def test_part_file_cut_in_mid_line(resolve, decoded, cut, left):
    """An answer that was cut while it was written is decoded again; the whole ones before it are not."""
    stage = resolve()
    whole = sample(stage)
    stage.output.unlink()
    interrupt(stage, decoded, after=4)
    part_file(stage).write_bytes(cut(part_file(stage).read_bytes()))
    interrupt(stage, decoded, after=1)
    assert sample(stage) == whole
    assert decoded.counts[2:] == [left, left - 1]


CHANGES = {  # what else a file is made from: (resolve, folders) -> the stage that is run afterwards
    "seed": lambda resolve, folders: resolve("seed=1"),
    "weights": lambda resolve, folders: replace(resolve(), source=folders["other"]),
    "prompts": lambda resolve, folders: change_row(resolve, 9, "instruction", "!"),
    "row ids": lambda resolve, folders: (write_rows([{}, *ROWS]), resolve("on_bad_row=skip"))[1],
    "add_bos": lambda resolve, folders: resolve("add_bos=true"),
    "dtype": lambda resolve, folders: resolve("sampling.dtype=bfloat16"),
    "records": lambda resolve, folders: change_row(resolve, 9, "output", "!"),  # copied beside the samples
}


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "records"])
def test_part_file_of_other_inputs_is_set_aside(resolve, decoded, folders, change, caplog):
    """A run begun with other settings, weights or prompts is not continued; its answers are kept."""
    interrupt(resolve(), decoded, after=4)
    before = part_file(resolve()).read_bytes()
    changed = CHANGES[change](resolve, folders)
    anew = sample(changed)
    assert "begun with other settings, weights or prompts; kept as" in caplog.text
    assert old(part_file(changed)).read_bytes() == before
    assert decoded.counts == [10, 10]
    changed.output.unlink()
    assert sample(changed) == anew


def test_part_file_without_answers_binds_nobody(resolve, decoded):
    """A run that ended before its first answer is not in the way of one with other settings."""
    interrupt(resolve(), decoded, after=0)
    assert len(texts(sample(resolve("seed=1")))) == 10


# ---- finished files ----------------------------------------------------------------------------------------
def test_finished_file_is_left_alone(resolve, decoded):
    """Settings that change no answer decode nothing and do not touch the file."""
    stage = resolve()
    data, written = sample(stage), stage.output.stat().st_mtime_ns
    same_law = ("sampling.batch_size=16", "sampling.speculative=false", "sampling.temperature=0.9")
    assert sample(resolve(*same_law)) == data
    assert decoded.counts == [10] and stage.output.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-9], lambda data: data.replace(b"answer 1", b"answer X")],
    ids=["cut short", "changed"],
)
def test_damaged_finished_file_is_refused(resolve, decoded, damage):
    """A finished file that was cut short or changed is neither used nor replaced unless overwritten."""
    stage = resolve()
    whole = sample(stage)
    stage.output.write_bytes(damage(whole))
    with pytest.raises(UserError, match="changed or cut short.*overwrite=true"):
        sample(stage)
    assert stage.output.read_bytes() == damage(whole) and decoded.counts == [10]
    assert sample(stage, overwrite=True) == whole


@pytest.mark.parametrize("change", CHANGES)
def test_finished_file_of_other_inputs_is_set_aside(resolve, decoded, folders, change, caplog):
    """A finished file made from other settings, weights or rows is not used but kept beside the new one."""
    data = sample(resolve())
    changed = CHANGES[change](resolve, folders)
    anew = sample(changed)
    assert "made from other inputs (" in caplog.text and decoded.counts == [10, 10]
    assert old(changed.output).read_bytes() == data
    for path in (provenance.marker(changed.output), answer_files.trace_path(changed.output)):
        assert path.is_file() and old(path).is_file()
    assert sample(changed) == anew and decoded.counts == [10, 10]


def test_weights_are_told_apart_by_content(tmp_path):
    """Other weights are other weights, though their files have the same names, sizes and times."""
    found = set()
    for seed in (1, 2):
        folder = save_model_folder(tmp_path / str(seed), tiny_model(len(TOKENIZER), seed), TOKENIZER)
        os.utime(f"{folder}/model.safetensors", (3, 3))
        found.add(checkpoints.weights_fingerprint(folder))
    assert len(found) == 2


def test_file_of_the_user_is_used(resolve, decoded):
    """A file without a marker was put there by somebody: it is used as it is."""
    stage = resolve()
    stage.output.write_text("[]")
    assert sample(stage) == b"[]"
    assert decoded.counts == []


# ---- settings ----------------------------------------------------------------------------------------------
SETTINGS = {
    "seed": "seed=1",
    "base_temperature": "sampling.base_temperature=0.9",
    "base_top_p": "sampling.base_top_p=0.9",
    "base_top_k": "sampling.base_top_k=5",
    "base_repetition_penalty": "sampling.base_repetition_penalty=1.05",
    "stop_str": "sampling.stop_str=x",
    "max_length": "sampling.max_length=73",
    "max_prompt_length": "sampling.max_prompt_length=59 sampling.max_length=71",  # as many new tokens
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_part_of_what_a_file_is(resolve, decoded, setting):
    """Neither a finished nor an unfinished file made with another value of any setting is gone on with."""
    stage, other = resolve("sampling.limit=2"), resolve("sampling.limit=2", *SETTINGS[setting].split())
    interrupt(stage, decoded, after=1)
    anew = sample(other)
    assert old(part_file(stage)).is_file() and decoded.counts == [2, 2]
    sample(stage)
    assert old(stage.output).read_bytes() == anew and decoded.counts == [2, 2, 2]


def test_settings_reach_the_sampler(resolve, decoded):
    """Decoding is called with every value that the configuration gives, none of them a default."""
    given = {
        "base_temperature": 0.7,
        "base_top_p": 0.8,
        "base_top_k": 9,
        "base_repetition_penalty": 1.2,
        "sample_mode": "snis",
        "temperature": 0.6,
        "top_p": 0.85,
        "top_k": 7,
        "repetition_penalty": 1.3,
        "div_threshold": 0.2,
        "kl_fallback": "aligner",
        "eos_priority": True,
        "expert_temperature": 0.4,
        "n_candidates": 3,
    }
    assert given.keys() == set(PARParams.field_names())
    overrides = [f"sampling.{key}={schema.literal(value)}" for key, value in given.items()]
    overrides += ["seed=7", "sampling.stop_str=zz", "sampling.batch_size=5"]
    seen = interrupt(resolve(*overrides), decoded, after=0)
    assert asdict(seen.params) == given
    assert (seen.seed, seen.stop, seen.batch_size, seen.max_new_tokens) == (7, ["zz"], 5, NEW_TOKENS)
    assert seen.row_ids == list(range(10)) and max(map(len, seen.prompts)) == LONGEST_PROMPT
    assert seen.models[0].config.num_hidden_layers == 2 and seen.models[1] is None


def test_a_drafter_saves_time_and_changes_nothing(resolve, folders, decoded, tmp_path):
    """With another model's drafts the file is the same, byte by byte, and counts as the same file."""
    plain = sample(resolve())
    drafting = resolve(f"sampling.drafter={folders['small']}")
    assert sample(drafting) == plain and len(decoded) == 1  # nothing to do
    drafting.output.unlink()
    assert sample(drafting) == plain and decoded[1].drafter.config.num_hidden_layers == 1
    missing = resolve(f"sampling.drafter={tmp_path}/none")
    with pytest.raises(UserError, match="no model at .*none"):
        sample(missing, overwrite=True)
    other = tmp_path / "other"
    save_model_folder(other, tiny_model(len(TOKENIZER), 5), tiny_tokenizer("ab"))
    with pytest.raises(UserError, match="tokenizer of the drafter"):
        sample(resolve(f"sampling.drafter={other}"), overwrite=True)


def test_top_k_of_one_is_greedy(resolve):
    """One candidate, or a temperature of 0, gives the most probable text, and the defaults do not."""
    one = texts(sample(resolve("sampling.base_top_k=1")))
    greedy = texts(sample(resolve("sampling.base_temperature=0"), overwrite=True))
    drawn = texts(sample(resolve(), overwrite=True))
    assert one == greedy and all(a != b for a, b in zip(one, drawn, strict=True))


def test_stop_string_ends_the_samples(resolve):
    """A stop string cuts the samples where it first stands and changes nothing before it."""
    whole = texts(sample(resolve()))
    common = max((c for text in whole for c in text), key=lambda c: sum(c in text for text in whole))
    stopped = texts(sample(resolve(f"sampling.stop_str={schema.literal(common)}"), overwrite=True))
    assert stopped == [text.split(common)[0] for text in whole] != whole


def test_bos_is_what_the_model_was_trained_with(resolve, tmp_path, decoded):
    """A model's card decides whether prompts begin with BOS, and the configuration where there is no card."""
    carded = save_model_folder(tmp_path / "carded", tiny_model(len(TOKENIZER), 1), TOKENIZER)
    write_json(tmp_path / "carded" / checkpoints.CARD, {"add_bos": True})
    for stage in (resolve(proposal=carded), resolve(), resolve("add_bos=true")):
        interrupt(stage, decoded, after=0, overwrite=True)
    begins = [{row[0] == TOKENIZER.bos_token_id for row in call.prompts} for call in decoded]
    assert begins == [{True}, {False}, {True}]


# ---- pairs -------------------------------------------------------------------------------------------------
def test_pair_answers_are_traced(resolve, folders, tmp_path):
    """A pair's answers carry a piece of text and an event per token, and the texts of `decoding`."""
    pair, prompts = (
        Pair(folders["large"], folders["small"], "float32"),
        ["hello", "you", "a" * 30],
    )
    settings = resolve("sampling.sample_mode=par", "sampling.base_top_p=1.0").config.sampling
    params, records = schema.par_params(settings), [{"instruction": prompt} for prompt in prompts]
    job = Job(
        *("pair", pair, params, settings, records, prompts, [0, 10, 20]), 0, add_bos=False, key="x", extra={}
    )
    parts = answer_files.PartFiles(tmp_path / "x", job.identity, overwrite=False)
    answer_files.answer_all(job, parts)
    answers = parts.everything(len(prompts))
    expected = generation.generate(
        *job.load()[:2], TOKENIZER, prompts, params, max_new_tokens=NEW_TOKENS, row_ids=[0, 10, 20]
    )
    for answer, whole in zip(answers, expected, strict=True):
        assert (answer["text"], answer["finish_reason"]) == (whole.text, whole.finish_reason)
        assert answer["tokens"] == answer_files.pieces(TOKENIZER, whole.token_ids)
        assert answer["events"] == whole.events
        for key in ("drafted", "accepted", "fallback_fraction", "mean_kl"):
            assert answer["stats"][key] == pytest.approx(whole.stats[key])
        assert answer["n_tokens"] == len(answer["tokens"]) == len(answer["events"])


# ---- pieces ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["plain", "naïve 日本 🙂!", "🙂", " \n\n x ", "é�é"])
def test_pieces_add_up_to_the_text(text):
    """The pieces concatenate to the text; a character of several tokens stands with its last one."""
    ids = TOKENIZER(text).input_ids
    found = answer_files.pieces(TOKENIZER, ids)
    assert "".join(found) == text and len(found) == len(ids) == len(text.encode())
    if "�" not in text:
        assert [piece for piece in found if piece] == list(text)


def test_pieces_of_broken_characters():
    """Bytes that form no character, or not yet, are shown by what decoding makes of them; none is lost."""
    rng = random.Random(2)
    for _ in range(200):
        ids = [rng.randrange(len(TOKENIZER)) for _ in range(6)]
        assert "".join(answer_files.pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids)
