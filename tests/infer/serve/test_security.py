"""Who may use the server: keys, the Host header, other web pages; and limits on bodies."""

import asyncio
import re

import pytest

from glm2_jax.errors import UsageError
from infer.serve.middleware import BodyLimit
from infer.serve.options import AddressOptions, RequestOptions
from infer.serve.security import Access, find_access, find_origins
from tests.support.serve import error_of, serving

KEY, OTHER = "sk-right", "sk-other"


@pytest.fixture(scope="module")
def locked():
    with serving("ok", access=Access((KEY, OTHER))) as served:
        yield served


def test_a_key_is_needed_for_all_but_health_and_the_page(locked):
    paths = locked.request("GET", "/openapi.json", headers={"x-api-key": KEY}).json()["paths"]
    routes = [(method.upper(), re.sub("{.*}", "x", p)) for p in paths for method in paths[p]]
    assert {("POST", "/"), ("GET", "/metrics"), ("POST", "/v1/chat/completions")} <= set(routes)
    extra = [("GET", "/openapi.json"), ("HEAD", "/metrics"), ("GET", "/health?deep=1")]
    extra += [("GET", "/x"), ("POST", "/static/x"), ("GET", "/health/"), ("POST", "/v1/responses")]
    for method, path in [*routes, *extra]:
        response = locked.request(method, path)
        if (method, path) == ("GET", "/health"):
            assert response.status_code == 200
            continue
        assert response.status_code == 401, (method, path)
        assert response.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert error_of(response)["code"] == "invalid_api_key"
    for method, path in (("GET", "/"), ("HEAD", "/health"), ("GET", "/static/x.js")):
        assert locked.request(method, path).status_code in (200, 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200), ({"authorization": f"bearer  {OTHER} "}, 200),
        ({"X-API-Key": OTHER}, 200), ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": KEY}, 401), ({"Authorization": "Bearer "}, 401),
        ({"Authorization": f"Bearer {KEY}x"}, 401), ({"X-API-Key": ""}, 401),
        ({"Authorization": "Bearer wrong", "X-API-Key": KEY}, 401),
        ({"X-API-Key": "\xe9"}, 401), ({"Host": "evil.example", "X-API-Key": KEY}, 200),
    ],
)  # fmt: skip
def test_keys_are_read_from_two_headers(locked, headers, status):
    headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    assert locked.request("GET", "/v1/models", headers=headers).status_code == status


def test_without_a_key_other_names_of_this_machine_are_refused():
    """A web page elsewhere could name this machine as it likes (DNS rebinding)."""
    with serving("ok") as served:
        for host, status in {
            "localhost:8000": 200, "127.0.0.1": 200, "[::1]:8000": 200, "evil.example": 403,
            "127.0.0.1.evil.example": 403, "[": 403,
        }.items():  # fmt: skip
            response = served.request("GET", "/v1/models", headers={"Host": host})
            assert response.status_code == status, host
        assert error_of(response)["code"] == "forbidden_host"


def test_other_web_pages_are_refused_unless_they_are_named():
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    with serving("ok", access=Access((KEY,)), origins=("https://a.example",)) as served:
        response = served.request("OPTIONS", "/v1/chat/completions", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = {**preflight, "Origin": "https://b.example"}
        refused = served.request("OPTIONS", "/v1/models", headers=other)
        assert refused.status_code == 400 and error_of(refused)["code"] == "forbidden_origin"
        assert "access-control-allow-origin" not in refused.headers
    with serving("ok") as served:
        response = served.request("OPTIONS", "/v1/chat/completions", headers=preflight)
        assert response.status_code == 405 and "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("https://a.example/", "https://a.example"), ("a.example", "https://a.example"),
        ("HTTP://A.example:80/x?y", "http://a.example"), ("localhost:3000", "https://localhost:3000"),
        ("https://*.example", "https://chat.example.com"), ("https://a:b", "https://chat"),
        ("https://bücher.example", "https://xn--bcher-kva.example"), ("", "https://chat"),
    ],
)  # fmt: skip
def test_an_origin_that_no_browser_sends_is_refused(given, right):
    with pytest.raises(UsageError) as caught:
        find_origins(AddressOptions(cors_origin=["https://fine.example", given]))
    assert f"Write --cors-origin {right}" in caught.value.fix
    for fine in ("*", "http://[::1]:8080", "https://a.example:8443", "http://localhost:3000"):
        assert find_origins(AddressOptions(cors_origin=[fine])) == (fine,)


def test_request_ids_are_passed_on_if_they_are_harmless(locked):
    for given, kept in (("abc-1.2:3", True), ("a b", False), ("x" * 200, False), ("ä", False)):
        headers = {"X-Request-Id": given.encode("utf-8")}
        found = locked.request("GET", "/health", headers=headers).headers["x-request-id"]
        assert (found == given) is kept and re.fullmatch(r"[\w.:-]{1,128}", found)


@pytest.mark.parametrize("declared", [True, False])
def test_bodies_are_limited_before_they_are_read(declared):
    with serving("ok", options=RequestOptions(max_body_bytes=1000)) as served:
        sent = []

        async def pieces():
            for _ in range(100):
                sent.append(1)
                yield b"x" * 100

        headers = {"Content-Type": "application/json"}
        headers |= {"Content-Length": "10000"} if declared else {}
        response = served.request("POST", "/v1/completions", content=pieces(), headers=headers)
        assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"
        assert len(sent) <= (1 if declared else 12)
        assert served.chat("x" * 400).status_code == 200


def test_a_body_that_does_not_come_is_given_up():
    async def wait_for_body(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    async def receive():
        await asyncio.sleep(60)

    limited = BodyLimit(wait_for_body, 1000, seconds=0.01)
    with pytest.raises(Exception, match="too long to arrive"):
        asyncio.run(limited({"type": "http", "headers": []}, receive, None))


def test_the_address_decides_whether_a_key_is_needed(tmp_path, capsys):
    file = tmp_path / "keys"
    file.write_text(f"\n{KEY}\n {OTHER} \n")
    file.chmod(0o644)
    assert find_access(AddressOptions(), {}) == Access((), True)
    assert find_access(AddressOptions(host="::1"), {}) == Access((), True)
    assert find_access(AddressOptions(host="0.0.0.0", insecure=True), {}) == Access((), False)
    environment = {"GLM2_API_KEY": "from-outside"}
    assert find_access(AddressOptions(host="0.0.0.0"), environment).keys == ("from-outside",)
    found = find_access(AddressOptions(host="0.0.0.0", api_key_file=str(file)), environment)
    assert found.keys == (KEY, OTHER) and "chmod 600" in capsys.readouterr().err
    file.chmod(0o600)
    find_access(AddressOptions(api_key_file=str(file)), {})
    assert capsys.readouterr().err == ""
    for host in ("0.0.0.0", "192.168.1.2", "example.com", "::"):
        with pytest.raises(UsageError, match="needs an API key"):
            find_access(AddressOptions(host=host), {})


@pytest.mark.parametrize("content", [b"", b"\n \n", b"two words", b"\xff", "\u00fc".encode()])
def test_bad_keys_are_refused_at_the_start(tmp_path, content):
    file = tmp_path / "keys"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(UsageError):
        find_access(AddressOptions(api_key_file=str(file)), {})
    with pytest.raises(UsageError):
        find_access(AddressOptions(api_key_file=str(tmp_path / "absent")), {})
    with pytest.raises(UsageError):
        find_access(AddressOptions(), {"GLM2_API_KEY": ""})
