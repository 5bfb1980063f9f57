"""The optional compiled build. All else about the package is in pyproject.toml.

With KEYPROXY_COMPILE=1 in the environment, mypyc makes C extensions of the rooms that a request passes through; without
it the wheel is pure Python. Both hold the same sources and behave alike (docs/decisions/0012). mypyc and a C compiler
have to be there: build without isolation, from requirements/compile.txt.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

#: What runs for every request: these folders whole, but for `NOT_COMPILED`, and these modules.
FOLDERS = ("ai", "auth", "decision", "http", "limits", "ports", "wire")
MODULES = (
    "problem_spec", "reasons", "model", "http_messages", "gateway", "limit_state", "platform/clock",
    "platform/decimal_text", "metrics/access_log", "metrics/access_log_lines", "metrics/delegation_counts",
    "metrics/model_counts", "metrics/recorder",
    "store/identities/acting_pairs", "store/identities/cache", "store/identities/entries",
    "store/identities/identity_rows", "store/identities/lookup_batcher", "store/identities/owned_ids",
    "store/identities/refused_digests", "store/identities/request_lookup",
    "store/identities/unknown_credentials", "store/ledger/ledger",
    "store/usage/journal", "store/usage/model_names", "store/usage/usage_batch",
)  # fmt: skip

#: Modules of the folders that stay interpreted, and why.
NOT_COMPILED = {
    "auth/key_scanner": "runs for an operator",
    "auth/throttle": "runs in the control plane",
    "http/webhook_signature": "runs for reminders",
    "limits/ledger/accounts": "runs for an operator, and tests extend it",
    "limits/ledger/message_schedule": "runs for an operator",
    "limits/ledger/rules": "runs for an operator, and tests extend it",
    "limits/plans/plan_changes": "runs for an operator",
    "limits/pool_leases": "objects of compiled classes cannot be referred to weakly",
    "wire/body_buffer": "tests shorten its times, which compiled modules have built in",
    "wire/handshake": "extends classes of the ssl module",
    "wire/listener": "accepts connections",
    "wire/tls": "reads certificates",
}


def compiled_modules(package: Path) -> list[str]:
    """What the compiled build compiles, as paths without suffix below the package."""
    found = [
        str(path.relative_to(package).with_suffix(""))
        for folder in FOLDERS
        for path in sorted((package / folder).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    return [*MODULES, *(name for name in found if name not in NOT_COMPILED)]


def extensions() -> list[Extension]:
    """None, unless the compiled build was asked for."""
    if os.environ.get("KEYPROXY_COMPILE") != "1":
        return []
    from mypyc.build import mypycify

    files = [f"keyproxy/{name}.py" for name in compiled_modules(Path("keyproxy"))]
    return mypycify(files, opt_level="3", debug_level="0", group_name="keyproxy")


if __name__ == "__main__":
    setup(ext_modules=extensions())
