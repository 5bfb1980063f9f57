"""The rules by which the requests of each route are judged, from the configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.model_judgement import MODEL
from keyproxy.ai.access.named_models import ModelRules
from keyproxy.ai.access.value_sources import PATH
from keyproxy.ai.categories import CategoryRules, PatternMatcher, parse_category_source
from keyproxy.ai.dialects.endpoint import Dialect
from keyproxy.ai.dialects.table import DIALECTS
from keyproxy.ai.model_source import DIALECT, NONE, parse_model_source
from keyproxy.ai.models import Model, ModelTable
from keyproxy.config.bind_settings import read_binds
from keyproxy.config.schema import RouteRow, Settings
from keyproxy.http.path_patterns import placeholder_pattern
from keyproxy.http.routes import RouteTable
from keyproxy.model import Route


def access_rules(settings: Settings, routes: RouteTable, patterns: PatternMatcher | None) -> dict[Route, AccessRules]:
    """The rules of the routes that judge models, categories or namespaces. `patterns`: None without any."""
    rows = {row.match: row for row in settings.routes}
    table = ModelTable(settings.models)
    found: dict[Route, AccessRules] = {}
    for match, route in routes.rows:
        row = rows.get(match, RouteRow(match))
        model = _model_rules(settings, row, match, table)
        binds = read_binds(row.binds)
        categories = _category_rules(settings, row, patterns)
        if model is None and categories is None and not binds:
            continue
        names = {bind.source.name for bind in binds if bind.source.kind == PATH}
        found[route] = AccessRules(
            route.name,
            model=model,
            categories=categories,
            binds=binds,
            placeholders={name: placeholder_pattern(match, name) for name in names},
            bounds=settings.tokens.bounds(),
        )
    return found


def judges_model(row: RouteRow, models: Sequence[Model]) -> bool:
    """Whether a route judges the model: its setting names a place, or its dialect has one and a model needs scopes."""
    source = parse_model_source(row.model)
    if source.kind == DIALECT:
        return _names_model(_dialect(row)) and any(model.scopes for model in models)
    return source.kind != NONE


def model_warnings(settings: Settings) -> list[str]:
    """Return one sentence for each route that is open to models that others restrict."""
    return [
        f"routes[{number}]: model = 'none': the scopes of [[models]] are not required on this route"
        for number, row in enumerate(settings.routes, start=1)
        if row.model == NONE and _names_model(_dialect(row)) and any(model.scopes for model in settings.models)
    ]


def _model_rules(settings: Settings, row: RouteRow, match: str, table: ModelTable) -> ModelRules | None:
    if not judges_model(row, settings.models):
        return None
    source = parse_model_source(row.model)
    names = {MODEL} if _has_placeholder(match, MODEL) else set()
    names |= {source.name} if source.kind == PATH else set()
    return ModelRules(
        source,
        table,
        dialect=_dialect(row),
        field=f"{settings.identity.header_prefix}Model: ".encode("ascii"),
        placeholders={name: placeholder_pattern(match, name) for name in names},
    )


def _category_rules(settings: Settings, row: RouteRow, patterns: PatternMatcher | None) -> CategoryRules | None:
    if not row.category:
        return None
    return CategoryRules(
        [parse_category_source(text) for text in row.category],
        settings.categories,
        shape=row.prompt,
        unregistered=row.unregistered,
        matcher=patterns,
        field=f"{settings.identity.header_prefix}Category: ".encode("ascii"),
    )


def _dialect(row: RouteRow) -> Dialect | None:
    return DIALECTS.get(row.tokens)


def _names_model(dialect: Dialect | None) -> bool:
    return dialect is not None and (dialect.model_member or bool(dialect.model_paths))


def _has_placeholder(match: str, name: str) -> bool:
    return re.search(rf"\{{{re.escape(name)}(?:\.\.\.)?\}}", match) is not None
