"""AlpacaEval 2's comparison, made by the package alpaca_eval.

The package builds the requests and reads the answers; this module sends the requests. The package's own
client stops at the first unknown error and saves no judgement before all are there. The changes that the
package makes to the environment and the log are undone.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ram.answers.endpoints import Endpoints, RequestFailed
from ram.errors import UserError
from ram.evaluation.judges import endpoint
from ram.evaluation.judges.base import Cache, Judgement, Rows, Texts
from ram.storage.files import fingerprint

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # the package's name for AlpacaEval 2's prompt and parser
MARKS = ("{output_1}", "{output_2}", "<|im_start|>", "<|im_end|>")  # the package would interpret these
INSTALL = 'pip install "alpaca_eval==0.6.6" "setuptools<82"'

Answers = list[dict[str, float] | RequestFailed]  # log-probabilities of m and M


@dataclass(frozen=True)
class AlpacaEvalJudge(endpoint.ServedJudge):
    """Uses AlpacaEval's prompt for helpfulness and `endpoint.QUESTION` for the other criteria.

    Display order and the weighting by log-probabilities are AlpacaEval's. So is its frame of triple quotes,
    which an answer can forge. Equal answers are a tie and are not sent.
    """

    name: str = "alpaca_eval"
    model: str | None = "gpt-4-1106-preview"

    def check(self) -> None:
        missing = [name for name in ("alpaca_eval", "pkg_resources") if not importlib.util.find_spec(name)]
        if missing:
            raise UserError(f"judge=alpaca_eval: {' and '.join(missing)} is not installed: {INSTALL}")
        super().check()

    def describe(self) -> str:
        return super().describe() + (f", prompt {ANNOTATOR}" if self.criterion == "helpful" else "")

    def compare(self, rows: Rows, answers: Texts, references: Texts, cache: Path) -> list[Judgement]:
        saved = Cache(cache)
        template = None
        if self.criterion != "helpful":
            places = {"instruction": "{instruction}", "first": "{output_1}", "second": "{output_2}"}
            template = endpoint.QUESTION.format(criterion=self.criterion_text, **places)
        with Endpoints(self, endpoint.tally) as servers:

            def send(bodies: list[dict[str, Any]]) -> Answers:
                keys = [fingerprint(body) for body in bodies]
                requests = dict(zip(keys, bodies, strict=True))
                failed = self.ask(servers, requests, saved, read_logprobs)
                return [RequestFailed(failed[key]) if key in failed else saved.known[key] for key in keys]

            instructions = [row[self.instruction_key] for row in rows]
            if template is not None:
                columns = instructions, answers, references
                instructions, answers, references = (
                    [endpoint.enclosed(text) for text in column] for column in columns
                )
            return evaluate(instructions, answers, references, template, servers.model(), send)


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Undo the package's side effects when the block ends.

    On import and in use it reads a .env file into the environment, raises the root logger's level, and writes
    to the root logger and to stderr.
    """
    environment, root = dict(os.environ), logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        for name in set(os.environ) - set(environment):
            del os.environ[name]


def read_logprobs(answer: dict[str, Any]) -> dict[str, float] | RequestFailed:
    """Return the log-probabilities of m and M as the first token of a chat completion; none of 0."""
    mass = endpoint.first_token(answer)
    if isinstance(mass, RequestFailed):
        return RequestFailed(f"{mass}; the server has to support logprobs and top_logprobs")
    return {token: math.log(p) for token, p in mass.items() if p > 0}


