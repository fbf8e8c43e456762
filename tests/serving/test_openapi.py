"""The server answers as its own description says, whatever is sent: schemathesis makes the requests."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from served import service_of, wait_until
from starlette.testclient import TestClient

from jaxldm import serving
from jaxldm.serving.application import application

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance")
CHECKS += ("response_schema_conformance",)


@pytest.fixture(scope="module")
def client(offer, engine):
    service = service_of(engine, serving.Limits(burst=10**6, requests_per_second=10**6))
    with TestClient(application(offer, service)) as client:
        wait_until(lambda: service.ready)
        yield client


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_answers_are_those_that_are_described(client, mode):
    mode = schemathesis.GenerationMode(mode)
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]

    @settings(max_examples=12 if mode.is_positive else 50, suppress_health_check=list(HealthCheck))
    @given(schema.as_strategy(generation_mode=mode))
    def every(case):
        if isinstance(case.body, dict):  # a step each
            case.body = {name: value for name, value in case.body.items() if name != "timeout"}
            if mode.is_positive:
                case.body["num_inference_steps"] = 1
        arguments = case.as_transport_kwargs("http://testserver")
        arguments.pop("cookies", None)
        response = client.request(**arguments)
        case.validate_response(response, checks=checks)

    every()
