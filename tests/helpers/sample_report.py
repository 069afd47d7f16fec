"""A report to draw in tests: every kind of answer and judgement, and strings that try to be more."""

import math

SYSTEMS = ("ours: large + small", "ours: tight threshold", "large, sft")
# What a model, a data file or a configuration may hold, each meant to break out of another place.
HOSTILE = [
    """<script>window.hacked=1</script> & 'quoted' " onmouseover="hacked()""",
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=1</script><!--",
    "<!--<script>",
    "]]>`${window.hacked=1}`{{7*7}}<%= 7 %>",
    '"},"rows":[],"__proto__":{"hacked":1}',
    "\u2028window.hacked=1\u2029",
    "nul \0 bell \x07 escape \x1b[31m delete \x7f c1 \x9b",
    "half \ud83d pair",
    "\u202egnp.exe \u2066 right to left: \u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0633\u0644\u0627\u0645",
    "javascript:window.hacked=1//",
    "__proto__",
]
BOARD = [
    {
        "system": SYSTEMS[0],
        "n": 1210,
        "failed": 0,
        "judge": "exact",
        "reference": "output",
        "win_rate": 0.7312,
        "win_rate_low": 0.7061,
        "win_rate_high": 0.7554,
        "length_controlled": 0.701,
        "both": 0.642,
        "both_low": 0.615,
        "both_high": 0.669,
        "correct": 0.801,
        "aligned": 0.799,
        "average_length": 34.2,
        "changed_fraction": 0.2,
        "fallback_fraction": 0.183,
        "mean_kl": 0.0721,
        "acceptance": 0.655,
    },
    {
        "system": SYSTEMS[1],
        "n": 1210,
        "failed": 0,
        "judge": "exact",
        "reference": "output",
        "win_rate": 0.5,
        "win_rate_low": 0.47,
        "win_rate_high": 0.53,
        "length_controlled": 0.5,
        "both": None,
        "average_length": 30.0,
        "changed_fraction": 0.1,
        "fallback_fraction": 0.783,
        "mean_kl": 0.4,
        "acceptance": math.nan,
    },
    {
        "system": SYSTEMS[2],
        "n": 1210,
        "failed": 0,
        "judge": "exact",
        "reference": "output",
        "average_length": 27.9,
        "win_rate": 0.45,
        "win_rate_low": 0.42,
        "win_rate_high": 0.48,
        "length_controlled": 0.44,
    },
]


def record(split, examples, loss, target="", sampled=""):
    values = {"loss": loss, "target_logp_per_token": target, "sampled_logp_per_token": sampled}
    return {"split": split, "examples": str(examples), **values}


def make_curves():
    """As csv.DictReader gives them: a long stage without samples, one with both terms, and broken values."""
    sft = [record("train", 64 * i, f"{30 / (1 + i):.6g}", "-1.5") for i in range(1, 1001)]
    sft[3]["loss"], sft[5]["loss"], sft[7]["examples"] = "nan", "inf", ""
    sft += [record("heldout", x, loss) for x, loss in ((0, "35.879001"), (32000, "3.7038621"), (64000, ""))]
    ours = [record("train", 32 * i, 10 - i / 20, -1.3 + i / 200, -0.9 - i / 100) for i in range(1, 60)]
    ours += [record("heldout", x, 10.2, -1.365, s) for x, s in ((0, -1.131), (1888, math.nan), (1888, -1.5))]
    lone = [record("heldout", 0, "0"), {"split": "train"}]
    return {
        "sft large": sft,
        "ours small": ours,
        "lone": lone,
        "empty": [],
        "dead": [record("train", 1, "nan")],
    }


def single(text, **judged):
    return {
        "judged": judged or {"preference": 0.5},
        "length": len(text),
        "n": len(text.split()),
        "text": text,
    }


