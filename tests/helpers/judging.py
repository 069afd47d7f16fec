"""A judge's server whose preferences follow a known rule, and rows for it to judge."""

import math
import re

from ram.storage.files import fingerprint

ROWS = [{"instruction": f"say {i}"} for i in range(60)]
ANSWERS = [f"answer {i}" for i in range(60)]
REFERENCES = [f"reference {i}" for i in range(60)]
PRICES = {"input_price": 1e4, "output_price": 2e4}  # per million: 1.02 for each of the server's answers


def score(text):
    """Return the quality of a text by the rule."""
    return int(fingerprint(text)[:4], 16) / 2**15


def share(second, first):
    """Return the rule's P(second is better)."""
    return 1 / (1 + math.exp(score(first) - score(second)))


class Rule:
    """Answers like a chat model, with the log-probabilities of m and M that `share` gives.

    It reads the prompts of `endpoint` and of AlpacaEval. `fault` maps the number of a request to (status,
    body) or None; `bias` is subtracted from P(M), relative to it.
    """

    def __init__(self):
        self.asked, self.bodies = [], []
        self.fault = lambda n: None
        self.bias, self.logprobs = 0.0, True
        self.usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}

    def __call__(self, handler, body):
        text = body["messages"][-1]["content"]
        shown = r'(?s)<output id="[mM]">\n(.*?)\n</output>|"output": """(.*?)"""'
        first, second = ("".join(match) for match in re.findall(shown, text))
        self.asked.append((first, second))
        self.bodies.append(body)
        if (fault := self.fault(len(self.asked))) is not None:
            return handler.reply(*fault)
        p = share(second, first) * (1 - self.bias)
        best = "M" if p > 0.5 else "m"
        candidates = [{"token": "M", "logprob": math.log(p)}, {"token": "m", "logprob": math.log(1 - p)}]
        candidates.append({"token": "The", "logprob": -9.0})
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": best}}
        if self.logprobs:
            choice["logprobs"] = {"content": [{"token": best, "logprob": 0.0, "top_logprobs": candidates}]}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return handler.reply(200, answer | {"choices": [choice], "usage": self.usage})
