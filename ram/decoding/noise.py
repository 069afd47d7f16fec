"""Counter-based Gumbel noise: random numbers that depend only on seed, row, position, stream and token.

SplitMix64's finaliser (Steele, Lea, Flood 2014) over a Weyl sequence, in wrapping int64 arithmetic, which
torch computes alike on every device.
"""

import torch

NEG_INF = float("-inf")
ALL = slice(None)  # all rows, all columns
LARGE_VOCABULARY = 4096  # from this size on, a CPU ranks and draws noise for only as many tokens as needed


def signed(value: int) -> int:
    """Return a seed as an int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX_1, _MIX_2 = (signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix64(x: torch.Tensor) -> torch.Tensor:
    def xor_shift(x: torch.Tensor, bits: int) -> torch.Tensor:  # >> on int64 copies the sign: mask it off
        return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))

    return xor_shift(xor_shift(xor_shift(x, 30) * _MIX_1, 27) * _MIX_2, 31)


def gumbel_noise(
    seed: int | torch.Tensor,
    row_ids: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
    stream: int = 0,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return standard Gumbel noise (..., V) in float64 that depends only on its key.

    Args:
        seed: one for all, or (...) int64.
        row_ids, positions: (...) int64; a position counts generated tokens, so prompt length and padding have
            no influence.
        stream: 0 draws the token; 1..n draw the candidates of snis.
        tokens: (..., S) ids; if set, only their noise is returned: (..., S).
    """
    if tokens is None:
        tokens = torch.arange(vocab_size, device=row_ids.device, dtype=torch.int64)
    return _noise_of(_key(seed, row_ids, positions, stream), tokens)


def _key(
    seed: int | torch.Tensor, row_ids: torch.Tensor, positions: torch.Tensor, stream: int
) -> torch.Tensor:
    key = seed if isinstance(seed, torch.Tensor) else torch.full_like(row_ids, signed(seed))
    for part in (row_ids, positions, torch.full_like(row_ids, stream)):
        key = _mix64(key + _GOLDEN) ^ _mix64(part * _GOLDEN + _MIX_1)
    return key


def _noise_of(key: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise (..., S) of tokens (..., S) from keys (...)."""
    bits = _mix64(_mix64(key.unsqueeze(-1) + (tokens + 1) * _GOLDEN))
    # 53 bits in [1, 2^53 - 1]: u is neither 0 nor 1, so the noise is finite. float32 would round some u to 1.
    uniform = ((bits >> 11) & ((1 << 53) - 1)).clamp(min=1).double() * 2.0**-53
    return -torch.log(-torch.log(uniform))


def gumbel_argmax(logprobs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw one token per row (...) from `logprobs` (..., V) with `noise` (..., V): the Gumbel-max rule."""
    return (logprobs.double() + noise).argmax(dim=-1)


class Noise:
    """The Gumbel noise of positions (R, W), for draws as by `gumbel_argmax`.

    It is computed once, when it is needed; or, on a CPU with a large vocabulary, only for the tokens in a
    law's support.
    """

    def __init__(
        self,
        seed: int | torch.Tensor,
        row_ids: torch.Tensor,
        positions: torch.Tensor,
        vocab_size: int,
        stream: int = 0,
    ) -> None:
        if not isinstance(seed, torch.Tensor):
            seed = torch.full_like(row_ids, signed(seed))
        self.keys, self.vocab_size = (seed, row_ids, positions), vocab_size
        self.sparse = row_ids.device.type == "cpu" and vocab_size >= LARGE_VOCABULARY
        self.key = _key(seed, row_ids, positions, stream)
        self.whole: torch.Tensor | None = None

    def draw(
        self, logprobs: torch.Tensor, rows: torch.Tensor | slice = ALL, columns: int | slice = ALL
    ) -> torch.Tensor:
        """Draw one token per law (N,) from laws (N, V) at these rows and columns; NaN counts as support."""
        support = int((logprobs != NEG_INF).sum(dim=-1).max()) if self.sparse else self.vocab_size
        if 4 * support <= self.vocab_size:
            ranked, tokens = torch.topk(logprobs, support, dim=-1)
            noise = self.at(tokens, rows, columns)
            return tokens.gather(-1, gumbel_argmax(ranked, noise).unsqueeze(-1)).squeeze(-1)
        if self.whole is None:
            tokens = torch.arange(self.vocab_size, device=self.key.device, dtype=torch.int64)
            self.whole = _noise_of(self.key, tokens)
        whole = self.whole if rows is ALL else self.whole[rows]
        whole = whole.flatten(0, 1) if columns is ALL else whole[:, columns]
        return gumbel_argmax(logprobs, whole)

    def at(
        self, tokens: torch.Tensor, rows: torch.Tensor | slice = ALL, columns: int | slice = ALL
    ) -> torch.Tensor:
        """Return the noise (N, S) of some tokens (N, S) alone."""
        return _noise_of(self.key[rows, columns].flatten(), tokens)

    def stream_of(self, stream: int, rows: torch.Tensor | slice = ALL) -> "Noise":
        """Return another stream's noise at some rows."""
        seed, row_ids, positions = (key[rows] for key in self.keys)
        return Noise(seed, row_ids, positions, self.vocab_size, stream)
