"""Memory of a proxy: after its start, per idle connection, per cached key, and per active user under limits."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench import load
from bench.peers import PATH, Peer, free_port
from bench.tables import print_table

_IDLE_CONNECTIONS = 4_000
_FIRST_CONNECTIONS = 400
#: HAProxy's configuration has a bound of 4,000, for both sides.
_HAPROXY_CONNECTIONS = 1_500
_MIB = 1_048_576


def idle_connections(servers: Sequence[Peer], secret: str) -> dict[str, float]:
    """Bytes per connection that was used once and is idle. Prints the table."""
    found, rows = {}, []
    for server in servers:
        port = free_port()
        with server.start(port) as pids:
            request = _request(server.scheme + secret)
            started_mib = load.rss_mib(pids)
            # What the first ones take is in part not for connections.
            connections = [_send_once(port, request) for _ in range(_FIRST_CONNECTIONS)]
            number = _HAPROXY_CONNECTIONS if server.name == "HAProxy" else _IDLE_CONNECTIONS
            before = load.rss_mib(pids)
            connections += [_send_once(port, request) for _ in range(number)]
            found[server.name] = (load.rss_mib(pids) - before) * _MIB / number
            for one in connections:
                one.close()
            rows.append([server.name, f"{started_mib:.1f}", f"{found[server.name]:,.0f}", f"{number:,}"])
    print_table(["memory", "after start, MiB", "bytes per idle connection", "of these"], rows)
    return found


def per_key(python: str, keys: int) -> float:
    """Bytes per cached key, in a process of its own."""
    return _figure(
        python, "bench.cache", ["--keys", str(keys), "--strangers", "2000"], r"(\d+) bytes of memory per key"
    )


def per_user(python: str, users: int) -> float:
    """Bytes per active user under limits, in addition to the key. In a process of its own."""
    return _figure(python, "bench.users", ["--users", str(users)], r"(\d+) bytes more per user")


def _figure(python: str, module: str, arguments: Sequence[str], pattern: str) -> float:
    """A figure that a module of this package prints, run with the build that is installed for this Python."""
    root = Path(__file__).parents[1]
    code = (
        "import keyproxy.gateway, runpy, sys\n"  # before this directory is on the path, with its sources
        f"sys.path.append({str(root)!r})\n"
        f"sys.argv[0] = {module!r}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    )
    command = [python, "-P", "-c", code, *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout
    match = re.search(pattern, output)
    if match is None:
        raise RuntimeError(f"the output of {module} does not match {pattern!r}: {output}")
    return float(match[1])


def _send_once(port: int, request: bytes) -> socket.socket:
    """A connection that was used once and is idle."""
    sock = socket.create_connection(("127.0.0.1", port), 10)
    sock.sendall(request)
    response = b""
    while b'"queued"}' not in response:
        part = sock.recv(65_536)
        if not part:
            raise RuntimeError(f"the connection was closed after {response[:200]!r}")
        response += part
    return sock


def _request(header: str) -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n{header}\r\nContent-Type: application/json\r\n"
        f"Content-Length: 90\r\n\r\n{'x' * 90}"
    ).encode()
