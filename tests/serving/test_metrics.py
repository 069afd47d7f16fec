"""Health and metrics of the server."""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import ask, get, running

CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1}


def samples(url):
    """The metrics of a server: (name, labels) -> value."""
    answer = get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("stream", [True, False])
def test_answers_are_counted_and_timed(folder, stream):
    """Requests, tokens and the three latency histograms; the engine's figures keep their names."""
    with running(folder) as (_, url):
        for name in ("a", "proposal"):
            assert ask(url, CHAT | {"model": name, "stream": stream}).status_code == 200
        metrics = samples(url)
    path = "/v1/chat/completions"
    assert metrics["ram_http_requests_total", path, "200"] == 2
    assert metrics["ram_http_request_seconds_count", path] == 2
    assert metrics["ram_requests_total",] == 2 and metrics["ram_by_aligner_total", "a"] == 1
    assert metrics["ram_completion_tokens_total",] > 0 and metrics["ram_rows",] == 0
    assert metrics["ram_bytes", "aligner b", "weights"] > 0
    assert metrics["ram_first_token_seconds_count",] == metrics["ram_queue_length_count",] == 2
    assert 0 < metrics["ram_first_token_seconds_sum",] < metrics["ram_http_request_seconds_sum", path]
    assert metrics["ram_http_running",] == 1 and metrics["process_resident_memory_bytes",] > 0
    assert not any(name.endswith("_created") for name, *_ in metrics)


def test_health_reports_a_stopped_engine(folder):
    with running(folder) as (models, url):
        models.engine.close(wait=False)
        assert get(f"{url}/health").status_code == 503
        answer = ask(url, CHAT)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
