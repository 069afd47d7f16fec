"""What a report is made of: answers as the page has them, the saved file, the page made again, wandb."""

import csv
import json
from types import SimpleNamespace

import pytest
from sample_report import BOARD, HOSTILE, make_hostile, make_report

from ram.errors import UserError
from ram.evaluation.report import gather, wandb_run
from ram.models import run_folder
from ram.storage.files import fingerprint, write_json, write_text


def answer(tokens, events, text, **more):
    stats = {"fallback_fraction": 0.25, "mean_kl": 1.23456789, "accepted": 3, "drafted": 4}
    found = {"text": text, "finish_reason": "stop", "n_tokens": len(tokens), "stats": stats}
    return found | {"tokens": tokens, "events": events} | more


EVENTS = ["agreed", "agreed", "changed", "fell_back"]


def test_answers_of_a_pair_become_runs():
    """Neighbours of the same event are joined; what was drawn beyond the text is the tail."""
    given = answer(["a", " b", " c", "</s>"], EVENTS, "a b c")
    assert gather.answer_entry(given, {"preference": 1.0}, None) == {
        "judged": {"preference": 1.0},
        "length": 5,
        "n": 4,
        "stats": {"fallback": 0.25, "kl": 1.23457, "acceptance": 0.75},
        "events": {"a": 2, "c": 1, "f": 1},
        "tail": 4,
        "runs": [["a", "a b"], ["c", " c"], ["f", "</s>"]],
    }
    stopped = answer(["a", " b", "\n\nHu", "man"], EVENTS, "a b", finish_reason="length")
    found = gather.answer_entry(stopped, {}, None)
    assert found["tail"] == len("\n\nHuman") and found["cut"] is True
    other = answer(
        ["a", "<s>", " b", "c"], EVENTS, "a bc"
    )  # a special token within: nothing is known of the end
    assert gather.answer_entry(other, {}, None)["tail"] == 0


def test_answers_with_figures_keep_their_tokens():
    figures = {
        "logp": [-0.5, -1.0, -0.25, None],
        "logp_proposal": [-1.0, None, -0.25, -2.0],
        "kl": [0.123456, 2.0, 0.0, 1e-9],
        "candidates": [[["a", 0.98765, 1e-5, 0.5]], [], [], []],
    }
    given = answer(["a", " b", " c", "</s>"], EVENTS, "a b c")
    found = gather.answer_entry(given, {}, figures)
    assert found["influence"] == [0.5, "outside", 0.0, None] and found["codes"] == "aacf"
    assert found["tokens"] == given["tokens"] and "runs" not in found and "text" not in found
    assert found["kl"] == [0.123, 2.0, 0.0, 1e-9] and found["candidates"][0] == [["a", 0.988, 1e-5, 0.5]]
    without = gather.answer_entry(given, {}, figures | {"logp": None})  # snis
    assert without["influence"] == [None] * 4


def test_answers_of_a_single_model_are_text():
    given = {"text": "x", "finish_reason": "stop", "n_tokens": 1, "stats": {"drafted": 0, "accepted": 0}}
    expected = {"judged": {}, "length": 1, "n": 1, "text": "x"}
    assert gather.answer_entry(given, {}, None) == expected


def test_note_explains_missing_figures():
    def system(**given):
        params = SimpleNamespace(sample_mode=given.get("mode", "par"))
        return SimpleNamespace(is_pair=given.get("is_pair", True), params=params)

    new, old, figures = [{"token_ids": [1], "events": ["agreed"]}], [{"events": ["agreed"]}], {0: {}}
    assert gather.note_on(system(), new, figures, 5) is None
    assert gather.note_on(system(is_pair=False), old, {}, 5) is None
    assert gather.note_on(system(), old, {}, 0) is None
    assert "generate them again" in gather.note_on(system(), old, {}, 5)
    assert "steps=[influence,report]" in gather.note_on(system(), new, {}, 5)
    assert "no fixed law" in gather.note_on(system(mode="snis"), new, figures, 5)
    assert "answered by a server" in gather.note_on(system(), [{"n_tokens": 3}], {}, 5)


def test_curves_have_the_drawn_columns(tmp_path):
    run = tmp_path / "run"
    text = "split,updates,examples,loss,target_logp_per_token\ntrain,1,64,2.5,\nheldout,1,64,nan,-0.5\n"
    write_text(run / run_folder.METRICS, text)
    stages = [
        SimpleNamespace(name="a", kind="train", output=run),
        SimpleNamespace(name="b", kind="train", output=tmp_path / "none"),
        SimpleNamespace(name="c", kind="sample", output=run),
    ]
    rest = {"sampled_logp_per_token": None}
    assert gather.training_curves(stages) == {
        "a": [
            {"split": "train", "examples": 64.0, "loss": 2.5, "target_logp_per_token": None, **rest},
            {"split": "heldout", "examples": 64.0, "loss": None, "target_logp_per_token": -0.5, **rest},
        ]
    }


# ---- saved and made again ----------------------------------------------------------------------------------

MADE = ("report.html", "leaderboard.md", "leaderboard.tex")


