"""Whole-file generation: order, restarts, what a file is made from, and that every setting arrives."""

import json
import random
from dataclasses import asdict
from itertools import islice

import pytest
from tiny import byte_tokenizer, save_model_folder, tiny_model

import checkpoints
import decoding
import recipes
import sampling
from par import PARParams
from prompts import render
from tokenization import encode_prompts
from utils import UserError, write_json

TOKENIZER = byte_tokenizer()
ROWS = [
    {"instruction": "why? " * (7 * i % 10), "output": f"answer {i}", "id": i, "tags": ["é", None]}
    for i in range(10)
]  # the longest prompts, which are decoded first, stand in the middle
LONGEST_PROMPT, NEW_TOKENS = 75, 12


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Three model folders of one tokenizer: two sizes to pair, and other weights of the first."""
    root = tmp_path_factory.mktemp("models")
    models = {"large": (1, 2), "small": (2, 1), "other": (3, 2)}
    return {
        name: save_model_folder(root / name, tiny_model(len(TOKENIZER), seed, layers), TOKENIZER)
        for name, (seed, layers) in models.items()
    }


@pytest.fixture
def resolve(tmp_path, folders):
    """The sample stage that `train.py` would run with some overrides; the data set is written on first use."""
    path = tmp_path / "train" / "ultrachat_round_one.json"
    write_json(path, ROWS)

    def stage(*overrides, proposal=folders["large"]):
        (found,) = recipes.resolve(
            [
                f"+stage.sample={{kind: sample, proposal: {proposal}, dataset: uc}}",
                f"data_dir={tmp_path}",
                f"max_prompt_length={LONGEST_PROMPT}",
                f"max_length={LONGEST_PROMPT + NEW_TOKENS}",
                "sampling.batch_size=3",
                "sampling.base_temperature=1.0",
                *overrides,
            ]
        )
        return found

    return stage


@pytest.fixture
def decoded(monkeypatch):
    """Counts answers: a list of how many prompts each decoding was asked for; `stop_after` cuts one short."""

    class Decoded(list):
        stop_after = None

    calls, original = Decoded(), decoding.generate_iter

    def generate_iter(proposal, aligner, tokenizer, prompts, *args, **kwargs):
        calls.append(len(prompts))
        answers = original(proposal, aligner, tokenizer, prompts, *args, **kwargs)
        yield from islice(answers, calls.stop_after)
        if calls.stop_after is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "generate_iter", generate_iter)
    return calls


def sample(stage, overwrite=False):
    """Runs the stage and gives the file it leaves."""
    sampling.sample_training_set(stage, overwrite)
    return stage.output.read_bytes()


def interrupt(stage, decoded, after):
    decoded.stop_after = after
    with pytest.raises(KeyboardInterrupt):
        sample(stage)
    decoded.stop_after = None


def part_file(stage):
    return stage.output.with_name(stage.output.name + ".part")


def texts(data):
    return [row["sampling"] for row in json.loads(data)]


# ---- what is written ---------------------------------------------------------------------------------------
def test_rows_keep_order_and_fields(resolve, folders, monkeypatch):
    """Every row comes back in its place with all its fields and the answer that `decoding` gives for it."""
    order, original = [], decoding.generate_iter

    def generate_iter(*args, **kwargs):
        for index, answer in original(*args, **kwargs):
            order.append(index)
            yield index, answer

    monkeypatch.setattr(decoding, "generate_iter", generate_iter)
    stage = resolve("seed=4")
    rows = json.loads(sample(stage))
    assert sorted(order) == list(range(10)) != order  # decoded by length, not in the order of the file
    ids, cut = encode_prompts(TOKENIZER, [render(row["instruction"]) for row in ROWS], LONGEST_PROMPT)
    assert 0 < cut < len(ROWS)
    model = checkpoints.load_model(folders["large"])
    params = PARParams(base_temperature=1.0)
    settings = {"max_new_tokens": NEW_TOKENS, "seed": 4, "stop": ["\n\nHuman"]}
    expected = decoding.generate(model, None, TOKENIZER, ids, params, **settings)
    assert rows == [row | {"sampling": g.text} for row, g in zip(ROWS, expected, strict=True)]
    assert not part_file(stage).exists()


def test_row_ids_are_those_of_the_file(resolve, tmp_path):
    """A bad row that is skipped does not change the answers to the rows behind it."""
    whole = texts(sample(resolve()))
    path = tmp_path / "train" / "ultrachat_round_one.json"
    write_json(path, [row if row["id"] != 3 else {"instruction": 5} for row in ROWS])
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
    """A run that is stopped after 4 answers redoes none of them and ends with the uninterrupted run's file."""
    stage = resolve()
    whole = sample(stage)
    stage.output.unlink()
    interrupt(stage, decoded, after=4)
    assert not stage.output.exists()
    assert sample(stage) == whole
    assert decoded == [10, 10, 6]
    assert not part_file(stage).exists()


