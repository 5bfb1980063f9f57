"""`make bench-tokens`: the estimate of texts compared with a real tokenizer, and its cost.

The tokenizer is cl100k, of OpenAI's GPT-4, whose vocabulary the wheel of litellm contains. It is installed, with
tiktoken, for this alone. The prose in `bench/texts` was written for this, or is of the Universal Declaration of Human
Rights; code is Python's own library; the other texts are made here, the same in each run.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import importlib.util
import json
import random
import sys
import timeit
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keyproxy.ai.text_estimate import text_tokens

#: The SHA-1 of the address of cl100k_base.tiktoken, by which tiktoken's cache names the file.
_VOCABULARY = "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_TEXTS = Path(__file__).parent / "texts"

#: The share by which an estimate may be short or long, by kind of text; prose of other vocabularies may be shorter.
BOUNDS = {"english": (0.9, 2.0), "korean": (0.9, 2.0), "code": (0.9, 2.0), "digits": (0.9, 2.0)}
_SHORT_MAX = 0.69


def main(arguments: Sequence[str]) -> int:
    """Print the table. Returns 1 if an estimate is outside of its bounds, 2 without the tokenizer."""
    argparse.ArgumentParser(prog="python -m bench.token_estimates", description=__doc__).parse_args(arguments)
    encoding = _encoding()
    if encoding is None:
        print("litellm's vocabulary or tiktoken is not installed: make bench-setup", file=sys.stderr)
        return 2
    print("text                          bytes    cl100k  estimate  estimate/cl100k  ns/byte")
    outside = []
    for name, text in samples():
        raw = text.encode()
        actual, estimate = len(encoding.encode_ordinary(text)), text_tokens(raw)
        ratio = estimate / actual
        repeats = max(1, 200_000 // len(raw))
        seconds = min(timeit.repeat(functools.partial(text_tokens, raw), number=repeats, repeat=7)) / repeats
        print(f"{name:<26} {len(raw):8} {actual:9} {estimate:9} {ratio:16.2f} {1e9 * seconds / len(raw):8.1f}")
        least, most = next((bounds for kind, bounds in BOUNDS.items() if name.startswith(kind)), (_SHORT_MAX, 100.0))
        if not least <= ratio <= most:
            outside.append(name)
    if outside:
        print(f"outside of the bounds: {', '.join(outside)}", file=sys.stderr)
    return 1 if outside else 0


def samples() -> Iterator[tuple[str, str]]:
    """The texts, by kind."""
    for path in sorted(_TEXTS.glob("*.txt")):
        yield path.stem, path.read_text(encoding="utf-8")
    yield "english, a licence", (_TEXTS.parents[1] / "LICENSE").read_text(encoding="utf-8")
    yield "english, documentation", (_TEXTS.parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    for module in ("argparse", "heapq", "json.decoder"):
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        yield f"code, {module}", Path(spec.origin).read_text(encoding="utf-8")
    made = random.Random(7)
    yield "code, JSON compact", json.dumps(_records(made), separators=(",", ":"))
    yield "code, JSON indented", json.dumps(_records(made), indent=2)
    yield "digits, table", "\n".join("\t".join(str(made.randrange(10**6)) for _ in range(8)) for _ in range(100))
    yield "digits, CSV", "\n".join(",".join(f"{made.uniform(-9, 9):.4f}" for _ in range(8)) for _ in range(100))
    times = (f"2026-11-{made.randrange(10, 29)}T{made.randrange(10, 24)}:15:08Z" for _ in range(200))
    yield "digits, times", "\n".join(times)
    noise = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(100))
    yield "base64", base64.b64encode(noise).decode()
    yield "hexadecimal", noise.hex()
    yield "emoji", "😀👍🎉🚀❤️ ok " * 50


def _records(made: random.Random) -> list[dict[str, Any]]:
    words = (_TEXTS / "english.txt").read_text(encoding="utf-8").split()
    return [
        {
            "id": number, "user_name": made.choice(words), "isActive": made.random() < 0.5,
            "amount": round(made.uniform(0, 900), 2), "created_at": f"2026-0{made.randrange(1, 9)}-11T09:15:00Z",
            "tags": made.sample(words, 3), "note": " ".join(made.sample(words, 12)),
        }
        for number in range(60)
    ]  # fmt: skip


def _encoding() -> Any:
    package = importlib.util.find_spec("litellm")
    if package is None or package.origin is None or importlib.util.find_spec("tiktoken") is None:
        return None
    path = Path(package.origin).parent / _VOCABULARY
    if not path.exists():
        return None
    import tiktoken

    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("cl100k", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
