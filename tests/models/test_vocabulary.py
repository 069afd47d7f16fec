"""Which ids can be drawn: beyond len(tokenizer), not those without a token, not those without a row."""

import pytest
import torch
from pairs import CASES, SEED
from tiny import byte_tokenizer, gapped_tokenizer, save_model_folder, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.decoding.rows import eos_token_ids
from ram.errors import UserError
from ram.models import checkpoints
from ram.models.vocabulary import MOST_IDS, Vocabulary, check_ids, id_range, read_config, rows_in, vocabulary

GAP = range(4, 14)  # ids that name no token


def test_the_range_ends_behind_the_highest_id():
    tokenizer = gapped_tokenizer()
    assert len(tokenizer) == 5 and id_range(tokenizer) == 15
    assert vocabulary(tokenizer, tiny_model(20, 0)) == Vocabulary(15, tuple(GAP))
    assert vocabulary(tokenizer, tiny_model(20, 0), None, tiny_model(12, 0)) == Vocabulary(
        12, tuple(range(4, 12))
    )
    assert vocabulary(tiny_tokenizer()) == Vocabulary(5)
    with pytest.raises(UserError, match="has the id 16,777,216: expected ids below"):
        id_range(gapped_tokenizer(MOST_IDS))  # a table of the ids up to 10^9 takes gigabytes


@pytest.mark.parametrize("case", CASES)
def test_eos_beyond_the_count_is_drawn_and_unused_ids_are_not(case):
    """In every mode, and in the plain loop as in the engine."""
    (has_proposal, has_aligner), params, _ = CASES[case]
    tokenizer = gapped_tokenizer()
    proposal, aligner = tiny_model(16, 3, extra_rows=2), tiny_model(16, 5)
    for model in (proposal, aligner):
        with torch.no_grad():  # the unused ids would be drawn always, EOS often
            model.lm_head.weight[4:14] *= 20
    pair = proposal if has_proposal else None, aligner if has_aligner else None
    settings = {"max_new_tokens": 24, "seed": SEED}
    prompts = [[0, 1], [2], [3, 3, 1], [1], [0], [2, 2]]
    fast, slow = (
        generation.generate(*pair, tokenizer, prompts, params, speculative=speculative, **settings)
        for speculative in (True, False)
    )
    assert [answer.token_ids for answer in fast] == [answer.token_ids for answer in slow]
    drawn = {token for answer in fast for token in answer.token_ids}
    assert drawn <= {0, 1, 2, 3, 14} and 14 in drawn
    assert all(answer.finish_reason == "stop" for answer in fast if 14 in answer.token_ids)


def test_ids_beyond_the_rows_are_refused_only_in_use():
    """A tokenizer may know more tokens than a model has rows, as long as EOS and prompts do without them."""
    params, tokenizer = PARParams(), tiny_tokenizer("abcdef")  # EOS 6, PAD 7
    model = tiny_model(7, 0)
    assert generation.generate(model, None, tokenizer, [[0, 5]], params, max_new_tokens=2)
    with pytest.raises(
        ValueError, match="the proposal has 7 vocabulary rows, but a prompt has the token id 7"
    ):
        generation.generate(model, None, tokenizer, [[0, 7]], params, max_new_tokens=2)
    with pytest.raises(ValueError, match="the proposal has 6 vocabulary rows, but EOS has the token id 6"):
        generation.generate(tiny_model(6, 0), None, tokenizer, [[0]], params, max_new_tokens=2)
    check_ids([3, 4], None, "x", "y")


def renamed_eos(tokenizer, name):
    """A tokenizer of the same vocabulary whose EOS is another token."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=name)


def test_a_pair_may_end_with_either_eos(tmp_path):
    """Base and instruct models share a vocabulary and differ in EOS: both end an answer."""
    base, size = byte_tokenizer(), len(byte_tokenizer())
    instruct = renamed_eos(base, "<s>")
    folders = [
        save_model_folder(tmp_path / name, tiny_model(size, seed), tokenizer)
        for seed, (name, tokenizer) in enumerate({"base": base, "instruct": instruct}.items())
    ]
    tokenizer, _ = checkpoints.load_pair(*folders)
    loaded = [checkpoints.load_model(folder) for folder in folders]
    assert {base.eos_token_id, instruct.eos_token_id} <= set(eos_token_ids(tokenizer, *loaded))


def test_a_pair_may_differ_in_a_token_that_nobody_can_use(tmp_path):
    base, more = byte_tokenizer(), byte_tokenizer()
    size = len(base)
    more.add_tokens(["<unusable>"])
    folders = [
        save_model_folder(tmp_path / str(index), tiny_model(size, index), tokenizer)
        for index, tokenizer in enumerate((base, more))
    ]
    checkpoints.load_pair(*folders)
    other = save_model_folder(tmp_path / "other", tiny_model(size, 3), tiny_tokenizer())
    with pytest.raises(UserError, match="a pair needs one vocabulary"):
        checkpoints.load_pair(folders[0], other)


def test_sizes_in_files_are_bounded(tmp_path):
    """An absurd number is refused in a line before anything is allocated."""
    path = tmp_path / "config.json"
    for text in (
        '{"vocab_size": 1e400}',
        '{"num_hidden_layers": 100000000}',
        f'{{"vocab_size": {MOST_IDS + 1}}}',
    ):
        path.write_text(text)
        if "e400" in text:
            assert rows_in(str(tmp_path)) is None
            continue
        with pytest.raises(UserError, match="is no size of a model: expected at most"):
            read_config(path)
    path.write_text('{"text_config": {"vocab_size": 77}}')
    assert rows_in(str(tmp_path)) == 77 and rows_in(None) is None
