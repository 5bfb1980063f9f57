"""Overlapping listeners, and upstreams that lead back to the proxy."""

from __future__ import annotations

import ipaddress

import pytest

from keyproxy.config import addresses
from keyproxy.platform import sockets

#: Stands for a non-loopback address of this machine.
OWN = ipaddress.ip_address("192.0.2.7")


def is_local(address: addresses.IpAddress) -> bool:
    return address.is_loopback or address == OWN


@pytest.mark.parametrize(
    ("one", "other", "do"),
    [
        ("127.0.0.1:8080", "127.0.0.1:8080", True),
        ("127.0.0.1:8080", "127.0.0.1:8081", False),
        ("127.0.0.1:8080", "127.0.0.2:8080", False),
        ("0.0.0.0:8080", "127.0.0.1:8080", True),
        ("0.0.0.0:8080", "192.0.2.7:8080", True),
        ("0.0.0.0:8080", "[::1]:8080", False),
        ("[::]:8080", "0.0.0.0:8080", True),
        ("[::]:8080", "127.0.0.1:8080", True),
        ("[::]:8080", "[::1]:8080", True),
        ("[::1]:8080", "127.0.0.1:8080", False),
        ("[0:0:0:0:0:0:0:1]:8080", "[::1]:8080", True),
        ("[::ffff:127.0.0.1]:8080", "127.0.0.1:8080", True),
        ("localhost:8080", "127.0.0.1:8080", True),
        ("LOCALHOST.:8080", "[::1]:8080", True),
        ("localhost:8080", "0.0.0.0:8080", True),
        ("proxy.internal:8080", "Proxy.Internal:8080", True),
        ("proxy.internal:8080", "127.0.0.1:8080", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("0.0.0.0:0", "127.0.0.1:8080", False),
        ("unix:/run/a.sock", "unix:/run/a.sock", True),
        ("unix:/run/a.sock", "unix:/run/./x/..//a.sock", True),
        ("unix:/run/a.sock", "unix://run/a.sock", True),
        ("unix:/run/a.sock", "unix:/run/b.sock", False),
        ("unix:/run/a.sock", "127.0.0.1:8080", False),
    ],
)
def test_two_listeners_overlap_if_a_connection_could_reach_either(one: str, other: str, do: bool) -> None:
    places = addresses.of_listener(one), addresses.of_listener(other)
    assert addresses.overlap(*places) is addresses.overlap(*reversed(places)) is do


@pytest.mark.parametrize(
    ("url", "listener", "is_itself"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080", True),
        ("http://127.0.0.1:8081", "127.0.0.1:8080", False),
        ("http://127.0.0.2:8080", "127.0.0.1:8080", False),
        ("http://localhost:8080", "127.0.0.1:8080", True),
        ("http://127.0.0.1:8080", "localhost:8080", True),
        ("http://127.0.0.1:8080", "0.0.0.0:8080", True),
        ("http://127.0.0.9:8080", "0.0.0.0:8080", True),
        ("http://192.0.2.7:8080", "0.0.0.0:8080", True),
        ("http://192.0.2.7:8080", "[::]:8080", True),
        ("http://192.0.2.8:8080", "0.0.0.0:8080", False),
        ("http://[::1]:8080", "0.0.0.0:8080", False),
        ("http://[::1]:8080", "[::]:8080", True),
        ("http://0.0.0.0:8080", "127.0.0.1:8080", True),
        ("http://0.0.0.0:8080", "192.0.2.7:8080", False),
        ("http://compute:8080", "0.0.0.0:8080", False),
        ("http://127.0.0.1", "127.0.0.1:80", True),
        ("HTTPS://127.0.0.1", "127.0.0.1:443", True),
        ("unix:/run/a.sock", "unix:/run/../run/a.sock", True),
        ("unix:/run/a.sock", "unix:/run/b.sock", False),
        ("unix:/run/a.sock", "0.0.0.0:8080", False),
    ],
)
def test_an_upstream_that_leads_back_here_is_recognised(url: str, listener: str, is_itself: bool) -> None:
    assert addresses.reaches(addresses.of_url(url), addresses.of_listener(listener), is_local) is is_itself


def test_every_conflict_is_named_with_both_keys() -> None:
    listeners = {"listen.address": "0.0.0.0:1", "ops.address": "127.0.0.1:1", "admin.address": "[::]:1"}
    first, second, third, itself, *rest = addresses.conflicts(listeners, {"upstream.url": "http://127.0.0.1:1"})
    assert first.startswith("ops.address: 127.0.0.1:1 overlaps listen.address (0.0.0.0:1)")
    assert second.startswith("admin.address: [::]:1 overlaps listen.address (0.0.0.0:1)")
    assert third.startswith("admin.address: [::]:1 overlaps ops.address (127.0.0.1:1)")
    assert itself == "upstream.url: http://127.0.0.1:1 is this proxy itself: listen.address is 0.0.0.0:1"
    assert len(rest) == 2


def test_names_and_short_numbers_are_resolved() -> None:
    loopback = ipaddress.ip_address("127.0.0.1")
    assert loopback in sockets.resolved("localhost")
    assert sockets.resolved("127.1") == {loopback}
    assert sockets.resolved("0") == {ipaddress.ip_address("0.0.0.0")}
    assert sockets.resolved("no-such-name.invalid") == {"no-such-name.invalid"}


def test_addresses_of_this_machine_are_recognised() -> None:
    assert sockets.is_local(ipaddress.ip_address("127.0.0.77"))
    assert not sockets.is_local(ipaddress.ip_address("192.0.2.1"))
    assert not sockets.is_local(ipaddress.ip_address("2001:db8::1"))
