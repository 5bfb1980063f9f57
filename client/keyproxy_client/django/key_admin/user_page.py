"""The pages of the actions, and the mixin that adds them to the admin of the user model.

The page with a secret is the direct response to the POST: a redirect would need the secret to be stored in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import django
from django.contrib import messages
from django.contrib.admin import ModelAdmin
from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, URLResolver, path, reverse
from django.views.decorators.debug import sensitive_variables

from keyproxy_client.django.directory.errors import AlreadyIssued, DirectoryError, NotInDirectory
from keyproxy_client.django.directory.interface import DirectoryKey, IssuedKey, actor_of_admin
from keyproxy_client.django.directory.selection import directory
from keyproxy_client.django.key_admin.form_tokens import TokenInvalid, new_token, request_of
from keyproxy_client.django.key_admin.forms import IssueForm, KeyForm, RevokeForm, RotateForm
from keyproxy_client.django.key_admin.inline import KeysInline, keys_of
from keyproxy_client.django.key_admin.permissions import may
from keyproxy_client.django.provisioning.issuing import issue_for, key_life
from keyproxy_client.django.settings import settings
from keyproxy_client.django.users import InvalidId

_log = logging.getLogger("keyproxy_client.admin")


class _Submission(NamedTuple):
    """A form of a user's page, and the action of its token: "issue", or "rotate" with the id of the key."""

    user: Any
    form: KeyForm
    action: str