def whole(report):
    """A report whose board has all that evaluation.py gives every system."""
    return report | {"board": [BOARD[0] | {"system": system["name"]} for system in report["systems"]]}


@pytest.mark.parametrize("make", [make_report, make_hostile])
def test_rebuilt_files_are_the_same_bytes(make, tmp_path):
    """From the saved file alone, by the folder or by a file in it, also after it was moved."""
    gather.save(tmp_path / "a", whole(make()))
    first = {name: (tmp_path / "a" / name).read_bytes() for name in MADE}
    (tmp_path / "a").rename(tmp_path / "b")
    for path in (tmp_path / "b", tmp_path / "b" / "report.html", tmp_path / "b" / "report.json"):
        for name in MADE if path.is_dir() else MADE[1:]:
            (tmp_path / "b" / name).unlink()
        gather.rebuild(path)
        assert {name: (tmp_path / "b" / name).read_bytes() for name in MADE} == first


def test_values_without_a_json_form_are_replaced():
    given = {"a": [float("nan"), float("inf"), 1.5, True, None], "b\ud83d": ("half \ud83d", HOSTILE[9])}
    found = gather.plain(given)
    assert found == {"a": [None, None, 1.5, True, None], "b?": ["half ?", HOSTILE[9]]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def damages():
    def cut(path):
        path.write_text(path.read_text()[:-30])

    def change(path):
        path.write_text(path.read_text().replace("Olive 1.", "Olive 2."))

    def bits(path):
        path.write_bytes(b"\xff\xfe" + path.read_bytes())

    def old(path):
        write_json(path, {"format": 0})

    def list_(path):
        write_json(path, [1])

    def none(path):
        path.unlink()

    def half(path):
        path.write_text(path.read_text().replace("Olive 1.", "Olive \\ud83d"))

    return {
        cut: "not valid JSON",
        change: "was changed after it was written",
        bits: "not a UTF-8 text file",
        old: r"not a report of this version \(format 1\)",
        list_: "not a report of this version",
        none: "no report.json there; give the folder",
        half: "unpaired surrogate",
    }


@pytest.mark.parametrize("damage", damages().items(), ids=lambda item: item[0].__name__)
def test_damaged_report_is_refused(damage, tmp_path):
    """Nothing is written from a file that is not what was saved."""
    spoil, message = damage
    gather.save(tmp_path, whole(make_report()))
    spoil(tmp_path / "report.json")
    for name in MADE:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=message) as error:
        gather.rebuild(tmp_path)
    assert "\n" not in str(error.value) and not any((tmp_path / name).exists() for name in MADE)


@pytest.mark.parametrize("name", ["nowhere", "x.txt"])
def test_path_without_a_report_is_refused(name, tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=f"report=.*{name}: no report.json there"):
        gather.rebuild(tmp_path / name)


def test_saved_report_has_format_and_digest(tmp_path):
    found = gather.save(tmp_path, whole(make_report()))
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["format"] == gather.FORMAT and saved["report"] == found
    assert saved["sha256"] == fingerprint(found)


# ---- wandb -------------------------------------------------------------------------------------------------


def test_evaluation_is_logged_to_wandb_offline(tmp_path, monkeypatch):
    """A run of wandb's own holds the board, the figures of every answer, the page and the result files."""
    import wandb

    for key in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(key, str(tmp_path / key))
    added, add_file = [], wandb.Artifact.add_file

    def noted(artifact, path, *given, **settings):
        if artifact.type == "evaluation":
            added.append(path)
        return add_file(artifact, path, *given, **settings)

    monkeypatch.setattr(wandb.Artifact, "add_file", noted)
    with open(tmp_path / "leaderboard.csv", "w", newline="") as file:
        csv.writer(file).writerow(["system"])
    found = gather.save(tmp_path, whole(make_report(rows=2)))
    settings = SimpleNamespace(project="p", entity=None, mode="offline")
    wandb_run.log_evaluation(settings, "demo: facts", tmp_path, found)
    wandb.teardown()  # as at a process's end: only then is all of the run's file written
    (run,) = tmp_path.glob("wandb/offline-run-*")
    tables = sorted(run.glob("files/media/table/*.table.json"))
    board, answers = sorted(
        (json.loads(path.read_text()) for path in tables), key=lambda t: -len(t["columns"])
    )
    assert board["columns"][0] == "system" and len(board["data"]) == 3
    assert answers["columns"][:4] == ["row", "system", "length", "preference"] and len(answers["data"]) == 6
    assert answers["data"][0][:4] == [0, "ours: large + small", 21, 1.0]
    assert answers["data"][0][4:] == pytest.approx([1 / 7, 0.25 + 1 / 7, 6 / 7])
    assert answers["data"][2][4:] == [None] * 3
    (page,) = run.glob("files/media/html/*.html")
    assert page.read_bytes() == (tmp_path / "report.html").read_bytes()
    assert b"demo--facts" in next(run.glob("*.wandb")).read_bytes()
    names = ("leaderboard.csv", "leaderboard.md", "leaderboard.tex", "report.json", "report.html")
    assert added == [str(tmp_path / name) for name in names]  # results.json is not there
