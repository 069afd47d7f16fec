"""Laws on the columns with the largest logits: the answers of whole rows, for a fraction of the bytes."""

import dataclasses

import pytest
import torch
from pairs import BOTH, CASES, PROPOSAL, ragged_prompts, run
from torch.utils._python_dispatch import TorchDispatchMode

from ram.decoding import columns, frames
from ram.decoding.par import ALL, Noise, PARParams
from ram.decoding.scheduler import Role

ALONE = dataclasses.replace(CASES["proposal_alone"][1], base_repetition_penalty=1.0)
REDUCED = {name: CASES[name][:2] for name in ("par", "par_kl", "par_kl_reverse", "product", "snis")}
REDUCED |= {
    "alone": (PROPOSAL, ALONE),
    "argmax": (BOTH, dataclasses.replace(CASES["par"][1], base_temperature=0.0)),
    "temperature 0": (BOTH, dataclasses.replace(CASES["product"][1], temperature=0.0)),
}


@pytest.fixture
def found(monkeypatch):
    """Columns are used on the CPU; lists the tokens that were drawn from them."""
    tokens, real = [], columns.draw_laws

    def record(*args):
        report = real(*args)
        tokens.extend([] if report is None else report["token"].tolist())
        return report

    monkeypatch.setattr(columns, "draw_laws", record)
    monkeypatch.setattr(columns, "COUNTS", {"cpu": (5, 10)})
    return tokens


@pytest.mark.parametrize("case", REDUCED)
@pytest.mark.parametrize("loop", [{"batch_size": 5}, {"draft_tokens": 3, "batch_size": 6}])
def test_columns_give_the_answers_of_whole_rows(case, loop, found, monkeypatch):
    """A nucleus beyond the columns costs a round, and no law differs."""
    roles, params = REDUCED[case]
    answers = run(roles, params, ragged_prompts(), **loop)
    assert any(token >= 0 for token in found)
    assert (columns.UNCOVERED in found) == (case != "argmax")
    monkeypatch.setattr(columns, "COUNTS", {})
    expected = run(roles, params, ragged_prompts(), **loop)
    for a, b in zip(answers, expected, strict=True):
        for name in ("token_ids", "text", "finish_reason", "events"):
            assert getattr(a, name) == getattr(b, name)
        assert a.stats["mean_kl"] == pytest.approx(b.stats["mean_kl"])


@pytest.mark.parametrize("case", ["par_kl_aligner", "mds", "mixture", "eos_priority", "proposal_alone"])
def test_laws_of_the_whole_vocabulary_are_not_cut(case, found):
    """A law that has no nucleus, or ranks by something else, is computed from whole rows."""
    roles, params, _ = CASES[case]
    run(roles, params, ragged_prompts()[:3], batch_size=3)
    assert not found


class Bytes(TorchDispatchMode):
    """Counts the bytes that kernels read and write; views are free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            results = result if isinstance(result, tuple | list) else [result]
            tensors = [value for value in [*args, *results] if isinstance(value, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def test_laws_and_noise_of_a_round_cost_a_fifth_of_whole_rows(monkeypatch):
    """16 rows, 4 positions, 128k tokens: counted on tensors without data, which take the path of a GPU."""
    rows, width, vocab, costs = 16, 4, 128_000, {}
    params = PARParams("par", temperature=0.8, top_p=0.9, repetition_penalty=1.0)
    role = Role(None, None, "verifier", "drafter")
    for name, counts in (("whole", {}), ("columns", {"meta": (1024, 64_000)})):
        monkeypatch.setattr(columns, "COUNTS", counts)
        at = [torch.zeros(rows, width, dtype=torch.int64, device="meta") for _ in range(3)]
        drafted, verified = (torch.zeros(n, vocab, device="meta") for n in (rows, rows * width))
        with Bytes() as counter:
            noise = Noise(*at, vocab)
            for column in range(width):
                own = columns.draw_draft(drafted, params, None, noise, ALL, column)
                if own is None:
                    noise.draw(frames.draft_law(drafted, role, params, None, ()), ALL, column)
            report = columns.draw_laws(verified, verified, params, None, noise, ALL)
            if report is None:
                frames.draw_laws(verified, verified, params, None, (), noise, ALL)
        costs[name] = counter.bytes
    assert costs["whole"] >= 5 * costs["columns"]
