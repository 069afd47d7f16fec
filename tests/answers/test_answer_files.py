"""Files of answers: order, restarts, provenance, settings, and the text of each token."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sample_stage import (
    LONGEST_PROMPT,
    NEW_TOKENS,
    ROWS,
    TOKENIZER,
    interrupt,
    part_file,
    sample,
    write_rows,
)
from tiny import save_model_folder, tiny_model, tiny_tokenizer

import train
from ram.answers import answer_files
from ram.answers.jobs import AnswerJob, Pair
from ram.data.prompts import render
from ram.data.text import token_texts
from ram.data.tokenization import encode_prompts
from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.models import checkpoints
from ram.storage import provenance
from ram.storage.files import read_json, write_json


def change_row(resolve, row_id, key, value):
    """Change one row of the data set and return the stage that reads it."""
    rows = [row | {key: value} if row["id"] == row_id else row for row in ROWS]
    write_rows(rows)
    return resolve()


def old(path):
    return path.with_name(path.name + ".old")


def texts(data):
    return [row["sampling"] for row in json.loads(data)]


# ---- contents of the file ----------------------------------------------------------------------------------


def test_rows_keep_order_and_fields(resolve, folders, decoding_calls):
    """Rows keep their order and fields, and get the answers of `generation.generate`."""
    stage = resolve("seed=4")
    rows = json.loads(sample(stage))
    assert (
        sorted(decoding_calls[0].order) == list(range(10)) != decoding_calls[0].order
    )  # longest first, not in file order
    ids, n_cut = encode_prompts(TOKENIZER, [render(row["instruction"]) for row in ROWS], LONGEST_PROMPT)
    assert 0 < n_cut < len(ROWS)
    pair = train.sample_job(stage)[0].load()[:2]
    settings = {"max_new_tokens": NEW_TOKENS, "seed": 4, "stop": ["\n\nHuman"]}
    expected = generation.generate(*pair, TOKENIZER, ids, PARParams(base_temperature=1.0), **settings)
    cut = [{"sampling_finish_reason": "length"} if g.finish_reason == "length" else {} for g in expected]
    assert any(cut), "the loader must learn which samples have no end"
    assert rows == [row | {"sampling": g.text} | c for row, g, c in zip(ROWS, expected, cut, strict=True)]
    assert not part_file(stage).exists()


def test_skipped_row_keeps_the_row_ids_of_the_others(resolve):
    """Skipping a bad row does not change the answers of the rows after it."""
    whole = texts(sample(resolve()))
    change_row(resolve, 3, "instruction", 5)
    rows = json.loads(sample(resolve("on_bad_row=skip"), overwrite=True))
    assert [row["id"] for row in rows] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [row["sampling"] for row in rows] == whole[:3] + whole[4:]


def test_limit_takes_the_first_rows(resolve):
    """`sampling.limit` answers only the first rows and does not change their answers."""
    limited = json.loads(sample(resolve("sampling.limit=4")))
    assert [row["id"] for row in limited] == [0, 1, 2, 3]
    whole = texts(sample(resolve(), overwrite=True))
    assert [row["sampling"] for row in limited] == whole[:4]


# ---- interrupted runs --------------------------------------------------------------------------------------


def test_interrupted_run_continues(resolve, decoding_calls):
    """A run interrupted twice decodes no answer again and gives the file of an uninterrupted run."""
    stage = resolve()
    whole = sample(stage)
    stage.output.unlink()
    interrupt(stage, decoding_calls, after=4)
    interrupt(stage, decoding_calls, after=2)
    assert not stage.output.exists()
    assert sample(stage) == whole
    assert decoding_calls.counts == [10, 10, 6, 4]
    assert not part_file(stage).exists()


@pytest.mark.parametrize(
    "cut, left",
    [
        (lambda data: data[:-1], 7),  # only the newline is missing
        (lambda data: data[:-20], 7),
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 2], 7),
        (lambda data: data[:30], 10),  # in the header
        (lambda data: b"", 10),
    ],
    ids=["no newline", "mid-line", "first byte", "header", "empty"],
)
def test_truncated_part_file_is_continued(resolve, decoding_calls, cut, left):
    """Only the answer whose line is incomplete is decoded again."""
    stage = resolve()
    whole = sample(stage)
    stage.output.unlink()
    interrupt(stage, decoding_calls, after=4)
    part_file(stage).write_bytes(cut(part_file(stage).read_bytes()))
    interrupt(stage, decoding_calls, after=1)
    assert sample(stage) == whole
    assert decoding_calls.counts[2:] == [left, left - 1]


# Functions (resolve, folders) -> a stage whose inputs differ from those of `resolve()`.
CHANGES = {
    "seed": lambda resolve, folders: resolve("seed=1"),
    "weights": lambda resolve, folders: replace(resolve(), source=folders["other"]),
    "prompts": lambda resolve, folders: change_row(resolve, 9, "instruction", "!"),
    "row ids": lambda resolve, folders: (write_rows([{}, *ROWS]), resolve("on_bad_row=skip"))[1],
    "add_bos": lambda resolve, folders: resolve("add_bos=true"),
    "dtype": lambda resolve, folders: resolve("sampling.dtype=bfloat16"),
    "records": lambda resolve, folders: change_row(
        resolve, 9, "output", "!"
    ),  # written back beside the answers
}


ANSWERS_CHANGE = [change for change in CHANGES if change not in ("records", "prompts")]


@pytest.mark.parametrize("change", ANSWERS_CHANGE)
def test_part_file_of_other_inputs_is_renamed(resolve, decoding_calls, folders, change, caplog):
    """An unfinished file of other settings, weights or prompts is renamed, not continued."""
    interrupt(resolve(), decoding_calls, after=4)
    before = part_file(resolve()).read_bytes()
    changed = CHANGES[change](resolve, folders)
    anew = sample(changed)
    assert "begun with other settings, weights or prompts; kept as" in caplog.text
    assert old(part_file(changed)).read_bytes() == before
    assert decoding_calls.counts == [10, 10]
    changed.output.unlink()
    assert sample(changed) == anew


def test_part_file_without_answers_is_replaced(resolve, decoding_calls):
    """A run that ended before its first answer does not block a run with other settings."""
    interrupt(resolve(), decoding_calls, after=0)
    assert len(texts(sample(resolve("seed=1")))) == 10


# ---- finished files ----------------------------------------------------------------------------------------


def test_finished_file_is_kept(resolve, decoding_calls):
    """Settings that do not change the answers decode nothing and leave the file untouched."""
    stage = resolve()
    data, written = sample(stage), stage.output.stat().st_mtime_ns
    same_law = ("sampling.batch_size=16", "sampling.speculative=false")
    assert sample(resolve(*same_law)) == data
    assert decoding_calls.counts == [10] and stage.output.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-9], lambda data: data.replace(b"answer 1", b"answer X")],
    ids=["cut short", "changed"],
)
def test_damaged_finished_file_is_refused(resolve, decoding_calls, damage):
    """A finished file that was truncated or changed is neither used nor replaced without overwrite."""
    stage = resolve()
    whole = sample(stage)
    stage.output.write_bytes(damage(whole))
    with pytest.raises(UserError, match="changed or cut short.*overwrite=true"):
        sample(stage)
    assert stage.output.read_bytes() == damage(whole) and decoding_calls.counts == [10]
    assert sample(stage, overwrite=True) == whole


@pytest.mark.parametrize("change", CHANGES)
def test_finished_file_of_other_inputs_is_renamed(resolve, decoding_calls, folders, change, caplog):
    """A finished file of other inputs is renamed; answers to unchanged prompts are kept."""
    data = sample(resolve())
    changed = CHANGES[change](resolve, folders)
    anew = sample(changed)
    counts = [10, *{"records": [], "prompts": [1]}.get(change, [10])]
    assert "made from other inputs (" in caplog.text and decoding_calls.counts == counts
    assert old(changed.output).read_bytes() == data
    for path in (provenance.marker(changed.output), answer_files.trace_path(changed.output)):
        assert path.is_file() and old(path).is_file()
    assert sample(changed) == anew and decoding_calls.counts == counts


def test_weights_fingerprint_depends_on_content(tmp_path):
    """Different weights differ even if their files have equal names, sizes and times."""
    fingerprints = set()
    for seed in (1, 2):
        folder = save_model_folder(tmp_path / str(seed), tiny_model(len(TOKENIZER), seed), TOKENIZER)
        os.utime(f"{folder}/model.safetensors", (3, 3))
        fingerprints.add(checkpoints.weights_fingerprint(folder))
    assert len(fingerprints) == 2


def test_tokenizer_counts_by_its_content(resolve, folders, tmp_path):
    """Answers of another tokenizer in the same folder are not kept; those of a moved one are."""

    def identity(folder):
        return train.sample_job(resolve(f"sampling.tokenizer_path={folder}"))[0].identity

    one, two = (str(shutil.copytree(folders["small"], tmp_path / name)) for name in ("one", "two"))
    before = identity(one)
    assert identity(two) == before
    settings_file = tmp_path / "one" / "tokenizer_config.json"
    write_json(settings_file, read_json(settings_file) | {"model_max_length": 99})
    assert identity(one) != before


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "modeling_own.py"])
def test_files_that_decide_the_output_count(folders, tmp_path, name):
    """Those of a slow tokenizer, if there is no tokenizer.json, and the folder's own code."""
    folder = Path(shutil.copytree(folders["small"], tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    (folder / name).write_text("1")
    before = checkpoints.weights_fingerprint(str(folder))
    (folder / name).write_text("2")
    assert checkpoints.weights_fingerprint(str(folder)) != before


def test_file_without_marker_is_used(resolve, decoding_calls):
    """A file without a marker belongs to the user and is used unchanged."""
    stage = resolve()
    stage.output.write_text("[]")
    assert sample(stage) == b"[]"
    assert decoding_calls.counts == []


# ---- settings ----------------------------------------------------------------------------------------------

SETTINGS = {
    "seed": "seed=1",
    "base_temperature": "sampling.base_temperature=0.9",
    "base_top_p": "sampling.base_top_p=0.9",
    "base_top_k": "sampling.base_top_k=5",
    "base_repetition_penalty": "sampling.base_repetition_penalty=1.05",
    "stop_str": "sampling.stop_str=x",
    "max_length": "sampling.max_length=73",
    "max_prompt_length": "sampling.max_prompt_length=59 sampling.max_length=71",  # equal max_new_tokens
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_changed_setting_starts_a_new_file(resolve, decoding_calls, setting):
    """Neither a finished nor an unfinished file is reused if a setting has another value."""
    stage, other = resolve("sampling.limit=2"), resolve("sampling.limit=2", *SETTINGS[setting].split())
    interrupt(stage, decoding_calls, after=1)
    anew = sample(other)
    assert old(part_file(stage)).is_file() and decoding_calls.counts == [2, 2]
    sample(stage)
    assert old(stage.output).read_bytes() == anew and decoding_calls.counts == [2, 2, 2]


def test_settings_reach_the_decoder(resolve, decoding_calls):
    """The decoder gets every configured value; all values differ from the defaults."""
    values = {
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
        "kl_direction": "reverse",
        "eos_priority": True,
        "expert_temperature": 0.4,
        "n_candidates": 3,
        "mixture_weight": 0.2,
        "greedy": True,
    }
    assert values.keys() == set(PARParams.field_names())
    stage = resolve("seed=7", "sampling.stop_str=zz", "sampling.batch_size=5")
    # A command line may only set what its models and mode read.
    sampling = replace(stage.config.sampling, **values)
    stage = replace(stage, config=stage.config.model_copy(update={"sampling": sampling}))
    call = interrupt(stage, decoding_calls, after=0)
    assert asdict(call.params) == values
    assert (call.seed, call.stop, call.batch_size, call.max_new_tokens) == (7, ["zz"], 5, NEW_TOKENS)
    assert call.row_ids == list(range(10)) and max(map(len, call.prompts)) == LONGEST_PROMPT
    assert call.models[0].config.num_hidden_layers == 2 and call.models[1] is None


def test_drafter_does_not_change_the_file(resolve, folders, decoding_calls, tmp_path):
    """A drafter gives the same bytes and the same identity; a missing or unfit drafter is refused."""
    plain = sample(resolve())
    drafting = resolve(f"sampling.drafter={folders['small']}")
    assert sample(drafting) == plain and len(decoding_calls) == 1  # the finished file is reused
    drafting.output.unlink()
    assert sample(drafting) == plain and decoding_calls[1].drafter.config.num_hidden_layers == 1
    missing = resolve(f"sampling.drafter={tmp_path}/none")
    with pytest.raises(UserError, match="no model at .*none"):
        sample(missing, overwrite=True)
    other = tmp_path / "other"
    save_model_folder(other, tiny_model(len(TOKENIZER), 5), tiny_tokenizer("ab"))
    with pytest.raises(UserError, match="tokenizer of the drafter"):
        sample(resolve(f"sampling.drafter={other}"), overwrite=True)


def test_top_k_of_one_is_greedy(resolve):
    """top_k=1 and temperature=0 give the same text, which differs from a random sample."""
    one = texts(sample(resolve("sampling.base_top_k=1")))
    greedy = texts(sample(resolve("sampling.base_temperature=0"), overwrite=True))
    drawn = texts(sample(resolve(), overwrite=True))
    assert one == greedy and all(a != b for a, b in zip(one, drawn, strict=True))


def test_stop_string_cuts_the_answers(resolve):
    """A stop string cuts an answer at its first occurrence and changes nothing before it."""
    whole = texts(sample(resolve()))
    common = max((c for text in whole for c in text), key=lambda c: sum(c in text for text in whole))
    stopped = texts(
        sample(resolve(f"sampling.stop_str={json.dumps(common, ensure_ascii=False)}"), overwrite=True)
    )
    assert stopped == [text.split(common)[0] for text in whole] != whole


def test_template_brings_its_own_stops(folders, resolve):
    """`stop_str` has the stop string of template `ram`, which ended the answers of every other template."""
    law = resolve().config.sampling.params
    jobs = {}
    for template in ("ram", "zephyr", "vicuna_v1.1"):
        settings = resolve(f"sampling.template={template}", 'sampling.stop_str="\n\nHuman"').config.sampling
        made = {"label": "x", "pair": Pair(folders["large"], None, "float32"), "params": law, "seed": 0}
        made |= {
            "records": [{}],
            "prompts": [render("hi", template)],
            "row_ids": [0],
            "key": "x",
            "extra": {},
        }
        jobs[template] = AnswerJob(settings=settings, add_bos=False, **made)
    assert jobs["ram"].stops(TOKENIZER) == ["\n\nHuman"] == [jobs["ram"].made_from["stop_str"]]
    assert jobs["zephyr"].stops(TOKENIZER) == ["</s>"] and jobs["vicuna_v1.1"].stops(TOKENIZER) == []
    assert jobs["zephyr"].made_from["marks"] and "marks" not in jobs["ram"].made_from
    assert len({job.identity for job in jobs.values()}) == 3
    own = replace(
        jobs["zephyr"], settings=resolve("sampling.stop_str=x", "sampling.template=zephyr").config.sampling
    )
    assert own.stops(TOKENIZER) == ["x"] == [own.made_from["stop_str"]]


def test_model_card_overrides_add_bos(resolve, tmp_path, decoding_calls):
    """The model's card decides whether prompts begin with BOS; without a card, the configuration does."""
    carded = save_model_folder(tmp_path / "carded", tiny_model(len(TOKENIZER), 1), TOKENIZER)
    write_json(tmp_path / "carded" / checkpoints.CARD, {"add_bos": True})
    for stage in (resolve(proposal=carded), resolve(), resolve("add_bos=true")):
        interrupt(stage, decoding_calls, after=0, overwrite=True)
    begins = [{row[0] == TOKENIZER.bos_token_id for row in call.prompts} for call in decoding_calls]
    assert begins == [{True}, {False}, {True}]


# ---- pairs -------------------------------------------------------------------------------------------------


def test_pair_answers_have_tokens_and_events(resolve, folders, tmp_path):
    """A pair's answers have a piece of text and an event per token, and the text of `generation.generate`."""
    pair = Pair(folders["large"], folders["small"], "float32")
    prompts = ["hello", "you", "a" * 30]
    settings = replace(resolve("sampling.base_top_p=1.0").config.sampling, sample_mode="par")
    params = settings.params
    job = AnswerJob(
        label="pair",
        pair=pair,
        params=params,
        settings=settings,
        records=[{"instruction": prompt} for prompt in prompts],
        prompts=prompts,
        row_ids=[0, 10, 20],
        seed=0,
        add_bos=False,
        key="x",
        extra={},
    )
    parts = answer_files.PartFiles(tmp_path / "x", job.identity, overwrite=False)
    answer_files.answer_all(job, parts)
    answers = parts.collect(len(prompts))
    expected = generation.generate(
        *job.load()[:2], TOKENIZER, prompts, params, max_new_tokens=NEW_TOKENS, row_ids=[0, 10, 20]
    )
    for answer, whole in zip(answers, expected, strict=True):
        assert (answer["text"], answer["finish_reason"]) == (whole.text, whole.finish_reason)
        assert answer["tokens"] == token_texts(TOKENIZER, whole.token_ids, marks=True)
        assert answer["events"] == whole.events
        for key in ("drafted", "accepted", "fallback_fraction", "mean_kl"):
            assert answer["stats"][key] == pytest.approx(whole.stats[key])
        assert answer["n_tokens"] == len(answer["tokens"]) == len(answer["events"])


# ---- pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain", "naïve 日本 🙂!", "🙂", " \n\n x ", "é\ufffdé"])
def test_pieces_add_up_to_the_text(text):
    """The pieces concatenate to the text. A character of several tokens belongs to the last of them."""
    ids = TOKENIZER(text).input_ids
    pieces = token_texts(TOKENIZER, ids, marks=True)
    assert "".join(pieces) == text and len(pieces) == len(ids) == len(text.encode())
    if "\ufffd" not in text:
        assert [piece for piece in pieces if piece] == list(text)
