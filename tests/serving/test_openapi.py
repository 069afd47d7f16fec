"""The OpenAPI document is complete, and requests that schemathesis generates from it find no fault."""

import httpx
import pytest
from served import running, save_models


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAM_ADMIN_KEY", "admin")
        with running(folder, "max_new_tokens=4") as models_and_url:
            yield models_and_url


def test_document_describes_every_endpoint(server):
    """It has each endpoint's body and answers; all errors have one shape."""
    document = httpx.get(f"{server[1]}/openapi.json").json()
    assert set(document["paths"]) == {
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
        "/influence",
        "/admin/aligners",
        "/admin/aligners/{name}",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    (media_type,) = chat["requestBody"]["content"]
    assert media_type == "application/json" and chat["requestBody"]["required"]
    assert set(chat["responses"]) == {"200", "4XX", "5XX"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    schemas = document["components"]["schemas"]
    assert set(schemas["ChatRequest"]["required"]) == {"model", "messages"}
    assert schemas["ErrorBody"]["properties"]["error"]["$ref"].endswith("/Problem")


@pytest.mark.slow
def test_generated_requests_get_documented_answers(server):
    """This holds for valid and invalid requests; no answer is a 500."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_url(f"{server[1]}/openapi.json")
    excluded = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.ignored_auth]
    n_checked = 0
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
        def check(case):
            nonlocal n_checked
            body = case.body
            name = body.get("model") if isinstance(body, dict) else None
            if isinstance(name, str) and 0 < len(name) <= 256:
                body["model"] = "a"  # otherwise every request would name an unknown model
            headers = {"Authorization": "Bearer admin"} if case.path.startswith("/admin") else {}
            answer = case.call(headers=headers)
            # The schema limits neither a prompt's length nor the order of turns, so 400 can be correct.
            case.validate_response(answer, excluded_checks=excluded)
            n_checked += 1

        check()
    assert n_checked > 300
    assert httpx.get(f"{server[1]}/health").status_code == 200
