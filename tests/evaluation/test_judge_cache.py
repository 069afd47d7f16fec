"""What a judge is not asked again: kept answers, their checks, two evaluations at once; a judge's warning."""

import json
import threading
import time
from types import SimpleNamespace

from tiny import byte_tokenizer, save_model_folder, tiny_model

from ram.evaluation import steps
from ram.evaluation.judges.base import Cache, Judge, load_judges
from ram.evaluation.judges.reward_model import RewardModelJudge
from ram.models import checkpoints


def test_changed_answer_is_asked_for_again(tmp_path, caplog):
    """A changed figure is valid JSON; its digest shows the change. Lines of earlier versions have none."""
    path = tmp_path / "judgements.jsonl"
    cache = Cache(path)
    for number in range(4):
        cache.add(f"key {number}", number / 4)
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("0.25", "0.75")
    lines[2] = lines[2][:-9]
    path.write_text(
        "\n".join([*lines, json.dumps({"key": "old", "value": 0.5}), "[]", '{"key": [], "value": 1}'])
    )
    again = Cache(path)
    assert again.known == {"key 0": 0.0, "key 3": 0.75, "old": 0.5}
    assert "4 damaged or cut lines are left out" in caplog.text
    again.add("key 1", 0.25)
    assert Cache(path).known == {"key 0": 0.0, "key 1": 0.25, "key 3": 0.75, "old": 0.5}


def test_two_evaluations_at_once_ask_once(tmp_path, caplog):
    """The second one waits for the first, and finds its judgements; a paid judge was once asked twice."""
    caplog.set_level("INFO", "ram")
    asked = []

    class Paid(Judge):
        def compare(self, rows, answers, references, cache):
            saved, deadline = Cache(cache), time.monotonic() + 2
            missing = [answer for answer in answers if answer not in saved.known]
            while missing and "waiting for another run" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            for answer in missing:
                asked.append(answer)
                saved.add(answer, 0.5)
            return [{"preference": saved.known[answer]} for answer in answers]

    context = SimpleNamespace(
        config=SimpleNamespace(output_dir=tmp_path, overwrite=False),
        rows=[(0, {}), (1, {})],
        answers={"x": [{"text": "one"}, {"text": "two"}]},
        references=["", ""],
        judge=Paid("paid"),
    )
    threads = []
    for number in range(2):
        paths = {"judgements_path": lambda system, number=number: tmp_path / f"judgements {number}"}
        own = SimpleNamespace(**vars(context), **paths)
        threads.append(
            threading.Thread(target=steps._judgements_of, args=(own, SimpleNamespace(name="x")), daemon=True)
        )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(asked) == ["one", "two"]


def test_judge_that_measures_nothing_warns(caplog):
    """In the log, where a run begins to judge; tables and report have the line, too."""
    judge = load_judges()["dummy"]("dummy")
    steps.judge(SimpleNamespace(judge=judge, systems={}, judgements={}))
    assert "judge=dummy prefers the longer answer" in caplog.text


def test_chat_template_of_a_reward_model_is_part_of_its_identity(tmp_path, monkeypatch):
    """Another template makes another text of the same answer; without one nothing changes."""
    tokenizer = byte_tokenizer()
    folder = save_model_folder(tmp_path / "m", tiny_model(len(tokenizer), 0), tokenizer)
    judge = RewardModelJudge(model=folder)
    plain = judge.identity()
    assert "chat_template" not in plain
    identities = []
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        (tmp_path / "m" / "chat_template.jinja").write_text(text)
        identities.append(judge.identity())
    assert plain != identities[0] != identities[1] and judge.earlier_identity() == judge.identity()
    (tmp_path / "m" / "chat_template.jinja").unlink()
    assert judge.earlier_identity() == plain, "small files: the same rule"
    monkeypatch.setattr(checkpoints, "BLOCK", 2)
    assert (
        judge.earlier_identity()["model"]
        == checkpoints.earlier_fingerprint(folder)
        != judge.identity()["model"]
    )
