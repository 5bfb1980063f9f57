"""The models that may serve a request, and their names. Requests that name the same models in one place share them."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.models import Candidates, recorded_name


class RequestModels:
    """The models of a request.

    `model`: the name in records of the one that its source names, empty without one. `names`: those by which limits
    select the request, of all models that may serve it. `line`: the header line with the configured name of the model;
    empty without one, or if another may be used instead.
    """

    __slots__ = ("candidates", "line", "model", "names")

    def __init__(
        self, candidates: Candidates, sent: str | None, alternatives: tuple[str, ...] = (), *, field: bytes = b""
    ) -> None:
        """`sent`: the name as the source has it. `alternatives`: names of further candidates. `field`: starts `line`."""
        row = candidates.model
        self.candidates: Final = candidates
        self.model: Final = recorded_name(row, sent)
        names = [self.model] if self.model else []
        for other, name in zip(candidates.models[1:], alternatives, strict=True):
            names.append(recorded_name(other, name))
        self.names: Final = tuple(dict.fromkeys(names))
        is_certain = row is not None and len(candidates.models) == 1
        self.line: Final = b"%b%b\r\n" % (field, row.name.encode("ascii")) if row is not None and is_certain else b""


#: A request that names no model, or was not read.
NO_MODELS: Final = RequestModels(Candidates(None), None)
