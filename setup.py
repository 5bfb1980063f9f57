"""The optional compiled build. All else about the package is in pyproject.toml.

With KEYPROXY_COMPILE=1 in the environment, mypyc makes C extensions of the rooms that a request passes through; without
it the wheel is pure Python. Both hold the same sources and behave alike (docs/decisions/0012). mypyc and a C compiler
have to be there: build without isolation, from requirements/compile.txt.
"""

import os

from setuptools import Extension, setup

#: What runs for every request. All else waits for the network or for people, and stays as it is.
ROOMS = (
    "reasons", "model", "admission", "headers", "keyformat", "ports", "problems", "routes", "target", "credential",
    "clock", "gateway", "idempotency", "metering",
    "limits/allowance", "limits/book", "limits/leases", "limits/messages", "limits/plan", "limits/register",
    "limits/statement", "limits/told", "ratelimit",
    "metrics/access_log", "metrics/recorder",
    "store/identities", "store/ledger", "store/usage",
    "tokens/answer", "tokens/ask", "tokens/document", "tokens/forwarded", "tokens/inflate", "tokens/json_grammar",
    "tokens/meter", "tokens/names", "tokens/outline", "tokens/parts", "tokens/reading", "tokens/report", "tokens/scan",
    "tokens/rewrite", "tokens/stream",
    "wire/answering", "wire/answers", "wire/beginnings", "wire/client", "wire/context", "wire/deadlines",
    "wire/exchange", "wire/framing", "wire/heads", "wire/line", "wire/outflow", "wire/pace", "wire/places", "wire/pool",
    "wire/pressure", "wire/readers", "wire/reading_turns", "wire/request_stream", "wire/request_writer",
    "wire/server", "wire/shapes", "wire/turns", "wire/upstream", "wire/upstream_user",
)  # fmt: skip


def extensions() -> list[Extension]:
    """None, unless the compiled build was asked for."""
    if os.environ.get("KEYPROXY_COMPILE") != "1":
        return []
    from mypyc.build import mypycify

    return mypycify([f"keyproxy/{room}.py" for room in ROOMS], opt_level="3", debug_level="0", group_name="keyproxy")


setup(ext_modules=extensions())
