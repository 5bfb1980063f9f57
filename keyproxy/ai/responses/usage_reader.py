"""What a response reports as JSON: its usage, its model, and that the model has finished.

The same for a whole document and for the events of a stream, whatever its framing. The table of dialects states where
everything is.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import EACH, Dialect, DialectEndpoint, FinishMarker, UsageFields
from keyproxy.ai.responses.usage_objects import UsageReport, has_output, input_in, member, report_in

#: A longer name is no model's. The ledger's records have their own, stricter rules.
_MODEL_CHARACTERS_MAX: Final = 256

#: The most choices that are distinguished.
_CHOICES_MAX: Final = 1_024


class ResponseUsageReader:
    """Reads the JSON of one response.

    `report`: the usage reported last. `reported_input`: the input, which may precede the
    report. `model`:
    as the response names it. `choices`: the number of choices that the request asks for.
    """

    def __init__(self, dialect: Dialect, endpoint: DialectEndpoint, choices: int = 1) -> None:
        self.report: UsageReport | None = None
        self.reported_input: UsageReport | None = None
        self.model: str | None = None
        self._models: Final = dialect.response_models
        self._usage: Final = endpoint.usage
        self._finish: Final = endpoint.finish
        self._choices: Final = choices
        self._finished_choices: set[int] = set()
        self._open = 0
        self._has_finished = False
        self._has_last_report = False
        #: The counts that a cumulative event updates.
        self._counts: dict[str, object] = {}

    @property
    def is_finished(self) -> bool:
        """Whether the model has produced everything; only the usage may be missing."""
        return self._has_last_report or (self._has_finished and self._open <= 0)

    @property
    def is_final(self) -> bool:
        """Whether the report counts everything, rather than what was produced until then."""
        return self.report is not None and (self._finish is None or self.is_finished)

    def read_document(self, document: dict[str, object]) -> None:
        """Read a response that is one document."""
        self._read_model(document)
        if self.report is None:
            self.report = self._report_in(document, by_total=False) or self._report_in(document, by_total=True)
        if self.report is not None:
            self.reported_input = self.report
            self._has_last_report = True

    def _report_in(self, document: dict[str, object], *, by_total: bool) -> UsageReport | None:
        for fields in self._usage:
            for place in fields.places:
                counts = member(document, place)
                if isinstance(counts, dict):
                    report = report_in(fields, counts, by_total=by_total)
                    if report is not None:
                        return report
        return None

    def read_event(self, event: dict[str, object], kind: str = "") -> bool:
        """Read an event of a stream; return whether it reports usage. `kind`: its type, if its framing states that."""
        if not kind:
            stated = event.get("type")
            kind = stated if isinstance(stated, str) else ""
        if self.model is None:
            self._read_model(event)
        if self._finish is not None:
            self._read_finish(self._finish, event, kind)
        return any(self._read_usage(fields, event, kind) for fields in self._usage)

    def _read_model(self, document: dict[str, object]) -> None:
        for path in self._models:
            value = member(document, path)
            if self.model is None and isinstance(value, str) and 0 < len(value) <= _MODEL_CHARACTERS_MAX:
                self.model = value

    def _read_usage(self, fields: UsageFields, event: dict[str, object], kind: str) -> bool:
        if fields.events and kind not in fields.events:
            return False
        found = False
        for place in fields.places:
            counts = member(event, place)
            if isinstance(counts, dict):
                found = self._report(fields, counts, kind) or found
        return found

    def _report(self, fields: UsageFields, counts: dict[str, object], kind: str) -> bool:
        if fields.cumulative_event:
            is_report = kind == fields.cumulative_event
            is_complete = is_report and has_output(fields, counts)
            # Members that are not repeated keep their values from the start of the stream.
            self._counts.update({name: value for name, value in counts.items() if value is not None})
            counts = self._counts
            report = report_in(fields, counts) if is_complete else None
        else:
            report = report_in(fields, counts, by_total=True)
            is_report = report is not None or has_output(fields, counts)
        known = report or input_in(fields, counts)
        if known is not None:
            self.reported_input = known
        if is_report:
            self.report = report
            self._has_last_report = report is not None and bool(fields.events) and not fields.cumulative_event
        return report is not None

    def _read_finish(self, finish: FinishMarker, event: dict[str, object], kind: str) -> None:
        if finish.event:
            self._open += kind == finish.begins
            if kind == finish.event:
                self._open = max(0, self._open - 1)
                self._has_finished = True
        elif len(finish.member) == 3 and finish.member[1] == EACH:
            elements = event.get(finish.member[0])
            for place, element in enumerate(elements if isinstance(elements, list) else []):
                if isinstance(element, dict) and element.get(finish.member[2]) not in (None, False):
                    self._finish_choice(element.get("index"), place)
        elif member(event, finish.member) not in (None, False):
            self._has_finished = True

    def _finish_choice(self, index: object, place: int) -> None:
        choice = index if isinstance(index, int) else place
        if len(self._finished_choices) < _CHOICES_MAX:
            self._finished_choices.add(choice)
        self._has_finished = len(self._finished_choices) >= min(self._choices, _CHOICES_MAX)


def outermost_members(dialect: Dialect, endpoint: DialectEndpoint) -> list[str]:
    """Return the members of the outermost object that a reader needs."""
    names = {path[0] for path in dialect.response_models if len(path) == 1}
    for fields in endpoint.usage:
        for place in fields.places:
            if len(place) == 1:
                names.add(place[0])
            elif not place:
                parts = (fields.cached, fields.cache_write, fields.reasoning, fields.total)
                paths = [*fields.inputs, *fields.outputs, *[path for path in parts if path is not None]]
                names.update([path[0] for path in paths])
    return sorted(names)
