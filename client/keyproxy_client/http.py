"""Authenticated requests to a keyproxy: httpx, requests and aiohttp.

Each request carries the secret of a key in `Authorization`, and the acting user in Act-For, to one origin only. Later
hops of a redirect carry neither.

    with httpx_client() as http:  # for ORIGIN of Django's settings
        http.post("/v1/ai/jobs", json={"job_id": 7})
"""

from __future__ import annotations