def paired(tokens, codes, detailed=False, **judged):
    """A pair's answer; its last token ended it."""
    answer = {"judged": judged or {"preference": 0.5}, "length": len("".join(tokens[:-1])), "n": len(tokens)}
    share = codes.count("f") / len(codes)
    answer["stats"] = {"fallback": share, "kl": 0.25 + share, "acceptance": 1 - share}
    answer["events"] = {code: codes.count(code) for code in "acf"}
    answer["tail"] = len(tokens[-1])
    if not detailed:
        return answer | {"runs": [[code, token] for code, token in zip(codes, tokens, strict=True)]}
    candidates = [[[token, 0.25, 0.75, 0.6], ["other", 0.5, 0.0001, 0]] for token in tokens]
    steps = [1.25, "outside", -0.3, *[0.0] * len(tokens)][: len(tokens)]
    answer |= {"tokens": tokens, "codes": codes, "influence": steps, "kl": [0.5] * len(tokens)}
    return answer | {"candidates": candidates}


def make_report(rows=3, **given):
    """A report of three systems: a pair with figures in its first row, a pair without, a model alone."""
    found = []
    for i in range(rows):
        tokens, codes = ["The", " colour", " is", "\n", f" teal{i}", ".", "</s>"], "acfcaaa"
        found.append(
            {
                "id": 2 * i,
                "prompt": f"What is the colour of Bado {i}?",
                "reference": f"Olive {i}.",
                "answers": [
                    paired(tokens, codes, i == 0, preference=1.0, correct=True, aligned=True, both=True),
                    paired(tokens, "a" * 7, preference=0.0, correct=True, aligned=False, both=False),
                    single(f"Just  teal {i}.", **({"failed": "HTTP 500"} if i == 1 else {"preference": 0.5})),
                ],
            }
        )
    systems = [
        {
            "name": name,
            "folder": f"a/b#{i}",
            "judgements": f"a/b#{i}/judged.jsonl",
            "pair": i < 2,
            "note": None,
        }
        for i, name in enumerate(SYSTEMS)
    ]
    report = {
        "title": "RAM demo",
        "notes": ["Ran the demo.", "warning: 3 rows skipped"],
        "board": BOARD,
        "curves": make_curves(),
        "reference": "output",
        "systems": systems,
        "rows": found,
    }
    return report | given


def make_about(texts):
    """The opening of a report, with each text in every role."""
    keys = ("name", "what", "proposal", "aligner", "mode", "temperatures", "alpha", "command")
    return {
        "lead": texts[0],
        "facts": [[text, text] for text in texts],
        "systems": [dict.fromkeys(keys, text) for text in texts],
        "links": [[texts[-1], "leaderboard.csv"]],
    }


def make_hostile():
    """Every string of a report is hostile, each of HOSTILE somewhere in every role."""
    report = make_report(len(HOSTILE))
    for text, row in zip(HOSTILE, report["rows"], strict=True):
        pair, gated, alone = row["answers"]
        row |= {"prompt": text, "reference": text}
        # Keys of a judgement too: they come from a judge's own fields.
        pair["judged"] = {"preference": 1.0, "style": text, text: text}
        alone["judged"] = {"failed": text}
        alone["text"] = text
        gated["runs"] = [["f", text], ["c", text]]
        tokens = [text, f" {text}", "\n"]
        pair |= paired(tokens, "acf", True) | {"judged": pair["judged"]}
        for place in range(3):
            pair["candidates"][place] = [[text, 0.5, 0.25, 0.5], [f"{text}.", 0.1, 0.1, 0.1]]
    row = dict.fromkeys(BOARD[0], HOSTILE[0]) | {"win_rate": 0.5, "fallback_fraction": 0.9}
    names = HOSTILE[:3]
    for name, system in zip(names, report["systems"], strict=True):
        system |= {"name": name, "folder": name, "judgements": f"{name}/x.jsonl", "note": name}
    records = [
        record("train", 1, 2.0, -1.0, -1.0),
        record("heldout", 1, HOSTILE[0]),
        record(HOSTILE[0], 1, 1.0),
    ]
    return report | {
        "about": make_about(HOSTILE),
        "title": HOSTILE[0],
        "notes": [*HOSTILE, f"warning: {HOSTILE[0]}"],
        "board": [row | {"system": name} for name in names],
        "curves": dict.fromkeys(HOSTILE, records),
        "reference": HOSTILE[1],
    }
