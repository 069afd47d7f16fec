"""The package alpaca_eval, kept to itself: what it does to the environment and the log is undone.

Its own client is not used: it gives up on the first error that it does not know, and keeps no judgement
before all are there. It makes the requests and reads the answers; who sends them is said by the caller.
"""

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ram.answers.endpoints import RequestFailed
from ram.errors import UserError

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # the package's name for AlpacaEval 2's prompt and reading
MARKS = ("{output_1}", "{output_2}", "<|im_start|>", "<|im_end|>")  # what the package would take for its own
INSTALL = 'pip install "alpaca_eval==0.6.6" "setuptools<82"'

Answered = Callable[[list[dict[str, Any]]], list[dict[str, float] | RequestFailed]]


def check() -> None:
    """Raises UserError where the package, or what it imports of setuptools, is not installed."""
    if missing := [name for name in ("alpaca_eval", "pkg_resources") if not importlib.util.find_spec(name)]:
        raise UserError(f"judge=alpaca_eval: {' and '.join(missing)} is not installed: {INSTALL}")


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Undoes what the package does to its surroundings when it is imported and run: it reads a .env file into
    the environment, raises the level of the root logger, and writes there and to stderr.
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
    """The log-probabilities of m and M as a chat completion's first token; RequestFailed if the server names
    neither, because asking again would change nothing.
    """
    content = (answer["choices"][0].get("logprobs") or {}).get("content") or [{}]
    candidates = content[0].get("top_logprobs") or []
    found = {item["token"]: float(item["logprob"]) for item in candidates if item["token"] in ("m", "M")}
    if not found:
        return RequestFailed(
            "no log-probability of m or M; the server has to support logprobs and top_logprobs"
        )
    return found


def compare(
    instructions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[str],
    template: str | None,
    model: str,
    answered: Answered,
) -> list[dict[str, Any]]:
    """Judgements of the answers by `alpaca_eval.evaluate`, in order.

    template: a prompt with {instruction}, {output_1} and {output_2}; None is the package's own. answered:
    takes request bodies of the chat protocol, and returns for each of them the log-probabilities of m and M,
    or RequestFailed. A row whose text holds a mark that the package would read as its own is not judged.
    """
    judgements: list[dict[str, Any]] = [{"preference": 0.5, "identical": True} for _ in instructions]
    rows = []
    for index, texts in enumerate(zip(instructions, answers, references, strict=True)):
        if texts[1] == texts[2]:
            continue
        if found := [mark for mark in MARKS if any(mark in text for text in texts)]:
            judgements[index] = {"failed": f"its text holds {found[0]}, which alpaca_eval takes for its own"}
        else:
            rows.append(index)
    if not rows:
        return judgements
    terminal = sys.stderr
    with contained(), tempfile.TemporaryDirectory() as folder:
        import alpaca_eval
        from alpaca_eval import constants, utils

        logging.getLogger().setLevel(logging.CRITICAL)

        def complete(prompts: Sequence[str], model_name: str, **law: Any) -> dict[str, list]:
            """Stands in for the package's client."""
            law = {"top_p": 1.0, **law}  # as its client has it
            messages = [utils.prompt_to_chatml(prompt.strip()) for prompt in prompts]
            with contextlib.redirect_stderr(terminal):
                found = answered([{"model": model_name, "messages": given, **law} for given in messages])
            return {"completions_all": list(map(completion, found))}

        annotated = alpaca_eval.evaluate(
            model_outputs=outputs(rows, instructions, answers, "system"),
            reference_outputs=outputs(rows, instructions, references, "reference"),
            annotators_config=annotator(Path(folder), template, model, constants, utils),
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
        given = row["preference_raw_completion"]
        judgements[index] = (
            {"failed": given["failed"]} if "failed" in given else judged(row["preference"], given)
        )
    return judgements


def outputs(
    rows: Sequence[int], instructions: Sequence[str], texts: Sequence[str], generator: str
) -> list[dict[str, str]]:
    """Rows in AlpacaEval's format."""
    return [{"instruction": instructions[row], "output": texts[row], "generator": generator} for row in rows]


def annotator(folder: Path, template: str | None, model: str, constants, utils) -> Path:
    """Writes the package's annotator with another model, and another prompt where one is given."""
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


def completion(found: dict[str, float] | RequestFailed) -> dict[str, Any]:
    """An answer as the package's reader takes it; of a request that failed a tie, which `failed` marks: the
    package would drop the row.
    """
    failed = {"failed": str(found)} if isinstance(found, RequestFailed) else {}
    logprobs = {"m": 0.0, "M": 0.0} if failed else found
    candidates = [{"token": token, "logprob": logprob} for token, logprob in logprobs.items()]
    return {"logprobs": {"content": [{"top_logprobs": candidates}]}, **failed}


def judged(preference: float, given: dict[str, Any]) -> dict[str, float]:
    """A judgement; AlpacaEval's preferences go from 1, the reference's, to 2."""
    p = {item["token"]: math.exp(item["logprob"]) for item in given["logprobs"]["content"][0]["top_logprobs"]}
    return {"preference": preference - 1, "first": p.get("m", 0.0) / sum(p.values())}