@pytest.mark.parametrize(
    "cut, left",
    [
        (lambda data: data[:-1], 7),  # the last line's end alone
        (lambda data: data[:-20], 7),
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 2], 7),
        (lambda data: data[:30], 10),  # in the header
        (lambda data: b"", 10),
        (lambda data: data, 6),
    ],
    ids=["no newline", "mid-line", "first byte", "header", "empty", "whole"],
)
def test_part_file_cut_in_mid_line(resolve, decoded, cut, left):
    """An answer that was cut while it was written is decoded again; the whole ones before it are not."""
    stage = resolve()
    whole = sample(stage)
    stage.output.unlink()
    interrupt(stage, decoded, after=4)
    part_file(stage).write_bytes(cut(part_file(stage).read_bytes()))
    assert sample(stage) == whole
    assert decoded[-1] == left


@pytest.mark.parametrize("change", ["seed", "weights", "prompts"])
def test_part_file_of_other_inputs_is_refused(resolve, decoded, folders, tmp_path, change):
    """A run begun with another seed, other weights or other prompts is not continued unless overwritten."""
    interrupt(resolve(), decoded, after=4)
    before = part_file(resolve()).read_bytes()
    changed = resolve("seed=1") if change == "seed" else resolve()
    if change == "weights":
        changed.source = folders["other"]
    elif change == "prompts":
        rows = [row | {"instruction": "!"} if row["id"] == 9 else row for row in ROWS]
        write_json(tmp_path / "train" / "ultrachat_round_one.json", rows)
    with pytest.raises(UserError, match="other settings, weights or prompts.*overwrite=true"):
        sample(changed)
    assert part_file(changed).read_bytes() == before
    anew = sample(changed, overwrite=True)
    assert decoded == [10, 10]
    changed.output.unlink()
    assert sample(changed) == anew


# ---- finished files ----------------------------------------------------------------------------------------
def test_finished_file_is_left_alone(resolve, decoded):
    """The same command again decodes nothing and does not touch the file; batch size is no reason to."""
    stage = resolve()
    data, written = sample(stage), stage.output.stat().st_mtime_ns
    assert sample(resolve("sampling.batch_size=16", "sampling.speculative=false")) == data
    assert decoded == [10] and stage.output.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data.replace(b"answer 1", b"answer X")]
)
def test_damaged_finished_file_is_refused(resolve, decoded, damage):
    """A finished file that was cut short or changed is neither used nor replaced unless overwritten."""
    stage = resolve()
    whole = sample(stage)
    stage.output.write_bytes(damage(whole))
    with pytest.raises(UserError, match="changed or cut short.*overwrite=true"):
        sample(stage)
    assert stage.output.read_bytes() == damage(whole) and decoded == [10]
    assert sample(stage, overwrite=True) == whole


def test_file_of_the_user_is_used(resolve, decoded):
    """A file without a marker was put there by somebody: it is used as it is."""
    stage = resolve()
    stage.output.write_text("[]")
    assert sample(stage) == b"[]"
    assert decoded == []


# ---- settings ----------------------------------------------------------------------------------------------
SETTINGS = {
    "seed": "seed=1",
    "base_temperature": "sampling.base_temperature=0.9",
    "base_top_p": "sampling.base_top_p=0.9",
    "base_top_k": "sampling.base_top_k=5",
    "base_repetition_penalty": "sampling.base_repetition_penalty=1.05",
    "stop_str": "sampling.stop_str=x",
    "max_length": f"sampling.max_length={LONGEST_PROMPT + NEW_TOKENS + 1}",
    "max_prompt_length": f"sampling.max_prompt_length={LONGEST_PROMPT - 1}",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_part_of_what_a_file_is(resolve, decoded, setting):
    """A finished and an unfinished file made with another value of any setting are both refused."""
    sample(resolve("sampling.limit=2"))
    with pytest.raises(UserError, match="made from other settings.*overwrite=true"):
        sample(resolve("sampling.limit=2", SETTINGS[setting]))
    resolve().output.unlink()
    interrupt(resolve("sampling.limit=2"), decoded, after=1)
    with pytest.raises(UserError, match="begun with other settings.*overwrite=true"):
        sample(resolve("sampling.limit=2", SETTINGS[setting]))


def test_settings_reach_the_sampler(resolve, monkeypatch):
    """Decoding is called with every value that the configuration gives, none of them a default."""
    given = {
        "base_temperature": 0.7, "base_top_p": 0.8, "base_top_k": 9, "base_repetition_penalty": 1.2,
        "sample_mode": "snis", "temperature": 0.6, "top_p": 0.85, "top_k": 7, "repetition_penalty": 1.3,
        "div_threshold": 0.2, "kl_fallback": "aligner", "eos_priority": True, "expert_temperature": 0.4,
        "n_candidates": 3,
    }  # fmt: skip
    assert given.keys() == set(PARParams.field_names())
    seen = {}

    def generate_iter(proposal, aligner, tokenizer, prompts, params, **kwargs):
        seen.update(kwargs, params=params, lengths=[len(row) for row in prompts], models=(proposal, aligner))
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "generate_iter", generate_iter)
    overrides = [f"sampling.{key}={recipes.literal(value)}" for key, value in given.items()]
    with pytest.raises(KeyboardInterrupt):
        sample(
            resolve("seed=7", "sampling.stop_str=zz", "sampling.batch_size=5", "sampling.limit=6", *overrides)
        )
    assert asdict(seen["params"]) == given
    assert (seen["seed"], seen["stop"], seen["batch_size"]) == (7, ["zz"], 5)
    assert (seen["max_new_tokens"], seen["row_ids"]) == (NEW_TOKENS, list(range(6)))
    assert max(seen["lengths"]) <= LONGEST_PROMPT
    assert seen["models"][0].config.num_hidden_layers == 2 and seen["models"][1] is None


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
    stopped = texts(sample(resolve(f"sampling.stop_str={recipes.literal(common)}"), overwrite=True))
    assert stopped == [text.split(common)[0] for text in whole] != whole


