"""Messages are signed according to Standard Webhooks."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest

from keyproxy.http import webhook_signature

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_a_message_is_signed_with_its_id_and_its_time() -> None:
    # The example of the reference implementations, with the signature that all of them produce.
    signed = webhook_signature.headers(
        webhook_signature.key_of(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert signed == {
        "Webhook-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "Webhook-Timestamp": "1614265330",
        "Webhook-Signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.parametrize(
    ("message_id", "wall_seconds", "body"), [("rem_2", 1, b"{}"), ("rem_1", 2, b"{}"), ("rem_1", 1, b"{} ")]
)
def test_any_change_alters_the_signature(message_id: str, wall_seconds: int, body: bytes) -> None:
    key = webhook_signature.key_of(SECRET)
    right = webhook_signature.headers(key, "rem_1", 1, b"{}")["Webhook-Signature"]
    assert webhook_signature.headers(key, message_id, wall_seconds, body)["Webhook-Signature"] != right
    expected = hmac.new(base64.b64decode(SECRET[6:]), b"rem_1.1.{}", hashlib.sha256).digest()
    assert right == "v1," + base64.b64encode(expected).decode()
