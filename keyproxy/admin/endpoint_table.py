"""The method and path of each endpoint, by name: what the server routes by, and what the command line sends.

Plain data, without the models that validate requests, because importing those takes longer than a command runs.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import quote

_PLACEHOLDER: Final = re.compile(r"\{\w+\}")

#: The maximum number of items in a page of a list.
PAGE_MAX: Final = 500


class EndpointAddress(NamedTuple):
    """`path`: may contain placeholders: `{id}`. `is_stream`: the response is lines of JSON."""

    method: str
    path: str
    is_stream: bool = False

    @property
    def has_body(self) -> bool:
        """Whether requests send their fields in the body, rather than in the query."""
        return self.method not in ("GET", "DELETE")

    def path_of(self, *values: str) -> str:
        """The path of one object. `values`: those of the placeholders, in their order."""
        remaining = iter(values)
        return _PLACEHOLDER.sub(lambda _: quote(next(remaining), safe=""), self.path)


ADDRESSES: Final = {
    "list_tenants": EndpointAddress("GET", "/v1/tenants"),
    "create_tenant": EndpointAddress("POST", "/v1/tenants"),
    "show_tenant": EndpointAddress("GET", "/v1/tenants/{id}"),
    "change_tenant": EndpointAddress("PATCH", "/v1/tenants/{id}"),
    "delete_tenant": EndpointAddress("DELETE", "/v1/tenants/{id}"),
    "list_users": EndpointAddress("GET", "/v1/users"),
    "create_user": EndpointAddress("POST", "/v1/users"),
    "show_user": EndpointAddress("GET", "/v1/users/{id}"),
    "change_user": EndpointAddress("PATCH", "/v1/users/{id}"),
    "delete_user": EndpointAddress("DELETE", "/v1/users/{id}"),
    "list_keys": EndpointAddress("GET", "/v1/keys"),
    "issue_key": EndpointAddress("POST", "/v1/keys"),
    "issue_keys": EndpointAddress("POST", "/v1/keys/issue"),
    "revoke_keys": EndpointAddress("POST", "/v1/keys/revoke"),
    "show_key": EndpointAddress("GET", "/v1/keys/{id}"),
    "change_key": EndpointAddress("PATCH", "/v1/keys/{id}"),
    "delete_key": EndpointAddress("DELETE", "/v1/keys/{id}"),
    "rotate_key": EndpointAddress("POST", "/v1/keys/{id}/rotate"),
    "revoke_key": EndpointAddress("POST", "/v1/keys/{id}/revoke"),
    "suspend_key": EndpointAddress("POST", "/v1/keys/{id}/suspend"),
    "resume_key": EndpointAddress("POST", "/v1/keys/{id}/resume"),
    "show_origins": EndpointAddress("GET", "/v1/keys/{id}/origins"),
    "mint_agent_token": EndpointAddress("POST", "/v1/keys/{id}/agent-tokens"),
    "show_agent_token": EndpointAddress("GET", "/v1/agent-tokens/{id}"),
    "revoke_agent_token": EndpointAddress("POST", "/v1/agent-tokens/{id}/revoke"),
    "list_agents": EndpointAddress("GET", "/v1/users/{id}/agents"),
    "show_agent": EndpointAddress("GET", "/v1/users/{id}/agents/{agent}"),
    "change_agent": EndpointAddress("PATCH", "/v1/users/{id}/agents/{agent}"),
    "revoke_agent": EndpointAddress("POST", "/v1/users/{id}/agents/{agent}/revoke"),
    "list_approvals": EndpointAddress("GET", "/v1/approvals"),
    "show_approval": EndpointAddress("GET", "/v1/approvals/{id}"),
    "approve_call": EndpointAddress("POST", "/v1/approvals/{id}/approve"),
    "deny_call": EndpointAddress("POST", "/v1/approvals/{id}/deny"),
    "list_consents": EndpointAddress("GET", "/v1/consents"),
    "show_consent": EndpointAddress("GET", "/v1/consents/{id}"),
    "grant_consent": EndpointAddress("POST", "/v1/consents"),
    "revoke_consent": EndpointAddress("POST", "/v1/consents/{id}/revoke"),
    "report_leaked_key": EndpointAddress("POST", "/v1/leaked-keys"),
    "report_leaked_text": EndpointAddress("POST", "/v1/leaked-texts"),
    "find_keys": EndpointAddress("POST", "/v1/keys/whose"),
    "import_keys": EndpointAddress("POST", "/v1/keys/import"),
    "list_plans": EndpointAddress("GET", "/v1/plans"),
    "show_plan": EndpointAddress("GET", "/v1/plans/{id}"),
    "set_plan": EndpointAddress("PUT", "/v1/plans/{id}"),
    "change_plan": EndpointAddress("PATCH", "/v1/plans/{id}"),
    "delete_plan": EndpointAddress("DELETE", "/v1/plans/{id}"),
    "list_roles": EndpointAddress("GET", "/v1/roles"),
    "show_role": EndpointAddress("GET", "/v1/roles/{id}"),
    "set_role": EndpointAddress("PUT", "/v1/roles/{id}"),
    "delete_role": EndpointAddress("DELETE", "/v1/roles/{id}"),
    "list_owned": EndpointAddress("GET", "/v1/owned"),
    "show_owned": EndpointAddress("GET", "/v1/owned/{kind}/{id}"),
    "add_owned": EndpointAddress("PUT", "/v1/owned/{kind}/{id}"),
    "remove_owned": EndpointAddress("DELETE", "/v1/owned/{kind}/{id}"),
    "list_prompts": EndpointAddress("GET", "/v1/prompts"),
    "show_prompt": EndpointAddress("GET", "/v1/prompts/{id}"),
    "register_prompt": EndpointAddress("PUT", "/v1/prompts/{id}"),
    "remove_prompt": EndpointAddress("DELETE", "/v1/prompts/{id}"),
    "list_provider_keys": EndpointAddress("GET", "/v1/provider-keys"),
    "add_provider_key": EndpointAddress("POST", "/v1/provider-keys"),
    "reseal_provider_keys": EndpointAddress("POST", "/v1/provider-keys/reseal"),
    "show_provider_key": EndpointAddress("GET", "/v1/provider-keys/{id}"),
    "delete_provider_key": EndpointAddress("DELETE", "/v1/provider-keys/{id}"),
    "rotate_provider_key": EndpointAddress("POST", "/v1/provider-keys/{id}/rotate"),
    "revoke_provider_key": EndpointAddress("POST", "/v1/provider-keys/{id}/revoke"),
    "list_oauth_clients": EndpointAddress("GET", "/v1/oauth-clients"),
    "create_oauth_client": EndpointAddress("POST", "/v1/oauth-clients"),
    "show_oauth_client": EndpointAddress("GET", "/v1/oauth-clients/{client}"),
    "change_oauth_client": EndpointAddress("PATCH", "/v1/oauth-clients/{client}"),
    "delete_oauth_client": EndpointAddress("DELETE", "/v1/oauth-clients/{client}"),
    "list_grants": EndpointAddress("GET", "/v1/grants"),
    "list_grants_of_user": EndpointAddress("GET", "/v1/users/{id}/grants"),
    "revoke_grants": EndpointAddress("POST", "/v1/grants/revoke"),
    "show_grant": EndpointAddress("GET", "/v1/grants/{id}"),
    "change_grant": EndpointAddress("PATCH", "/v1/grants/{id}"),
    "delete_grant": EndpointAddress("DELETE", "/v1/grants/{id}"),
    "list_sessions": EndpointAddress("GET", "/v1/sessions"),
    "revoke_sessions": EndpointAddress("POST", "/v1/sessions/revoke"),
    "show_session": EndpointAddress("GET", "/v1/sessions/{id}"),
    "delete_session": EndpointAddress("DELETE", "/v1/sessions/{id}"),
    "list_oauth_subjects": EndpointAddress("GET", "/v1/oauth-subjects"),
    "link_oauth_subject": EndpointAddress("POST", "/v1/oauth-subjects"),
    "unlink_oauth_subject": EndpointAddress("DELETE", "/v1/oauth-subjects"),
    "list_audit": EndpointAddress("GET", "/v1/audit"),
    "export_audit": EndpointAddress("GET", "/v1/audit/export", is_stream=True),
    "show_token": EndpointAddress("GET", "/v1/token"),
    "show_usage": EndpointAddress("GET", "/v1/usage"),
    "export_usage_sums": EndpointAddress("GET", "/v1/usage/export", is_stream=True),
    "export_usage": EndpointAddress("GET", "/v1/usage/events", is_stream=True),
    "credit_window": EndpointAddress("POST", "/v1/usage/credits"),
    "show_limits": EndpointAddress("GET", "/v1/users/{id}/limits"),
    "explain_key": EndpointAddress("GET", "/v1/keys/{id}/explain"),
    "explain_request": EndpointAddress("POST", "/v1/keys/{id}/explain"),
    "explain_agent_token": EndpointAddress("GET", "/v1/agent-tokens/{id}/explain"),
    "explain_agent_token_request": EndpointAddress("POST", "/v1/agent-tokens/{id}/explain"),
}
