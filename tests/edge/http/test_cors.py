"""Other web sites: none may use the server from a browser, but for those that the operator names."""

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from edge.settings.server import ServerSettings
from tests.serving import Served

Serve = Callable[..., Served]
SITE = "https://hmi.plant.example"
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


def test_no_site_is_allowed_unless_it_is_named(server: Served) -> None:
    asked = server.client.options("/v1/chat/completions", headers={"origin": SITE, **PREFLIGHT})
    sent = server.client.post("/v1/chat/completions", json=CHAT, headers={"origin": SITE})
    assert (asked.status_code, sent.status_code) == (400, 400)
    assert not [name for response in (asked, sent) for name in response.headers if name.startswith("access-control")]


def test_a_named_site_may_ask_and_read(serve: Serve) -> None:
    server = serve(cors_origins=(SITE,))
    asked = server.client.options("/v1/chat/completions", headers={"origin": SITE, **PREFLIGHT})
    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == SITE
    assert asked.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in asked.headers["access-control-allow-methods"]
    sent = server.client.post("/v1/chat/completions", json=CHAT, headers={"origin": SITE})
    assert sent.status_code == 200
    assert sent.headers["access-control-allow-origin"] == SITE
    assert sent.headers["vary"] == "origin"
    assert sent.headers["cross-origin-resource-policy"] == "cross-origin"
    assert "access-control-allow-credentials" not in sent.headers


@pytest.mark.parametrize("origin", ["https://hmi.plant.example.evil.example", "http://hmi.plant.example", "null"])
def test_a_site_that_looks_like_it_may_not(serve: Serve, origin: str) -> None:
    server = serve(cors_origins=(SITE,))
    asked = server.client.options("/v1/chat/completions", headers={"origin": origin, **PREFLIGHT})
    sent = server.client.post("/v1/chat/completions", json=CHAT, headers={"origin": origin})
    assert (asked.status_code, sent.status_code) == (400, 400)
    assert "access-control-allow-origin" not in sent.headers


def test_errors_can_be_read_too(serve: Serve) -> None:
    response = serve(cors_origins=(SITE,)).client.post("/v1/nothing", headers={"origin": SITE})
    assert response.status_code == 404
    assert response.headers["access-control-allow-origin"] == SITE


@pytest.mark.parametrize("origin", ["*", "null", "hmi.plant.example", "https://a.example/", "https://A.example"])
def test_what_is_no_origin_is_no_setting(origin: str) -> None:
    with pytest.raises(ValidationError):
        ServerSettings(cors_origins=(origin,))
