from __future__ import annotations

import pytest

from shared.auth import authorization, check_authorization, check_bind
from shared.errors import Unauthorized


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    check_bind(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
@pytest.mark.parametrize("api_key", [None, ""])
def test_beyond_this_machine_a_key_is_needed(host: str, api_key: str | None) -> None:
    with pytest.raises(ValueError, match="TANDEM_API_KEY"):
        check_bind(host, api_key)
    check_bind(host, "key")


def test_the_service_accepts_the_header_that_the_client_sends() -> None:
    check_authorization(authorization("key")["Authorization"], "key")
    check_authorization("bearer key", "key")


@pytest.mark.parametrize(
    "header", [None, "", "key", "Bearer", "Bearer ", "Bearer kez", "Basic key"]
)
def test_anything_but_the_bearer_key_is_unauthorized(header: str | None) -> None:
    with pytest.raises(Unauthorized):
        check_authorization(header, "key")


def test_without_a_key_everyone_is_authorized() -> None:
    assert authorization(None) == {}
    check_authorization(None, None)
