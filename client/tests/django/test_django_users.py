"""Which user of keyproxy a user of Django is, and back."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AnonymousUser
from django.core.exceptions import ImproperlyConfigured

from keyproxy_client.acting import acting_as
from keyproxy_client.django.settings import settings
from keyproxy_client.django.users import InvalidId, faults, keyproxy_id, tenant_of, user_of
from keyproxy_client.identity import Identity
from project.accounts.ids import by_name, by_name_with_inverse, tenant_by_mail
from project.testing import keyproxy_settings

pytestmark = pytest.mark.usefixtures("db")


def identity(user: str, tenant: str = "acme") -> Identity:
    return Identity(user, tenant, frozenset(), False, "key_1")


@pytest.fixture
def ada(db: None) -> Any:
    return get_user_model().objects.create_user("ada", email="ada@acme.example")


FORMS = ["u_{pk}", "{pk}", "{username}", "{username}.x", "a-{id}-b", by_name_with_inverse,
         "project.accounts.ids.by_name_with_inverse"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_id_leads_back_to_its_user(ada: Any, form: Any) -> None:
    other = get_user_model().objects.create_user("bob")
    with keyproxy_settings(USER_ID=form):
        assert user_of(identity(keyproxy_id(ada))) == ada
        assert keyproxy_id(other) != keyproxy_id(ada)
        assert user_of(identity("unknown")) is None


@pytest.mark.parametrize(
    "form", ["u_0{}", "u_+{}", "u_{} ", "U_{}", "{}", "u_", "u_x", "u_99999999999999999999", "u_1_{}"]
)
def test_an_id_in_another_spelling_is_no_user(ada: Any, form: str) -> None:
    assert user_of(identity(form.format(ada.pk))) is None


def test_an_identity_of_another_tenant_is_no_user(ada: Any) -> None:
    assert user_of(identity(keyproxy_id(ada))) == ada
    assert user_of(identity(keyproxy_id(ada), "globex")) is None
    with keyproxy_settings(TENANT="project.accounts.ids.tenant_by_mail"):
        assert tenant_of(ada) == "acme"
        ada.email = "ada@globex.example"
        ada.save()
        assert user_of(identity(keyproxy_id(ada))) is None
        assert user_of(identity(keyproxy_id(ada), "globex")) == ada


def test_a_value_that_is_no_id_is_refused_without_showing_it(ada: Any) -> None:
    ada.username = "not an id"
    for form in ("{username}", by_name):
        with keyproxy_settings(USER_ID=form), pytest.raises(InvalidId) as caught:
            keyproxy_id(ada)
        assert "not an id" not in str(caught.value)
    ada.email = ""
    with keyproxy_settings(TENANT=tenant_by_mail), pytest.raises(InvalidId, match="TENANT"):
        tenant_of(ada)
    with keyproxy_settings(USER_ID="u_{email}"), pytest.raises(InvalidId, match="empty"):
        keyproxy_id(ada)


def test_an_anonymous_or_unsaved_user_has_no_id() -> None:
    for user in (AnonymousUser(), get_user_model()(username="new")):
        with pytest.raises(InvalidId):
            keyproxy_id(user)


@pytest.mark.parametrize("form", [by_name, "{pk}-{username}"], ids=str)
def test_an_id_without_an_inverse_is_a_fault_of_the_settings(ada: Any, form: Any) -> None:
    with keyproxy_settings(USER_ID=form), pytest.raises(ImproperlyConfigured, match="USER_ID"):
        user_of(identity(keyproxy_id(ada)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"USER_ID": "{username}"}, None),
        ({"USER_ID": "{first_name}-{username}"}, None),
        ({"USER_ID": "{is_authenticated}"}, None),
        ({"USER_ID": "{email}"}, "is not unique"),
        ({"USER_ID": "{first_name}-{last_name}"}, "is not unique"),
        ({"USER_ID": "{uuid}"}, "names 'uuid', which the user model does not have"),
        (
            {"USER_ID": "project.absent.id_of"},
            "which cannot be imported: No module named 'project.absent'",
        ),
        ({"TENANT": "project.accounts.ids.absent"}, "KEYPROXY['TENANT'] is read as the path of a function"),
        ({"TENANT": "project.accounts.ids.__name__"}, "KEYPROXY['TENANT'] is not a function"),
        ({"TENANT": "project.accounts.ids.tenant_by_mail", "USER_ID": "project.accounts.ids.by_name"}, None),
    ],
    ids=str,
)
def test_paths_and_fields_that_do_not_exist_are_faults(changes: dict[str, str], fault: str | None) -> None:
    with keyproxy_settings(**changes):
        found = list(faults(settings()))
    assert found == [] if fault is None else fault in found[0]


@pytest.mark.parametrize("wrong", [None, 42])
def test_acting_as_names_the_type_of_what_is_neither_a_user_nor_an_id(wrong: object) -> None:
    with pytest.raises(TypeError, match=type(wrong).__name__), acting_as(wrong):
        pass
