"""What the tests of all environments share."""

from __future__ import annotations

import pytest

from deployment import VARIABLE, Deployment


@pytest.fixture(scope="session")
def deployment() -> Deployment:
    """The keyproxy of this row: see `deployment.py`. Skips the test outside `make test-client`."""
    named = Deployment.named()
    if named is None:
        pytest.skip(f"{VARIABLE} names no keyproxy: run `make test-client`")
    return named