class KeyAdminMixin(ModelAdmin):  # type: ignore[type-arg]
    """Keys on the page of a user. Projects with an admin site of their own add it to their user admin."""

    def get_inlines(self, request: HttpRequest, obj: Any) -> list[Any]:
        """The list of keys comes last; there is none for a user that is being added, and with `BACKEND` "off"."""
        inlines = list(super().get_inlines(request, obj))
        has_keys = obj is not None and obj.pk is not None and settings().backend != "off"
        return [*inlines, KeysInline] if has_keys else inlines

    def get_urls(self) -> list[URLResolver | URLPattern]:
        """The pages of the actions, before the catch-all pattern of the user page."""
        actions: tuple[tuple[str, str, Callable[..., HttpResponse]], ...] = (
            ("<path:object_id>/keyproxy/issue/", "issue", self._issue_page),
            ("<path:object_id>/keyproxy/<str:key_id>/rotate/", "rotate", self._rotate_page),
            ("<path:object_id>/keyproxy/<str:key_id>/revoke/", "revoke", self._revoke_page),
        )
        # Without the caching headers of the admin: the page with the secret sets its own.
        return [
            *(
                path(route, self.admin_site.admin_view(view, cacheable=True), name=f"keyproxy_{name}_key")
                for route, name, view in actions
            ),
            *super().get_urls(),
        ]

    @sensitive_variables("issued")
    def _issue_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        user = self._user(request, object_id, "issue")
        form = IssueForm(request.POST or None, initial={"token": new_token(request.user.pk, user.pk, "issue")})

        def perform(wanted: str) -> IssuedKey:
            return issue_for(
                user,
                actor=actor_of_admin(request.user.pk),
                name=form.cleaned_data["name"],
                scopes=form.cleaned_data["scopes"],
                is_test=form.cleaned_data["mode"] == "test",
                life=form.life(),
                request=wanted,
            )

        return self._once(request, _Submission(user, form, "issue"), perform)

    def _rotate_page(self, request: HttpRequest, object_id: str, key_id: str) -> HttpResponse:
        user = self._user(request, object_id, "rotate")
        self._key(request, user, key_id)
        action = f"rotate {key_id}"
        form = RotateForm(request.POST or None, initial={"token": new_token(request.user.pk, user.pk, action)})

        def perform(wanted: str) -> IssuedKey:
            grace, actor = form.grace_period(), actor_of_admin(request.user.pk)
            return directory().keys.rotate(key_id, grace=grace, life=key_life(), actor=actor, request=wanted)

        return self._once(request, _Submission(user, form, action), perform)

    def _revoke_page(self, request: HttpRequest, object_id: str, key_id: str) -> HttpResponse:
        user = self._user(request, object_id, "revoke")
        key = self._key(request, user, key_id)
        form = RevokeForm(request.POST or None)
        if request.method == "POST" and form.is_valid():
            reason = form.cleaned_data["reason"] or "revoked in Django's admin"
            try:
                directory().keys.revoke(key_id, reason, actor=actor_of_admin(request.user.pk))
            except DirectoryError as error:
                form.add_error(None, str(error))
            else:
                self._record(request, user, f"Revoked API key {key_id}.")
                messages.success(request, f"The key {key.hint or key_id} is revoked.")
                return HttpResponseRedirect(self._url_of(user))
        return self._form(request, user, form, "revoke", key=key)

    def _once(self, request: HttpRequest, submission: _Submission, perform: Callable[[str], IssuedKey]) -> HttpResponse:
        """Show the form; when it is submitted, perform the action once and show the secret."""
        user, form, action = submission
        verb = action.partition(" ")[0]
        if request.method != "POST" or not form.is_valid():
            return self._form(request, user, form, verb)
        try:
            wanted = request_of(form.cleaned_data["token"], request.user.pk, user.pk, action)
            issued = perform(wanted)
        except AlreadyIssued:
            return self._secret_page(request, user, None)
        except (DirectoryError, TokenInvalid, InvalidId) as error:
            form.add_error(None, str(error))
            # A failed submission issued nothing, or its outcome is unknown: the token stays, and recognises a repetition.
            return self._form(request, user, form, verb)
        self._record(request, user, f"{'Issued' if verb == 'issue' else 'Rotated to'} API key {issued.key_id}.")
        return self._secret_page(request, user, issued)

    @sensitive_variables("issued", "context")
    def _secret_page(self, request: HttpRequest, user: Any, issued: IssuedKey | None) -> HttpResponse:
        context = {**self._context(request, user), "title": "API key", "issued": issued}
        page = TemplateResponse(request, "keyproxy/admin/secret.html", context)
        page["Cache-Control"] = "no-store"
        page["Referrer-Policy"] = "no-referrer"
        # Rendered here, so that a fault of a template is one of this view.
        return page.render()

    def _form(
        self, request: HttpRequest, user: Any, form: Any, verb: str, *, key: DirectoryKey | None = None
    ) -> HttpResponse:
        title = {"issue": "Issue an API key", "rotate": "Rotate an API key", "revoke": "Revoke an API key"}[verb]
        context = {**self._context(request, user), "title": title, "form": form, "verb": verb, "key": key}
        page = TemplateResponse(request, "keyproxy/admin/action.html", context)
        page["Cache-Control"] = "no-store"
        return page

    def _context(self, request: HttpRequest, user: Any) -> dict[str, Any]:
        # For the links of templates within a site of another name.
        request.current_app = self.admin_site.name  # type: ignore[attr-defined]
        return {
            **self.admin_site.each_context(request),
            "opts": self.model._meta,
            "original": user,
            "user_url": self._url_of(user),
            "has_list_breadcrumbs": django.VERSION >= (6, 1),
        }

    def _url_of(self, user: Any) -> str:
        meta = self.model._meta
        return reverse(f"{self.admin_site.name}:{meta.app_label}_{meta.model_name}_change", args=[quote(user.pk)])

    def _user(self, request: HttpRequest, object_id: str, action: str) -> Any:
        """The user of the page. Raises Http404 or PermissionDenied."""
        user = self.get_object(request, unquote(object_id))
        if user is None:
            raise Http404(f"there is no user with the primary key {object_id!r}")
        if not (self.has_view_or_change_permission(request, user) and may(request, action)):
            raise PermissionDenied
        return user

    def _key(self, request: HttpRequest, user: Any, key_id: str) -> DirectoryKey:
        """A key of the user, and of no other: the address names both."""
        try:
            found = [key for key in keys_of(user) if key.id == key_id]
        except NotInDirectory as error:
            raise Http404(str(error)) from error
        if not found:
            raise Http404(f"the user has no key {key_id!r}")
        return found[0]

    def _record(self, request: HttpRequest, user: Any, text: str) -> None:
        self.log_change(request, user, text)
        _log.info("%s staff member: %s; user: %s", text, request.user.pk, user.pk)
