"""python -m tests.simulation [--seed N] [--seeds N] [--first N]: run the ledger's simulation."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from tests.simulation.scenarios import scenario
from tests.simulation.upstream import BrokenError
from tests.simulation.world import World


def main() -> int:
    """Return 0 if all invariants held."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, help="run only this seed, and print its scenario")
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds")
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("keyproxy").setLevel(logging.CRITICAL if options.seed is None else logging.WARNING)
    if options.seed is not None:
        world = World(scenario(options.seed))
        print(world.scenario)
        world.run()
        print(world.decided, dict(world.upstream.used))
        return 0
    began, totals, broken = time.monotonic(), dict[str, int](), 0
    for seed in range(options.first, options.first + options.seeds):
        world = World(scenario(seed))
        try:
            world.run()
        except BrokenError as error:
            broken += 1
            print(f"{error}\n  replay: python -m tests.simulation --seed {seed}", file=sys.stderr, flush=True)
        for what, count in world.decided.items():
            totals[what] = totals.get(what, 0) + count
    print(f"{options.seeds} runs in {time.monotonic() - began:.0f} s, {broken} broken; requests: {totals}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
