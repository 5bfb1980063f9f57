"""The OpenAPI document is true: what it says is asked of the running API, and what is answered is held against it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks

from keyproxy.admin import openapi, reference
from keyproxy.admin.service import ENDPOINTS
from tests.admin.conftest import FILE_TOKEN, Api

DOCUMENT = openapi.document(ENDPOINTS)
