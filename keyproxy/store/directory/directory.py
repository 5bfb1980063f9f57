"""The directory of tenants, users, keys, agents, plans, roles and owned ids, and its audit log.

Every change is one transaction that includes its audit rows. Provisioning is idempotent: creating an existing user again
returns it, without a second key. The plaintext of a key exists in the return value of the call that created it, and
nowhere else.

Each kind of entity has its own object, and all share one context. The command line and the admin API use nothing else.
"""

from __future__ import annotations

from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.schema import Settings
from keyproxy.config.tools.tool_settings import ApprovalSettings
from keyproxy.store.directory.access.owned_ids import OwnedIdStore
from keyproxy.store.directory.access.prompts import PromptTemplateStore
from keyproxy.store.directory.access.roles import RoleStore
from keyproxy.store.directory.accounts import TenantStore, UserStore
from keyproxy.store.directory.agents.agent_tokens import AgentTokenStore, OperatorMint
from keyproxy.store.directory.agents.agents import AgentStore
from keyproxy.store.directory.approvals.approvals import ApprovalDecisions, ApprovalFilter
from keyproxy.store.directory.approvals.consents import ConsentFilter, ConsentStore
from keyproxy.store.directory.audit import AuditFilter, AuditLog
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.credits import Credit, CreditStore
from keyproxy.store.directory.entities import Actor, Entity, EntityPage, KeyWish, etag
from keyproxy.store.directory.errors import (
    Conflict,
    DelegationRefused,
    DirectoryError,
    Invalid,
    NotFound,
    NotPermitted,
    Outdated,
    TooManyTokens,
)
from keyproxy.store.directory.import_keys import ImportedKey, ImportReport, KeyImporter
from keyproxy.store.directory.key_batches import KeyBatches, Revocation
from keyproxy.store.directory.keys import KeyFilter, KeyStore
from keyproxy.store.directory.leaked_keys import LeakedKeys
from keyproxy.store.directory.oauth.client_wish import OAuthClientWish
from keyproxy.store.directory.oauth.grants import OAuthGrantStore
from keyproxy.store.directory.oauth.oauth_clients import OAuthClientStore
from keyproxy.store.directory.oauth.sessions import OAuthSessionStore
from keyproxy.store.directory.oauth.subjects import OAuthSubjectStore
from keyproxy.store.directory.plans import PlanStore
from keyproxy.store.directory.provider_keys.provider_keys import ProviderKeyStore, SecretHandler
from keyproxy.store.postgres.database import StatementRunner

__all__ = [
    "Actor",
    "ApprovalFilter",
    "AuditFilter",
    "Conflict",
    "ConsentFilter",
    "Credit",
    "DelegationRefused",
    "Directory",
    "DirectoryError",
    "Entity",
    "EntityPage",
    "ImportReport",
    "ImportedKey",
    "Invalid",
    "KeyFilter",
    "KeyWish",
    "NotFound",
    "NotPermitted",
    "OAuthClientWish",
    "Outdated",
    "Revocation",
    "TooManyTokens",
    "etag",
]


class Directory:
    """All operations, by kind of entity. Every method raises DirectoryError, StoreConflict or StoreUnavailable."""

    def __init__(
        self,
        database: StatementRunner,
        key_format: KeyFormat,
        actor: Actor,
        *,
        tenant_id: str | None = None,
        mint: OperatorMint | None = None,
        approvals: ApprovalSettings | None = None,
        secrets: SecretHandler | None = None,
        settings: Settings | None = None,
    ) -> None:
        """`tenant_id`: the tenant that this directory is bound to; None: it is not bound. `mint`: for `agent_tokens`.

        `approvals`: for how long decisions on approvals are valid. `secrets`: for `provider_keys`.
        `settings`: for `oauth_clients` and `oauth_subjects`.
        """
        settings = settings or Settings()
        context = DirectoryContext(database, key_format, actor, tenant_id)
        self.tenants = TenantStore(context)
        self.users = UserStore(context)
        self.keys = KeyStore(context)
        self.key_batches = KeyBatches(context)
        self.key_importer = KeyImporter(context)
        self.leaked_keys = LeakedKeys(context)
        self.agents = AgentStore(context)
        self.agent_tokens = AgentTokenStore(context, mint)
        self.approvals = ApprovalDecisions(context, approvals or ApprovalSettings())
        self.consents = ConsentStore(context)
        self.plans = PlanStore(context)
        self.roles = RoleStore(context)
        self.owned = OwnedIdStore(context)
        self.prompts = PromptTemplateStore(context)
        self.provider_keys = ProviderKeyStore(context, secrets)
        self.credits = CreditStore(context)
        self.oauth_clients = OAuthClientStore(context, settings)
        self.oauth_grants = OAuthGrantStore(context)
        self.oauth_sessions = OAuthSessionStore(context)
        self.oauth_subjects = OAuthSubjectStore(context, settings)
        self.audit = AuditLog(context)
