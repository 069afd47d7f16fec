"""A file like AlpacaEval's df_gamed.csv, with a known effect of length."""

import numpy as np

from ram.evaluation import length_control

N = length_control.QUESTIONS


def even(count, step):
    """Return numbers spread evenly over (0, 1), the same on every machine."""
    return (np.arange(1, count + 1) * step) % 1.0


def normal(count, step):
    """Return about standard normal numbers: the sum of four even spreads."""
    return sum(even(count, step * factor) - 0.5 for factor in (1, 1.7320508, 2.2360680, 2.6457513)) * 3**0.5


def write_gamed(path, difficulty, effect=-1.0):
    """Write two baselines whose preference depends on the length alone."""
    lines = ["index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for name, shift in (("brief", 1.2), ("verbose", -1.0)):
        length = shift + normal(N, 0.7548777 + shift / 100)
        p = length_control.sigmoid(effect * np.tanh(length))
        for i in range(N):
            lines.append(f"{i},{name},{float(p[i])!r},{float(length[i])!r},{float(difficulty[i])!r},False")
    path.write_text("\n".join(lines) + "\n")
    return path
