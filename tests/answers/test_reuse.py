"""Which answers are made again: what an answer depends on, damaged parts, files of earlier versions."""

import json

import pytest
from sample_stage import interrupt, part_file, sample

import train
from ram.answers import answer_files
from ram.answers.jobs import Pair
from ram.decoding.par import PARParams
from ram.evaluation.systems import resolve_systems, settings_tag
from ram.settings import compose, recipes
from ram.settings.schema import settings_of
from ram.storage import provenance
from ram.storage.files import file_sha256, write_json, write_jsonl
from ram.storage.parts import checked
from utils import TABLES


def test_changed_limit_keeps_finished_answers(resolve, decoding_calls, caplog):
    """An answer depends on its row alone: more rows cost only the new ones, fewer rows cost nothing."""
    whole = json.loads(sample(resolve(), overwrite=True))
    resolve().output.unlink()
    sample(resolve("sampling.limit=4"))
    assert json.loads(sample(resolve("sampling.limit=7"))) == whole[:7]
    assert json.loads(sample(resolve("sampling.limit=3"))) == whole[:3]
    assert json.loads(sample(resolve("sampling.limit=8"))) == whole[:8]  # 7 of them from the file set aside
    assert decoding_calls.counts == [10, 4, 3, 1]
    assert "4 answers of a file of other rows are used again" in caplog.text


def test_changed_limit_keeps_answers_of_an_earlier_version(resolve, decoding_calls):
    """Its details name no rows, but the digest of the rows shows that they are the first ones."""
    stage = resolve("sampling.limit=4")
    sample(stage)
    trace = answer_files.trace_path(stage.output)
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    write_jsonl(trace, [{key: value for key, value in row.items() if key != "row_key"} for row in rows])
    record = json.loads(provenance.marker(stage.output).read_text())
    del record["digest"]
    record["sha256"][trace.name] = file_sha256(trace)
    write_json(provenance.marker(stage.output), record)
    sample(resolve("sampling.limit=6"))
    assert decoding_calls.counts == [4, 2]


def test_damaged_answer_of_an_unfinished_file_is_made_again(resolve, decoding_calls, caplog):
    """A changed text in a part is valid JSON; its digest shows the change."""
    stage = resolve()
    whole = sample(stage)
    stage.output.unlink()
    interrupt(stage, decoding_calls, after=4)
    lines = part_file(stage).read_text().splitlines(keepends=True)
    answer = json.loads(lines[3])
    lines[3] = json.dumps(answer | {"text": "something else"}) + "\n"
    part_file(stage).write_text("".join(lines))
    assert sample(stage) == whole
    assert decoding_calls.counts == [10, 10, 8]
    assert "damaged or cut short; answers from there on are made again" in caplog.text


def test_part_file_of_an_earlier_version_is_continued(resolve, decoding_calls):
    """It has no digests, and the identity in its first line covers all rows."""
    stage = resolve()
    whole = sample(stage)
    stage.output.unlink()
    interrupt(stage, decoding_calls, after=4)
    _, *lines = map(json.loads, part_file(stage).read_text().splitlines())
    old = [{key: row[key] for key in row if key not in ("check", "elapsed", "row_key")} for row in lines]
    write_jsonl(part_file(stage), [{"identity": train.sample_job(stage)[0].identity}, *old])
    assert sample(stage) == whole
    assert decoding_calls.counts == [10, 10, 6]


def test_speed_counts_all_sessions(resolve, decoding_calls):
    """The tokens are those of the whole file; the seconds of the first session are in its part."""
    stage = resolve()
    interrupt(stage, decoding_calls, after=4)
    header, *lines = map(json.loads, part_file(stage).read_text().splitlines())
    for i, line in enumerate(lines):
        del line["check"]
        lines[i] = checked(line | {"elapsed": 100.0 + i})
    write_jsonl(part_file(stage), [header, *lines])
    sample(stage)
    speed = answer_files.read_speed(stage.output)
    trace = [json.loads(line) for line in answer_files.trace_path(stage.output).read_text().splitlines()]
    assert speed["tokens"] == sum(answer["n_tokens"] for answer in trace)
    assert 103 < speed["seconds"] < 200


UNREAD = {
    "par": "div_threshold",
    "product": "kl_fallback",
    "snis": "expert_temperature",
    "mds": "n_candidates",
}
OTHER_VALUE = {"div_threshold": 3.0, "kl_fallback": "aligner", "expert_temperature": 0.5, "n_candidates": 9}


@pytest.mark.parametrize("mode", UNREAD)
def test_law_of_a_mode_leaves_out_what_the_mode_does_not_read(mode):
    """`div_threshold` changes answers of par_kl only; earlier identities are still known."""
    pair, key = Pair("a", "b"), UNREAD[mode]
    given = {"n_candidates": 4} if mode == "snis" else {}
    plain = PARParams(sample_mode=mode, **given)
    other = PARParams(sample_mode=mode, **given | {key: OTHER_VALUE[key]})
    assert pair.law(plain) == pair.law(other) == pair.law(plain, earlier=True)
    assert pair.law(other, earlier=True) == pair.law(plain) | {key: OTHER_VALUE[key]}
    assert pair.law(PARParams(div_threshold=3.0)) != pair.law(PARParams())


def test_unread_settings_do_not_change_the_folder(tmp_path):
    """In mode par, div_threshold is not in the folder's name; a folder with an earlier name is used."""

    def systems(*overrides):
        given = ["experiment=demo", f"output_dir={tmp_path}", *overrides]
        stages = {stage.name: stage for stage in recipes.resolve(given, TABLES)}
        return resolve_systems(settings_of(compose.compose(given), TABLES), "facts", stages, set())

    plain, other = systems(), systems("sampling.div_threshold=3.0")
    changed = {name for name in plain if plain[name].folder != other[name].folder}
    assert changed == {name for name in plain if name.endswith("[par_kl]")} != set()
    system = other["proposal+aligner[par]"]
    tag = settings_tag(system.pair, system.settings, 0, earlier=True)
    before = system.folder.with_name(f"{system.folder.name.rpartition('#')[0]}#{tag}")
    before.mkdir(parents=True)
    assert systems("sampling.div_threshold=3.0")[system.name].folder == before != system.folder
    assert systems()[system.name].folder == system.folder
