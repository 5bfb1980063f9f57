"""The directory that the settings select."""

from __future__ import annotations

from keyproxy_client.django.directory.admin_api import AdminApi
from keyproxy_client.django.directory.api_keys import ApiKeys
from keyproxy_client.django.directory.api_users import ApiUsers
from keyproxy_client.django.directory.errors import DirectoryRefused
from keyproxy_client.django.directory.interface import Directory
from keyproxy_client.django.directory.sql_keys import SqlKeys
from keyproxy_client.django.directory.sql_users import SqlUsers
from keyproxy_client.django.settings import settings


def directory() -> Directory:
    """The users and keys of keyproxy, by `BACKEND`. Raises DirectoryRefused if that is "off"."""
    found = settings()
    if found.backend == "sql":
        sql_keys = SqlKeys(found.database, found.key_prefix, found.keys_per_user_max)
        return Directory(SqlUsers(found.database, found.key_prefix), sql_keys)
    if found.backend == "api":
        api = AdminApi(found.admin_url, found.admin_token_file, found.timeout_seconds)
        return Directory(ApiUsers(api), ApiKeys(api, found.keys_per_user_max))
    raise DirectoryRefused('KEYPROXY["BACKEND"] is "off": this project does not manage users and keys')
