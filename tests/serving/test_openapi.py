"""The OpenAPI document: it is complete, and what schemathesis makes of it finds no fault in the server."""

import httpx
import pytest
from served import running, save_models


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAM_ADMIN_KEY", "admin")
        with running(folder, "max_new_tokens=4") as found:
            yield found


def test_document(server):
    """Every endpoint with its body and its answers; failures have one shape."""
    document = httpx.get(f"{server[1]}/openapi.json").json()
    assert set(document["paths"]) == {
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/chat/completions",
        "/v1/completions",
        "/admin/aligners",
        "/admin/aligners/{name}",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    (kind,) = chat["requestBody"]["content"]
    assert kind == "application/json" and chat["requestBody"]["required"]
    assert set(chat["responses"]) == {"200", "4XX", "5XX"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    schemas = document["components"]["schemas"]
    assert set(schemas["ChatRequest"]["required"]) == {"model", "messages"}
    assert schemas["ErrorBody"]["properties"]["error"]["$ref"].endswith("/Problem")


@pytest.mark.slow
def test_schemathesis(server):
    """Generated requests, right and wrong, get the answers that the document states, and never a 500."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_url(f"{server[1]}/openapi.json")
    excluded = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.ignored_auth]
    checked = [0]
    for operation in schema.get_all_operations():
        operation = operation.ok()
        strategies = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @hypothesis.given(case=hypothesis.strategies.one_of(strategies))
        @hypothesis.settings(
            max_examples=150,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def holds(case):
            body = case.body
            name = body.get("model") if isinstance(body, dict) else None
            if isinstance(name, str) and 0 < len(name) <= 256:
                body["model"] = "a"  # or every request would ask for a model that is not there
            headers = {"Authorization": "Bearer admin"} if case.path.startswith("/admin") else {}
            answer = case.call(headers=headers)
            # A schema says nothing of a prompt's length, or whose turn is the last: 400 may be right.
            case.validate_response(answer, excluded_checks=excluded)
            checked[0] += 1

        holds()
    assert checked[0] > 300
    assert httpx.get(f"{server[1]}/health").status_code == 200
