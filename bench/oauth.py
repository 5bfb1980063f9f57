"""CPU of requests with a known access token, against those with a known key, without sockets.

Prints microseconds of CPU per request, best of several rounds. All rows take turns, so that they can be compared.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Final

import uvloop

from bench.phases import FORMAT, OAUTH, SECRET, Bench, requests, timed
from keyproxy.process.run import freeze_garbage

TOKEN: Final = FORMAT.make_access_token(bytes(32))
_ROUNDS: Final = 25


def main() -> None:
    """Print the table."""
    loop = uvloop.new_event_loop()
    with open("/dev/null", "wb") as null:  # noqa: PTH123
        benches = {
            "a key": Bench(loop, null.fileno()),
            "a key, tokens are accepted": Bench(loop, null.fileno(), oauth=OAUTH),
            "an access token": Bench(loop, null.fileno(), oauth=OAUTH, secret=TOKEN),
        }
        freeze_garbage()  # as a worker does
        raws = {name: requests(TOKEN if "access" in name else SECRET) for name in benches}
        # As clients send tokens; a key in the same scheme, so that the heads are equally long but for the kind.
        bearing = {
            name: {kind: [raw.replace(b"Api-Key ", b"Bearer ") for raw in some] for kind, some in kinds.items()}
            for name, kinds in raws.items()
        }
        for kind, what in (("plain", "identical requests"), ("rich", "different requests")):
            calls = {name: partial(_whole, one, itertools.cycle(bearing[name][kind])) for name, one in benches.items()}
            taken = timed(calls, *benches.values(), rounds=_ROUNDS)
            print(f"\n{what:<32}     µs    added")
            for name, micros in taken.items():
                print(f"  {name:<30} {micros:8.2f} {micros - taken['a key']:8.2f}")
        for one in benches.values():
            one.close()


def _whole(bench: Bench, raws: itertools.cycle[bytes]) -> None:
    bench.whole(next(raws))


if __name__ == "__main__":
    main()
