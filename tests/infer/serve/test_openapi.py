"""The OpenAPI description is true: what it generates is answered as it says, never with a bug."""

import pytest
from hypothesis import HealthCheck, given, settings

from infer.serve.security import Access
from tests.support.serve import serving

schemathesis = pytest.importorskip("schemathesis")
BODIES = (
    "POST /", "POST /detokenize", "POST /tokenize", "POST /v1/chat/completions",
    "POST /v1/completions",
)  # fmt: skip
ROUTES = (
    *BODIES, "GET /health", "GET /metrics", "GET /tokenizer_info", "GET /v1/models",
    "GET /v1/models/{name}",
)  # fmt: skip
CASES = [(route, "positive") for route in ROUTES]
CASES += [(route, "negative") for route in (*BODIES, "GET /health")]  # others take nothing


@pytest.fixture(scope="module")
def operations():
    with serving("ok", access=Access(loopback=False)) as served:
        schema = schemathesis.openapi.from_asgi("/openapi.json", served.app)
        yield {found.ok().label: found.ok() for found in schema.get_all_operations()}


def test_every_route_is_described(operations):
    assert sorted(operations) == sorted(ROUTES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("route", "mode"), CASES)
def test_every_answer_is_described(operations, route, mode):
    mode = schemathesis.GenerationMode(mode)
    checks = [schemathesis.checks.positive_data_acceptance]  # not all limits are in the types

    @given(case=operations[route].as_strategy(generation_mode=mode))
    @settings(
        max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def answered(case):
        case.call_and_validate(excluded_checks=checks)

    answered()