def test_bos_is_what_the_model_was_trained_with(resolve, folders, tmp_path, monkeypatch):
    """A model's card decides whether prompts begin with BOS, and the configuration where there is no card."""
    carded = save_model_folder(tmp_path / "carded", tiny_model(len(TOKENIZER), 1), TOKENIZER)
    write_json(tmp_path / "carded" / checkpoints.CARD, {"add_bos": True})
    begins = []

    def generate_iter(proposal, aligner, tokenizer, prompts, *args, **kwargs):
        begins.append({row[0] == TOKENIZER.bos_token_id for row in prompts})
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "generate_iter", generate_iter)
    for stage in (resolve(proposal=carded), resolve(), resolve("add_bos=true", "data_dir=" + str(tmp_path))):
        with pytest.raises(KeyboardInterrupt):
            sample(stage, overwrite=True)
    assert begins == [{True}, {False}, {True}]


# ---- pairs -------------------------------------------------------------------------------------------------
def generate_file(path, pair, stage, prompts, **settings):
    params = recipes.par_params(stage.config.sampling)
    settings = {"seed": 0, "add_bos": False, "overwrite": False, "label": "test"} | settings
    row_ids = [10 * i for i in range(len(prompts))]
    answers, part = sampling.generate_file(
        path, pair, prompts, row_ids, params, stage.config.sampling, **settings
    )
    part.remove()
    return answers


def test_pair_answers_are_traced(resolve, folders, tmp_path):
    """A pair's answers carry a piece of text and an event per token, and the texts of `decoding`."""
    pair, prompts = sampling.Pair(folders["large"], folders["small"], "float32"), ["hello", "you", "a" * 30]
    stage = resolve("sampling.sample_mode=par", "sampling.base_top_p=1.0")
    answers = generate_file(tmp_path / "x.part", pair, stage, prompts)
    expected = decoding.generate(
        *(checkpoints.load_model(folders[name]) for name in ("large", "small")),
        TOKENIZER, prompts, recipes.par_params(stage.config.sampling), max_new_tokens=NEW_TOKENS,
        row_ids=[0, 10, 20], stop=["\n\nHuman"],
    )  # fmt: skip
    for answer, generation in zip(answers, expected, strict=True):
        assert (answer["text"], answer["finish_reason"]) == (generation.text, generation.finish_reason)
        assert answer["tokens"] == sampling.pieces(TOKENIZER, generation.token_ids)
        assert answer["events"] == generation.events
        assert answer["stats"] == pytest.approx(generation.stats)
        assert answer["n_tokens"] == len(answer["tokens"]) == len(answer["events"])


def test_pair_with_two_vocabularies_is_refused(resolve, folders, tmp_path, monkeypatch):
    """Models whose tokenizers differ are no pair, which is said before any weights are read."""
    other = byte_tokenizer()
    other.add_tokens(["more"])
    folder = save_model_folder(tmp_path / "strange", tiny_model(len(other), 1), other)
    monkeypatch.setattr(checkpoints, "load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match="tokenizer of the aligner .* differs"):
        generate_file(tmp_path / "x.part", sampling.Pair(folders["large"], folder), resolve(), ["a"])


# ---- pieces ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["plain", "naïve 日本 🙂!", "🙂", " \n\n x ", "é�é"])
def test_pieces_add_up_to_the_text(text):
    """The pieces concatenate to the text; a character of several tokens stands with its last one."""
    ids = TOKENIZER(text).input_ids
    found = sampling.pieces(TOKENIZER, ids)
    assert "".join(found) == text and len(found) == len(ids) == len(text.encode())
    if "�" not in text:
        assert [piece for piece in found if piece] == list(text)


def test_pieces_of_broken_characters():
    """Bytes that form no character are shown by what decoding makes of them, and nothing is lost."""
    rng = random.Random(2)
    for _ in range(200):
        ids = [rng.randrange(len(TOKENIZER)) for _ in range(6)] + TOKENIZER("x").input_ids
        assert "".join(sampling.pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids)
