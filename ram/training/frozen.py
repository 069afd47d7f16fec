"""The frozen proposal of `loss=ratio`: the logits that are added to the aligner's at each target token.

    proposal -> last hidden state at each target's position (now, or once and then read from a mapped file)
             -> its own head, tile by tile -> logits, exactly

The head makes the whole distribution from a hidden state, so nothing is approximated: a cache of the most
likely tokens would miss those that the aligner moves probability to.

Shapes: B examples, N target tokens, H hidden width of the proposal, V vocabulary.
"""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ram.data.tokenization import TokenizedDataset
from ram.errors import UserError
from ram.log import log, progress
from ram.models import checkpoints
from ram.models.vocabulary import vocabulary
from ram.storage.files import fingerprint, replacing, write_json
from ram.training import budget
from ram.training.logps import Answers, has_linear_head
from ram.training.losses import IGNORE_INDEX
from ram.training.packing import collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1  # increase it if the states of unchanged inputs change
TOKENS = 8192  # of a forward pass, padding included
BITS = {2: np.int16, 4: np.int32, 8: np.int64}  # numpy has no bfloat16: files hold the bits


class Added(NamedTuple):
    """Logits hidden @ weight.T + bias of N tokens, before they are computed; they have no gradient."""

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)


class FrozenProposal:
    """A proposal that runs along with the training.

    Args:
        model: the proposal.
        vocab_size: logits beyond it are cut off.
        pad_id: any token.
        exponent: the aligner's logits are multiplied by it before the sum, its probabilities raised to it.

    Raises:
        UserError: the logits are not a linear function of the last hidden state.
    """

    def __init__(self, model: "PreTrainedModel", vocab_size: int, pad_id: int, exponent: float = 1.0) -> None:
        if not has_linear_head(model) or not _is_linear(model):
            raise UserError(
                f"loss=ratio: the logits of {type(model).__name__} are not a linear function of its last "
                "hidden state; expected a proposal without soft-capped or scaled logits"
            )
        head = model.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        self.model: Any = model.eval().requires_grad_(False)
        self.vocab_size, self.pad_id, self.exponent = vocab_size, pad_id, exponent
        self.weight = head.weight.detach()[:vocab_size]
        self.bias = None if head.bias is None else head.bias.detach()[:vocab_size]

    def to(self, device: torch.device) -> "FrozenProposal":
        self.model = self.model.to(device)
        head = self.model.get_output_embeddings()
        self.weight = head.weight.detach()[: self.vocab_size]
        self.bias = None if head.bias is None else head.bias.detach()[: self.vocab_size]
        return self

    def added(self, data: TokenizedDataset, rows: Sequence[int] | np.ndarray) -> Added:
        """Return the hidden states and the head of the proposal's logits at some examples' targets."""
        return Added(self.hidden(data, rows), self.weight, self.bias)

    def add_to(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        data: TokenizedDataset,
        rows: Sequence[int] | np.ndarray,
    ) -> torch.Tensor:
        """Return exponent * logits (B, T, V), plus the proposal's wherever a label (B, T) is predicted."""
        hidden, weight, bias = self.added(data, rows)
        own = logits[..., : self.vocab_size]
        whole = torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))
        whole[:, :-1][labels[:, 1:] != IGNORE_INDEX] = F.linear(hidden, weight, bias).to(whole.dtype)
        return own * self.exponent + whole

    @torch.no_grad()
    def hidden(self, data: TokenizedDataset, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return the last hidden state that predicts each target token (N, H).

        Rows of very uneven lengths take several forward passes, which bounds the memory of the padding.
        """
        rows = np.asarray(rows)
        by_row: dict[int, torch.Tensor] = {}
        for some in _passes(data, rows):
            sizes = [len(data.part("target", row)) - (len(data.part("prompt", row)) == 0) for row in some]
            by_row |= zip(some, self._hidden(data, some).split(sizes), strict=True)
        return torch.cat([by_row[row] for row in rows.tolist()])

    def _hidden(self, data: TokenizedDataset, rows: Sequence[int]) -> torch.Tensor:
        """Return `hidden` from one forward pass."""
        batch = collate(data, rows, "target", self.pad_id)
        mask = batch.pop("labels")[:, 1:] != IGNORE_INDEX
        device = self.weight.device
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        # Its own type, whatever the aligner trains in: the result must not depend on when it is computed.
        with torch.autocast(device.type, enabled=False):
            states = self.model.base_model(**batch, use_cache=False).last_hidden_state
        return states[:, :-1][mask.to(device)]


class CachedProposal(FrozenProposal):
    """A proposal of which only the head stays in memory; its hidden states are read from files.

    Args:
        model: the proposal; it may be deleted afterwards.
        vocab_size: logits beyond it are cut off.
        pad_id: any token.
        states: for each data set, the mapped bits (tokens, H) of its targets' hidden states.
        exponent: as above.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        vocab_size: int,
        pad_id: int,
        states: Sequence[tuple[TokenizedDataset, np.ndarray]],
        exponent: float = 1.0,
    ) -> None:
        super().__init__(model, vocab_size, pad_id, exponent)
        self.weight = self.weight.clone()
        self.states = [(data, predicted_offsets(data), bits) for data, bits in states]
        self.model = None

    def to(self, device: torch.device) -> "CachedProposal":
        self.weight = self.weight.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)
        return self

    def hidden(self, data: TokenizedDataset, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        offsets, bits = next((offsets, bits) for known, offsets, bits in self.states if known is data)
        parts = [bits[offsets[row] : offsets[row + 1]] for row in rows]
        return torch.from_numpy(np.concatenate(parts)).view(self.weight.dtype).to(self.weight.device)


def joined(
    forward: Callable[..., Answers], proposal: FrozenProposal | None, device: torch.device
) -> Callable[..., Answers]:
    """Return a forward pass of `logps` that adds the proposal's logits, if there is a proposal."""
    return forward if proposal is None else functools.partial(forward, proposal=proposal.to(device))


def predicted_offsets(data: TokenizedDataset) -> np.ndarray:
    """Return (examples + 1,) where each example's target tokens begin, without those nothing predicts."""
    sizes = np.diff(data.offsets["target"]) - (np.diff(data.offsets["prompt"]) == 0)
    return np.concatenate([[0], np.cumsum(sizes)])


def open_proposal(
    source: str,
    aligner: Any,
    tokenizer: "PreTrainedTokenizerBase",
    data: Mapping[str, TokenizedDataset],
    dtype: str,
    device: torch.device,
    cache_dir: Path | None,
    exponent: float = 1.0,
) -> FrozenProposal:
    """Load the proposal and, with a `cache_dir`, compute the hidden states that no file there has yet.

    Args:
        source: the proposal's folder or hub id.
        aligner: the model to train.
        tokenizer: the aligner's.
        data: the data sets by split.
        dtype: type of the proposal's weights and hidden states.
        device: where the proposal computes.
        cache_dir: folder of the files; None lets the proposal run along.
        exponent: see `FrozenProposal`.
    """
    proposal = checkpoints.load_model(source, dtype, device)
    size = vocabulary(tokenizer, aligner, proposal).size
    running = FrozenProposal(proposal, size, checkpoints.pad_id(tokenizer), exponent)
    if cache_dir is None:
        return running
    weights = checkpoints.weights_fingerprint(source)
    states = []
    for part in data.values():
        made_from = {
            "version": VERSION,
            "proposal": source,
            "weights": weights,
            "dtype": str(proposal.dtype),
            "data": part.key
            or fingerprint([ids.tolist() for ids in (*part.ids.values(), *part.offsets.values())]),
        }
        name = f"proposal.{fingerprint(made_from | {'proposal': None})[:16]}.npy"
        states.append((part, _states_file(cache_dir / name, running, part, made_from)))
    return CachedProposal(proposal, running.vocab_size, running.pad_id, states, exponent)


def _states_file(
    path: Path, proposal: FrozenProposal, data: TokenizedDataset, made_from: dict[str, Any]
) -> np.ndarray:
    """Return the mapped bits of the hidden states, computed first if the file does not exist."""
    if not path.is_file():
        offsets, weight = predicted_offsets(data), proposal.weight
        shape = (int(offsets[-1]), weight.shape[1])
        size = shape[0] * shape[1] * weight.element_size()
        log.info(
            f"caching the proposal's hidden states: {shape[0]:,} tokens of {shape[1]:,} numbers, "
            f"{size / 1e6:,.1f} MB in {path}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise UserError(
                f"{path} needs {size / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free: set "
                "cache_proposal=false, or give an output_dir with more space"
            )
        with replacing(path) as partial:
            bits = BITS[weight.element_size()]
            file = np.lib.format.open_memmap(partial, mode="w+", dtype=bits, shape=shape)
            every = np.arange(len(data))
            for rows in progress(_passes(data, every), desc="hidden states", unit="pass"):
                states = proposal.hidden(data, rows).contiguous().view(getattr(torch, bits.__name__))
                sizes = [int(offsets[row + 1] - offsets[row]) for row in rows]
                for row, part in zip(rows, states.cpu().split(sizes), strict=True):
                    file[offsets[row] : offsets[row + 1]] = part.numpy()
            file.flush()
            del file
        write_json(path.with_suffix(".json"), made_from)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _is_linear(model: Any) -> bool:
    """Return whether a few tokens' logits are those that the head gives; a configuration may not say it."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    hidden, logits = model.base_model(input_ids=ids).last_hidden_state, model(input_ids=ids).logits
    difference = (model.get_output_embeddings()(hidden) - logits).abs().max()
    return bool(difference <= 0.05 * logits.abs().max())


def _passes(data: TokenizedDataset, rows: np.ndarray) -> list[list[int]]:
    """Return the examples of each forward pass: similar lengths, at most TOKENS with padding."""
    (pieces,) = budget.cut_padded(budget.widths(data, rows, ("target",)), TOKENS, n_processes=1)
    return [rows[piece].tolist() for piece in pieces]
