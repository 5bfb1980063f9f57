"""What wrk sends: Lua scripts for traffic in which no two requests are alike, and for one request repeated.

Varied traffic has the fields of an instrumented worker. Each request has a key of its own out of many, a request id, a
trace id, a path, and a length of its body, all random.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_REPEATED = """
wrk.path = "{path}"
wrk.method = "{method}"
wrk.body = [[{body}]]
wrk.headers["Content-Type"] = "application/json"
{header}
"""

_VARIED = """
local keys, filler, random = {{}}, string.rep("lorem ipsum dolor sit amet ", 40), math.random
for line in io.lines("{credentials}") do keys[#keys + 1] = (line:gsub("\\t", "\\r\\n")) end
math.randomseed({seed})
local head = "POST {path}%s HTTP/1.1\\r\\nHost: 127.0.0.1:8080\\r\\n{scheme}%s\\r\\nContent-Type: application/json\\r\\n"
  .. "User-Agent: python-requests/2.32\\r\\nAccept: */*\\r\\nAccept-Encoding: gzip, deflate\\r\\n"
  .. "traceparent: 00-%08x%08x%08x%08x-%08x%08x-01\\r\\nX-Request-Id: %08x%08x\\r\\nContent-Length: %d\\r\\n\\r\\n%s"
local function word() return random(0, 0xffffffff) end
local at = 0
request = function()
  at = at % #keys + 1
  local body = [[{before}]] .. filler:sub(1, random({shortest}, {longest})) .. [[{after}]]
  local job = {has_id} and string.format("/%08x%08x", word(), word()) or ""
  local key = keys[{is_random} and random(#keys) or at]
  return head:format(job, key, word(), word(), word(), word(), word(), word(), word(), word(), #body, body)
end
"""

#: The scheme of keyproxy's keys.
API_KEY = "Authorization: Api-Key "


@dataclass(frozen=True)
class Body:
    """JSON with a text of random length between two constant parts."""

    before: str
    after: str
    shortest: int = 20
    longest: int = 400


JOB = Body('{"input": "', '"}')
CHAT = Body(
    '{"model": "gpt-4o", "messages": [{"role": "user", "content": "',
    '"}], "max_completion_tokens": 50}',
)


def repeated(path: Path, *, header: str, to: str, method: str = "POST", body: str = "x" * 90) -> Path:
    """Write the script that sends the same bytes again and again, which is the best case. `header`: its lines."""
    fields = [line.partition(": ") for line in header.splitlines()]
    lines = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, _, value in fields)
    path.write_text(_REPEATED.format(path=to, method=method, body=body, header=lines), encoding="utf-8")
    return path


def varied(
    path: Path,
    credentials: Path,
    *,
    to: str,
    body: Body = JOB,
    scheme: str = API_KEY,
    has_id: bool = True,
    in_order: bool = False,
) -> Path:
    """Write the script of varied traffic.

    `credentials`: a file with one on each line, in which a tab begins another header line. `to`: the path, followed by an
    id if `has_id`. `scheme`: what stands before the credential. `in_order`: one after another, so that each is used once.
    """
    text = _VARIED.format(
        credentials=credentials,
        seed=20_261_126,
        path=to,
        scheme=scheme,
        before=body.before,
        after=body.after,
        shortest=body.shortest,
        longest=body.longest,
        has_id="true" if has_id else "false",
        is_random="false" if in_order else "true",
    )
    path.write_text(text, encoding="utf-8")
    return path
