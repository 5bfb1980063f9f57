"""The rows of `make bench`: every peer, and both builds of keyproxy with each kind of traffic."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import traffic
from bench.comparison import Row
from bench.peers import CHAT_PATH, METERED_CHAT_PATH, PATH, Peer, peers
from bench.site import Site

OURS = "keyproxy"
COMPILED = "keyproxy, compiled"

WINDOWS = ", windows of key, user and tenant"
ACTING = ", acting for a user"
TOKEN = ", agent token"
ASSERTION = ", assertion"
CHAT = ", chat"
METERED_CHAT = ", chat, metered under limits"
REFUSALS = ", logs refusals only"
REPEATED = ", best case: one request repeated"

_KEYS = 1_000
_LIMITED_WARM_SECONDS = 4
#: Between two turns the assertions of the users expire.
_SIGNED_WARM_SECONDS = 1


def everything(ours: Site, builds: Mapping[str, tuple[str, str]], envoy: Path) -> list[Row]:
    """All rows. `builds`: by name, the Python of each build, and why it is missing; `envoy`: the program."""
    secrets = ours.keys(_KEYS)
    known, limited = _file(ours, "known", secrets), _file(ours, "limited", ours.keys(_KEYS, limited=True))
    secret, users, tokens = ours.delegated(_KEYS)
    acting = _file(ours, "acting", [f"{secret}\tX-Keyproxy-Act-For: {user}" for user in users])
    delegated = _file(ours, "tokens", tokens)
    jobs = functools.partial(traffic.varied, credentials=known, to=PATH)
    chat = functools.partial(traffic.varied, body=traffic.CHAT, has_id=False)
    once = f"{traffic.API_KEY}{secrets[0]}\nUser-Agent: python-requests/2.32\nAccept: */*"
    rows = [
        Row(peer.name, peer, functools.partial(jobs, scheme=peer.scheme))
        for peer in peers(ours.home, ours.upstream, secrets, envoy)
    ]
    for name, (python, missing) in builds.items():
        serving = functools.partial(ours.serving, python=python)
        plain = Peer(name, missing, serving)
        signing = Peer(name + ASSERTION, missing, functools.partial(serving, access="assertion = true"))
        terse = Peer(name + REFUSALS, missing, functools.partial(serving, log='access = "refusals"'))
        bearing = functools.partial(jobs, credentials=delegated, scheme="Authorization: Bearer ")
        metered = functools.partial(chat, credentials=limited, to=METERED_CHAT_PATH)
        windows = functools.partial(jobs, credentials=limited)
        rows += [
            Row(name, plain, jobs),
            Row(name + WINDOWS, plain, windows, name, _LIMITED_WARM_SECONDS),
            Row(name + ACTING, plain, functools.partial(jobs, credentials=acting), name),
            Row(name + TOKEN, plain, bearing, name),
            Row(name + ASSERTION, signing, jobs, name, _SIGNED_WARM_SECONDS),
            Row(name + CHAT, plain, functools.partial(chat, credentials=known, to=CHAT_PATH), name),
            Row(name + METERED_CHAT, plain, metered, name + CHAT, _LIMITED_WARM_SECONDS),
            Row(name + REFUSALS, terse, jobs, name),
            Row(name + REPEATED, plain, functools.partial(traffic.repeated, header=once, to=PATH), name),
        ]
    return rows


def _file(ours: Site, name: str, lines: Sequence[str]) -> Path:
    path = ours.home / f"{name}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path
