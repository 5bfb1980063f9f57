"""Whether a key may use every model that a request names, in whatever place."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.access.judged_values import JudgedValues
from keyproxy.ai.access.object_ids import is_object_id
from keyproxy.ai.access.tenant_records import TenantRecords
from keyproxy.ai.models import Model, ModelTable
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
    """The model that a request may use. `name`: of its row, or the owned id. `label`: in metrics."""

    __slots__ = ("label", "name", "row")

    def __init__(self, name: str, row: Model | None) -> None:
        self.name: Final = name
        self.row: Final = row
        self.label: Final = OWNED_LABEL if row is None else row.name


def judge_models(table: ModelTable, values: JudgedValues, identity: Identity, records: TenantRecords) -> JudgedModel:
    """The model of the route's source. Raises a Refusal (REQUEST_MALFORMED, MODEL_NOT_ALLOWED) for any of the models.

    `records.require` has to be called before the result is used.
    """
    if values.model is None:
        raise malformed("The request must name a model, as a string.", MODEL)
    row = _allowed(table, values.model, identity, records)
    for other in values.other_models:
        _allowed(table, other, identity, records)
    return JudgedModel(values.model if row is None else row.name, row)


def _allowed(table: ModelTable, name: str, identity: Identity, records: TenantRecords) -> Model | None:
    """The row of a model that the key may use, None for an owned one. Raises a Refusal."""
    row = table.find(name)
    if row is None:
        if is_object_id(name) and records.owns(OWNED_KIND, name):
            return None
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
    return row
