"""Whether a key may use every model that a request names, in whatever place."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.access.object_ids import is_object_id
from keyproxy.ai.access.tenant_records import TenantRecords
from keyproxy.ai.models import Model, ModelTable, recorded_name
from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.scanning.member_scope import ALTERNATIVES
from keyproxy.model import Identity
from keyproxy.reasons import Reason, Refusal

MODEL: Final = "model"

#: The members, parameters and fields that name models, besides the route's source.
MODEL_PLACES: Final = (MODEL, *ALTERNATIVES)

#: The kind of owned ids that are models, and the label of all of them in metrics.
OWNED_KIND: Final = "model"
OWNED_LABEL: Final = "owned"


class JudgedModel:
    """The model that a request may use. `name`: of its row, or the owned id. `label`: in metrics. `line`: the header line
    that names it to the upstream."""

    __slots__ = ("label", "line", "name")

    def __init__(self, name: str, label: str, field: bytes) -> None:
        """`field`: the start of the header line."""
        self.name: Final = name
        self.label: Final = label
        self.line: Final = b"%b%b\r\n" % (field, name.encode("ascii"))


class NamedModels:
    """The models that a request names. `model`: of the route's source, None if it has none. `others`: of every other
    place. `recorded`: the name of `model` in records. Requests that name the same in the same places share it."""

    __slots__ = ("_field", "_judged", "_row", "_table", "model", "others", "recorded")

    def __init__(self, model: str | None, others: tuple[str, ...], table: ModelTable, field: bytes) -> None:
        """`field`: the start of the header line that names the model."""
        self.model: Final = model
        self.others: Final = others
        self._table: Final = table
        self._field: Final = field
        row = self._row = table.find(model)
        self.recorded: Final = recorded_name(row, model)
        self._judged: Final = None if row is None else JudgedModel(row.name, row.name, field)

    def judge(self, identity: Identity, records: TenantRecords) -> JudgedModel:
        """The model of the source. Raises a Refusal (REQUEST_MALFORMED, MODEL_NOT_ALLOWED) for any of the models.

        `records.require` has to be called before the result is used.
        """
        model, row, judged = self.model, self._row, self._judged
        if model is None:
            raise malformed("The request must name a model, as a string.", MODEL)
        _check(model, row, identity, records)
        for other in self.others:
            _check(other, self._table.find(other), identity, records)
        return JudgedModel(model, OWNED_LABEL, self._field) if judged is None else judged


def _check(name: str, row: Model | None, identity: Identity, records: TenantRecords) -> None:
    """Raise a Refusal unless the key may use a model. `row`: None if it is not listed."""
    if row is None:
        if is_object_id(name) and records.owns(OWNED_KIND, name):
            return
        raise Refusal(Reason.MODEL_NOT_ALLOWED, "the model is neither listed nor owned", field=MODEL)
    if not row.scopes <= identity.scopes:
        missing = min(row.scopes - identity.scopes)
        raise Refusal(
            Reason.MODEL_NOT_ALLOWED,
            f"model {row.name}",
            caller_text=f"Missing scope: '{missing}'.",
            missing_scopes=(missing,),
            field=MODEL,
        )