def evaluate(
    instructions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[str],
    template: str | None,
    model: str,
    send: Callable[[list[dict[str, Any]]], Answers],
) -> list[Judgement]:
    """Return judgements of the answers by `alpaca_eval.evaluate`, in order.

    Args:
        instructions: one per row, with its answer and reference.
        answers: the system's.
        references: the texts to compare with.
        template: a prompt with {instruction}, {output_1} and {output_2}; None is the package's own.
        model: name of the model, for the requests.
        send: takes request bodies of the chat protocol and returns an answer for each.

    A row whose text contains a mark that the package would interpret is a failed judgement.
    """
    judgements: list[Judgement] = [{"preference": 0.5, "identical": True} for _ in instructions]
    rows = []
    for index, texts in enumerate(zip(instructions, answers, references, strict=True)):
        if texts[1] == texts[2]:
            continue
        if marks := [mark for mark in MARKS if any(mark in text for text in texts)]:
            judgements[index] = {"failed": f"its text holds {marks[0]}, which alpaca_eval takes for its own"}
        else:
            rows.append(index)
    if not rows:
        return judgements
    terminal = sys.stderr
    with contained(), tempfile.TemporaryDirectory() as folder:
        package = importlib.import_module("alpaca_eval")
        constants = importlib.import_module("alpaca_eval.constants")
        utils = importlib.import_module("alpaca_eval.utils")
        logging.getLogger().setLevel(logging.CRITICAL)

        def complete(prompts: Sequence[str], model_name: str, **settings: Any) -> dict[str, list]:
            """Replace the package's client."""
            settings = {"top_p": 1.0, **settings}  # the default of its client
            dialogues = [utils.prompt_to_chatml(prompt.strip()) for prompt in prompts]
            bodies = [{"model": model_name, "messages": messages, **settings} for messages in dialogues]
            with contextlib.redirect_stderr(terminal):  # our progress bar
                completions = [completion(answer) for answer in send(bodies)]
            return {"completions_all": completions}

        annotated = package.evaluate(
            model_outputs=outputs(rows, instructions, answers, "system"),
            reference_outputs=outputs(rows, instructions, references, "reference"),
            annotators_config=write_annotator(Path(folder), template, model, constants, utils),
            fn_completions=complete,
            annotation_kwargs={"is_ordered": True, "chunksize": None},
            caching_path=None,
            output_path=None,
            precomputed_leaderboard=None,
            is_cache_leaderboard=False,
            is_return_instead_of_print=True,
            fn_metric="get_winrate",
            sort_by="win_rate",
        )[1]
    for index, row in zip(rows, annotated, strict=True):
        raw = row["preference_raw_completion"]
        failed = "failed" in raw
        judgements[index] = {"failed": raw["failed"]} if failed else judgement(row["preference"], raw)
    return judgements


def outputs(
    rows: Sequence[int], instructions: Sequence[str], texts: Sequence[str], generator: str
) -> list[dict[str, str]]:
    """Return rows in AlpacaEval's format."""
    return [{"instruction": instructions[row], "output": texts[row], "generator": generator} for row in rows]


def write_annotator(
    folder: Path, template: str | None, model: str, constants: ModuleType, utils: ModuleType
) -> Path:
    """Write the package's annotator with another model and, if a template is given, another prompt."""
    settings = utils.load_configs(ANNOTATOR, relative_to=constants.EVALUATORS_CONFIG_DIR)[ANNOTATOR]
    prompt = Path(constants.EVALUATORS_CONFIG_DIR) / settings["prompt_template"]
    if template is not None:
        prompt = folder / "prompt.txt"
        prompt.write_text(f"<|im_start|>user\n{template}\n<|im_end|>", encoding="utf-8")
    del settings["fn_completions"]
    settings["completions_kwargs"]["model_name"] = model
    path = folder / "configs.yaml"
    path.write_text(json.dumps({ANNOTATOR: settings | {"prompt_template": str(prompt)}}), encoding="utf-8")
    return path


def completion(answer: dict[str, float] | RequestFailed) -> dict[str, Any]:
    """Return an answer in the form that the package parses.

    A failed request becomes a tie with `failed`: the package would drop the row.
    """
    failed = {"failed": str(answer)} if isinstance(answer, RequestFailed) else {}
    logprobs = {"m": 0.0, "M": 0.0} if isinstance(answer, RequestFailed) else answer
    candidates = [{"token": token, "logprob": logprob} for token, logprob in logprobs.items()]
    return {"logprobs": {"content": [{"top_logprobs": candidates}]}, **failed}


def judgement(preference: float, raw: dict[str, Any]) -> Judgement:
    """Convert AlpacaEval's preference, from 1 (the reference's) to 2, and its raw completion."""
    candidates = raw["logprobs"]["content"][0]["top_logprobs"]
    p = {item["token"]: math.exp(item["logprob"]) for item in candidates}
    return {"preference": preference - 1, "first": p.get("m", 0.0) / sum(p.values())}


JUDGE = AlpacaEvalJudge
