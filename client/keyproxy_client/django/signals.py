"""The signal of this package."""

from __future__ import annotations

import logging
from typing import Final

from django.dispatch import Signal

_log: Final = logging.getLogger("keyproxy_client.provisioning")


class _SecretSignal(Signal):
    """A signal whose arguments are secret: Django would log the text of a receiver's exception, which may have them."""

    def _log_robust_failure(self, receiver: object, err: Exception) -> None:
        name = getattr(receiver, "__qualname__", type(receiver).__name__)
        _log.error("the receiver %s of key_issued failed: %s", name, type(err).__name__)


#: A first key was issued: `key_issued.connect(receiver)`, with the arguments `user`, `key_id` and `secret`. The sender is
#: the user model. Sent once, after the commit; the secret exists nowhere else. A receiver that fails is logged.
key_issued = _SecretSignal()
