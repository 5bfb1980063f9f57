-- Keys that act for users of their tenant, agents, the tokens cut from keys for agents, and the public signing keys.
--
-- Expand only. The previous release reads none of it, and treats the new kind of change as a change of every key.

-- Not validated, because all existing rows have the default: that would lock the table while all of it is read.
ALTER TABLE keyproxy.api_keys ADD COLUMN acts_for text NOT NULL DEFAULT 'none';
ALTER TABLE keyproxy.api_keys ADD CONSTRAINT api_keys_acts_for CHECK (acts_for IN ('none', 'tenant')) NOT VALID;
COMMENT ON COLUMN keyproxy.api_keys.acts_for IS 'the users that the key may act for: none, or all of its tenant';

-- The roles of an agent are a ceiling, as those of users are. Null: there is none.
CREATE TABLE keyproxy.agents (
    user_id     text NOT NULL REFERENCES keyproxy.users (id) ON UPDATE CASCADE ON DELETE CASCADE,
    id          text NOT NULL CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'),
    roles       text[] CHECK (cardinality(roles) <= 16 AND array_position(roles, NULL) IS NULL AND keyproxy.are_roles(roles)),
    plan_id     text REFERENCES keyproxy.plans (id) ON UPDATE CASCADE,
    disabled_at timestamptz,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, id)
);
CREATE INDEX agents_plan_id ON keyproxy.agents (plan_id) WHERE plan_id IS NOT NULL;
CREATE INDEX agents_roles ON keyproxy.agents USING gin (roles) WHERE roles IS NOT NULL;

CREATE TABLE keyproxy.agent_tokens (
    id              text PRIMARY KEY CHECK (id ~ '^agt_[0-9A-Za-z]{22}$'),
    digest          bytea NOT NULL UNIQUE CHECK (length(digest) = 32),
    user_id         text NOT NULL,
    agent_id        text NOT NULL,
    root_key_id     text NOT NULL REFERENCES keyproxy.api_keys (id) ON UPDATE CASCADE ON DELETE CASCADE,
    actor_user_id   text REFERENCES keyproxy.users (id) ON UPDATE CASCADE ON DELETE CASCADE,
    parent_token_id text REFERENCES keyproxy.agent_tokens (id) ON UPDATE CASCADE ON DELETE CASCADE,
    scopes          text[] NOT NULL
                    CHECK (cardinality(scopes) <= 64 AND array_position(scopes, NULL) IS NULL
                           AND keyproxy.are_scopes(scopes)),
    audience        text NOT NULL CHECK (audience <> ''),
    token_budget    bigint CHECK (token_budget >= 0),
    request_budget  bigint CHECK (request_budget >= 0),
    depth           int NOT NULL DEFAULT 0 CHECK (depth BETWEEN 0 AND 3),
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz NOT NULL,
    revoked_at      timestamptz,
    revoke_reason   text CHECK (length(revoke_reason) <= 500),
    FOREIGN KEY (user_id, agent_id) REFERENCES keyproxy.agents (user_id, id) ON UPDATE CASCADE ON DELETE CASCADE,
    CONSTRAINT agent_tokens_lifetime CHECK (expires_at <= created_at + interval '15 minutes 5 seconds'),
    CHECK ((parent_token_id IS NULL) = (depth = 0)),
    CHECK (parent_token_id <> id),
    CHECK (revoke_reason IS NULL OR revoked_at IS NOT NULL)
);
COMMENT ON COLUMN keyproxy.agent_tokens.actor_user_id IS 'the owner of the root key, if it was acting for the user when the token was minted';
CREATE INDEX agent_tokens_agent ON keyproxy.agent_tokens (user_id, agent_id);
-- With the expiry, so that counting the live tokens of a key does not read the expired ones.
CREATE INDEX agent_tokens_root_key_id ON keyproxy.agent_tokens (root_key_id, expires_at);
CREATE INDEX agent_tokens_actor_user_id ON keyproxy.agent_tokens (actor_user_id) WHERE actor_user_id IS NOT NULL;
CREATE INDEX agent_tokens_parent_token_id ON keyproxy.agent_tokens (parent_token_id) WHERE parent_token_id IS NOT NULL;
CREATE INDEX agent_tokens_expires_at ON keyproxy.agent_tokens (expires_at);

-- The public halves of the keys that sign agent tokens and assertions. No private half is stored.
CREATE TABLE keyproxy.signing_keys (
    kid         text PRIMARY KEY CHECK (kid ~ '^[A-Za-z0-9_-]{43}$'),
    jwk         jsonb NOT NULL CHECK (jsonb_typeof(jwk) = 'object' AND NOT jwk ? 'd'),
    created_at  timestamptz NOT NULL DEFAULT now(),
    ends_at     timestamptz NOT NULL
);
CREATE INDEX signing_keys_ends_at ON keyproxy.signing_keys (ends_at);

-- The change feed.
ALTER TABLE keyproxy.changes DROP CONSTRAINT changes_kind_check;
ALTER TABLE keyproxy.changes ADD CONSTRAINT changes_kind_check CHECK (kind IN (
    'key', 'user', 'tenant', 'plan', 'all', 'key_limits', 'user_limits', 'tenant_limits', 'window', 'role', 'owned',
    'template', 'signing'
)) NOT VALID;
