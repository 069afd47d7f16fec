"""The last lines of an evaluation: the command that serves its pair."""

from ram.evaluation.closing import serve_arguments


def test_pair_is_served_as_it_was_evaluated():
    """Keys that decide models or decoding stay, with quotes for a shell; those of the evaluation alone go."""
    overrides = [
        "experiment=demo",
        "seed=1",
        "+sampling.seed=2",
        "evaluation.systems={'proposal+aligner[par]': {temperature: 0.5}}",
        "evaluation.tasks={facts: {temperature: 0.4}}",
        "evaluation.bootstrap=9",
        "ablation=temperature",
        "judge=exact",
    ]
    assert serve_arguments("demo", overrides) == (
        "experiment=demo seed=1 sampling.seed=2 "
        "'evaluation.systems={'\"'\"'proposal+aligner[par]'\"'\"': {temperature: 0.5}}' "
        "'evaluation.tasks={facts: {temperature: 0.4}}'"
    )
