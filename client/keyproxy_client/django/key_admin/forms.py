"""The forms of the actions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from keyproxy_client.django.checking import setting_checks
from keyproxy_client.django.settings import settings

_DAYS_MAX = 36_500


class KeyForm(forms.Form):
    """The base: the token that makes a second submission recognisable."""

    token = forms.CharField(widget=forms.HiddenInput)


class IssueForm(KeyForm):
    """The properties of a new key."""

    name = forms.CharField(max_length=200, required=False, help_text="A descriptive name.")
    mode = forms.ChoiceField(choices=[("live", "Live"), ("test", "Test")], widget=forms.RadioSelect)
    scopes = forms.CharField(required=False, help_text="Separated by spaces, such as jobs:read jobs:write.")
    days = forms.IntegerField(
        label="Expires in days", min_value=0, max_value=_DAYS_MAX, help_text="0: the key never expires."
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        found = settings()
        initial = {
            "mode": "live",
            "scopes": " ".join(found.scopes),
            "days": found.key_days,
            **kwargs.pop("initial", {}),
        }
        super().__init__(*args, initial=initial, **kwargs)

    def clean_name(self) -> str:
        """Only what keyproxy accepts as a name."""
        name: str = self.cleaned_data["name"]
        if not name.isprintable():
            raise ValidationError("The name has an unprintable character.")
        return name

    def clean_scopes(self) -> tuple[str, ...]:
        """The scopes as a tuple."""
        words = self.cleaned_data["scopes"].split()
        try:
            found = setting_checks.scopes(words)
        except setting_checks.Fault as error:
            raise ValidationError("A scope is one word, such as jobs:write.") from error
        if len(found) > 64:
            raise ValidationError("A key has at most 64 scopes.")
        return found

    def life(self) -> timedelta | None:
        """The life of the key; None: it never expires."""
        days = self.cleaned_data["days"]
        return timedelta(days=days) if days else None


class RotateForm(KeyForm):
    """How long the old key keeps working."""

    grace = forms.ChoiceField(
        label="The old key works for",
        choices=[("0", "0 seconds"), ("3600", "1 hour"), ("86400", "24 hours"), ("604800", "7 days")],
        initial="86400",
    )

    def grace_period(self) -> timedelta:
        """The chosen time."""
        return timedelta(seconds=int(self.cleaned_data["grace"]))


class RevokeForm(forms.Form):
    """Why a key is revoked. Revoking twice changes nothing, so there is no token."""

    reason = forms.CharField(max_length=500, required=False)
