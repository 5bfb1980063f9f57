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
-- With the expiry, so that counting or noting the live tokens of an agent or a key does not read the expired ones.
CREATE INDEX agent_tokens_agent ON keyproxy.agent_tokens (user_id, agent_id, expires_at);
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

-- An agent is created when a token is first minted for it, so its name is the caller's choice: the number per user is bounded.
-- The lock on the user's row makes the count exact: inserts that count at once would not see each other's rows. It is taken
-- before the row is inserted, in the order that mint_agent_token keeps.
CREATE FUNCTION keyproxy.bound_agents() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM FROM keyproxy.users AS u WHERE u.id = NEW.user_id FOR NO KEY UPDATE;
    PERFORM FROM keyproxy.agents AS a WHERE a.user_id = NEW.user_id OFFSET 999 LIMIT 1;
    IF FOUND AND NOT EXISTS (SELECT FROM keyproxy.agents AS a WHERE a.user_id = NEW.user_id AND a.id = NEW.id) THEN
        RAISE EXCEPTION 'user % has 1000 agents already', NEW.user_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'agents_bound';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER bound BEFORE INSERT ON keyproxy.agents FOR EACH ROW EXECUTE FUNCTION keyproxy.bound_agents();

-- The change feed. A token is known by its digest, as a key is, so its changes are changes of a key. A change of a key, an
-- agent or a token also concerns the live tokens below it.
ALTER TABLE keyproxy.changes DROP CONSTRAINT changes_kind_check;
ALTER TABLE keyproxy.changes ADD CONSTRAINT changes_kind_check CHECK (kind IN (
    'key', 'user', 'tenant', 'plan', 'all', 'key_limits', 'user_limits', 'tenant_limits', 'window', 'role', 'owned',
    'template', 'signing'
)) NOT VALID;

-- Notes of many tokens are one statement. A token counts as live for a minute longer, because the clocks of proxies may be
-- behind. The callers notify.
CREATE FUNCTION keyproxy.note_tokens_of_key(of_kind text, key_id text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    recently timestamptz := clock_timestamp() - interval '1 minute';
BEGIN
    INSERT INTO keyproxy.changes (kind, subject)
    SELECT of_kind, encode(t.digest, 'hex') FROM keyproxy.agent_tokens AS t
    WHERE t.root_key_id = key_id AND t.expires_at > recently;
END
$$;

-- One level of the chain at a time, with arrays: no plan of a recursive query depends on statistics then.
CREATE FUNCTION keyproxy.note_tokens_below(of_kind text, parents text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    recently timestamptz := clock_timestamp() - interval '1 minute';
    level text[] := parents;
BEGIN
    -- A token has a depth of at most 3.
    FOR _ IN 1..3 LOOP
        level := ARRAY(
            SELECT t.id FROM keyproxy.agent_tokens AS t WHERE t.parent_token_id = ANY (level) AND t.expires_at > recently
        );
        EXIT WHEN level = '{}';
        INSERT INTO keyproxy.changes (kind, subject)
        SELECT of_kind, encode(t.digest, 'hex') FROM keyproxy.agent_tokens AS t WHERE t.id = ANY (level);
    END LOOP;
END
$$;

CREATE FUNCTION keyproxy.note_tokens_of_agent(of_kind text, of_user text, of_agent text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    recently timestamptz := clock_timestamp() - interval '1 minute';
    tokens text[] := ARRAY(
        SELECT t.id FROM keyproxy.agent_tokens AS t
        WHERE t.user_id = of_user AND t.agent_id = of_agent AND t.expires_at > recently
    );
BEGIN
    IF tokens <> '{}' THEN
        INSERT INTO keyproxy.changes (kind, subject)
        SELECT of_kind, encode(t.digest, 'hex') FROM keyproxy.agent_tokens AS t WHERE t.id = ANY (tokens);
        PERFORM keyproxy.note_tokens_below(of_kind, tokens);
        PERFORM pg_notify('keyproxy_changes', '');
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION keyproxy.note_key_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    of_kind text := 'key';
BEGIN
    IF TG_OP = 'UPDATE'
       AND (OLD.id, OLD.user_id, OLD.digest, OLD.scopes, OLD.roles, OLD.is_test, OLD.expires_at, OLD.revoked_at,
            OLD.acts_for)
           IS NOT DISTINCT FROM
           (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.roles, NEW.is_test, NEW.expires_at, NEW.revoked_at,
            NEW.acts_for) THEN
        of_kind := 'key_limits';
    END IF;
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_change(of_kind, encode(OLD.digest, 'hex'));
        PERFORM keyproxy.note_tokens_of_key(of_kind, OLD.id);
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.digest <> OLD.digest THEN
        PERFORM keyproxy.note_change('key', encode(NEW.digest, 'hex'));
    END IF;
    -- Replication and restores may bring tokens before their keys: those tokens are unknown until then.
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.id <> OLD.id THEN
        PERFORM keyproxy.note_tokens_of_key('key', NEW.id);
    END IF;
    -- A key that gets a successor, or loses one, keeps what it may do: only the field about its replacement changes.
    IF OLD.replaces IS DISTINCT FROM NEW.replaces THEN
        PERFORM keyproxy.note_change('key_limits', encode(k.digest, 'hex'))
        FROM keyproxy.api_keys AS k WHERE k.id IN (OLD.replaces, NEW.replaces);
    END IF;
    RETURN NULL;
END
$$;

DROP TRIGGER note_update ON keyproxy.api_keys;
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.api_keys FOR EACH ROW
    WHEN ((OLD.id, OLD.user_id, OLD.digest, OLD.scopes, OLD.roles, OLD.is_test, OLD.plan_id, OLD.expires_at,
           OLD.revoked_at, OLD.replaces, OLD.lineage, OLD.acts_for)
          IS DISTINCT FROM
          (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.roles, NEW.is_test, NEW.plan_id, NEW.expires_at,
           NEW.revoked_at, NEW.replaces, NEW.lineage, NEW.acts_for))
    EXECUTE FUNCTION keyproxy.note_key_change();

-- A new user may be one that a key tried to act for, so it is a change of the user. Tokens, as keys, may come before it.
CREATE OR REPLACE FUNCTION keyproxy.note_owner() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    IF TG_ARGV[0] = 'user' THEN
        PERFORM keyproxy.note_change('user', NEW.id);
        PERFORM keyproxy.note_change('key', encode(k.digest, 'hex'))
        FROM keyproxy.api_keys AS k WHERE k.user_id = NEW.id;
        PERFORM keyproxy.note_change('key', encode(t.digest, 'hex'))
        FROM keyproxy.agent_tokens AS t WHERE t.user_id = NEW.id OR t.actor_user_id = NEW.id;
    ELSE
        PERFORM keyproxy.note_change('key', encode(k.digest, 'hex'))
        FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id WHERE u.tenant_id = NEW.id;
        PERFORM keyproxy.note_change('key', encode(t.digest, 'hex'))
        FROM keyproxy.agent_tokens AS t JOIN keyproxy.users AS u ON u.id = t.user_id WHERE u.tenant_id = NEW.id;
    END IF;
    RETURN NULL;
END
$$;

-- As 0013_limit_changes.sql has made it, but a user may also get the id of one that a key tried to act for.
CREATE OR REPLACE FUNCTION keyproxy.note_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    harmless constant text[] := ARRAY['name', 'plan_id', 'test_plan_id', 'created_at'];
BEGIN
    IF TG_OP = 'UPDATE' AND TG_ARGV[0] <> 'plan' AND to_jsonb(OLD) - harmless = to_jsonb(NEW) - harmless THEN
        PERFORM keyproxy.note_change(TG_ARGV[0] || '_limits', OLD.id);
    ELSE
        PERFORM keyproxy.note_change(TG_ARGV[0], OLD.id);
        IF TG_OP = 'UPDATE' AND NEW.id <> OLD.id THEN
            PERFORM keyproxy.note_change(TG_ARGV[0], NEW.id);
        END IF;
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION keyproxy.note_agent_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    of_kind text := 'key';
BEGIN
    IF TG_OP = 'UPDATE'
       AND (OLD.user_id, OLD.id, OLD.roles, OLD.disabled_at) IS NOT DISTINCT FROM (NEW.user_id, NEW.id, NEW.roles, NEW.disabled_at)
    THEN
        of_kind := 'key_limits';
    END IF;
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_tokens_of_agent(of_kind, OLD.user_id, OLD.id);
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND (NEW.user_id, NEW.id) <> (OLD.user_id, OLD.id) THEN
        PERFORM keyproxy.note_tokens_of_agent(of_kind, NEW.user_id, NEW.id);
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION keyproxy.note_token_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        -- Without a notification, which would make every proxy poll at each mint: only a restore or replication brings a
        -- token that was presented before, and the next poll is early enough.
        INSERT INTO keyproxy.changes (kind, subject) VALUES ('key', encode(NEW.digest, 'hex'));
        RETURN NULL;
    END IF;
    IF TG_OP = 'DELETE' AND OLD.expires_at < clock_timestamp() - interval '1 hour' THEN
        -- Cleanup: no proxy serves it, nor a token below it.
        RETURN NULL;
    END IF;
    PERFORM keyproxy.note_change('key', encode(OLD.digest, 'hex'));
    PERFORM keyproxy.note_tokens_below('key', ARRAY[OLD.id]);
    IF TG_OP = 'UPDATE' AND NEW.digest <> OLD.digest THEN
        PERFORM keyproxy.note_change('key', encode(NEW.digest, 'hex'));
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION keyproxy.note_signing_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM keyproxy.note_change('signing', CASE WHEN TG_OP = 'DELETE' THEN OLD.kid ELSE NEW.kid END);
    RETURN NULL;
END
$$;

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.agents
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_agent_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.agents FOR EACH ROW
    WHEN ((OLD.user_id, OLD.id, OLD.roles, OLD.plan_id, OLD.disabled_at)
          IS DISTINCT FROM (NEW.user_id, NEW.id, NEW.roles, NEW.plan_id, NEW.disabled_at))
    EXECUTE FUNCTION keyproxy.note_agent_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.agents
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_agent_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.agents
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.agent_tokens
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_token_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.agent_tokens FOR EACH ROW
    WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION keyproxy.note_token_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.agent_tokens
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_token_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.agent_tokens
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.signing_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_signing_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.signing_keys FOR EACH ROW
    WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION keyproxy.note_signing_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.signing_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_signing_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.signing_keys
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

-- Also for rows that arrive by logical replication or with session_replication_role = replica.
DO $$
DECLARE
    feed record;
BEGIN
    FOR feed IN
        SELECT tgrelid::regclass AS home, tgname FROM pg_trigger
        WHERE tgname LIKE 'note\_%'
          AND tgrelid IN ('keyproxy.api_keys'::regclass, 'keyproxy.agents'::regclass, 'keyproxy.agent_tokens'::regclass,
                          'keyproxy.signing_keys'::regclass)
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', feed.home, feed.tgname);
    END LOOP;
END
$$;

-- The audit log. An agent has the name `user/agent`. The removal of a token that expired a day ago is cleanup, not a change.
CREATE FUNCTION keyproxy.audit_agent() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    was jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - 'digest' END;
    becomes jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - 'digest' END;
    shown jsonb := coalesce(becomes, was);
BEGIN
    IF TG_OP = 'UPDATE' AND OLD IS NOT DISTINCT FROM NEW
       OR TG_OP = 'DELETE' AND (was ->> 'expires_at')::timestamptz < clock_timestamp() - interval '24 hours' THEN
        RETURN NULL;
    END IF;
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, before, after)
    VALUES (
        keyproxy.actor(), keyproxy.origin(), lower(TG_OP), TG_ARGV[0],
        CASE TG_ARGV[0] WHEN 'agent' THEN (shown ->> 'user_id') || '/' || (shown ->> 'id') ELSE shown ->> 'id' END,
        keyproxy.tenant_of_user(shown ->> 'user_id'), was, becomes
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.agents
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_agent('agent');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.agents
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('agent');
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.agent_tokens
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_agent('agent_token');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.agent_tokens
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('agent_token');

-- What a credential may grant in a token: the key `key_id`, or the token `token_id` cut from it. `for_user`: the user that the
-- key acts for; null: its owner, or the user of the token. `new_agent`: the agent that gets the token.
--
-- `refusal`: why no token may be minted; null: one may be, within the other values. `held`: what the credential may do.
-- `grantable`: that, within the ceiling of the new agent. `agents`: of the credential, the current one first. Budgets are
-- null where there is none; `expires_at` is when the first of the chain ends.
CREATE FUNCTION keyproxy.minting_authority(
    key_id text, token_id text, for_user text, new_agent text, OUT refusal text, OUT user_id text, OUT tenant_id text,
    OUT actor_user_id text, OUT is_test boolean, OUT agents text[], OUT held text[], OUT grantable text[],
    OUT token_budget bigint, OUT request_budget bigint, OUT expires_at timestamptz, OUT is_agent_new boolean
) LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    right_now constant timestamptz := clock_timestamp();
    depth_max constant int := 3;
    effective_scopes_max constant int := 128;
    root record;
    principal record;
    link record;
    agent record;
    next_token text := token_id;
    ceiling text[];
BEGIN
    SELECT k.user_id, k.scopes, k.roles, k.is_test, k.expires_at, k.revoked_at, k.acts_for, u.tenant_id,
           u.roles AS user_roles, t.roles AS tenant_roles, coalesce(u.disabled_at, t.disabled_at) AS disabled_at
    INTO root
    FROM keyproxy.api_keys AS k
    JOIN keyproxy.users AS u ON u.id = k.user_id
    JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
    WHERE k.id = key_id;
    IF NOT FOUND THEN
        refusal := 'the key does not exist';
        RETURN;
    END IF;
    IF token_id IS NULL THEN
        user_id := coalesce(for_user, root.user_id);
        actor_user_id := CASE WHEN for_user IS NOT NULL THEN root.user_id END;
    ELSE
        SELECT t.user_id, t.actor_user_id INTO principal FROM keyproxy.agent_tokens AS t WHERE t.id = token_id;
        user_id := principal.user_id;
        actor_user_id := principal.actor_user_id;
    END IF;
    SELECT u.id, u.tenant_id, u.roles, u.disabled_at INTO principal FROM keyproxy.users AS u WHERE u.id = user_id;
    tenant_id := root.tenant_id;
    is_test := root.is_test;
    expires_at := root.expires_at;
    refusal := CASE
        WHEN root.revoked_at IS NOT NULL THEN 'the key is revoked'
        WHEN root.expires_at <= right_now THEN 'the key has expired'
        WHEN root.disabled_at IS NOT NULL THEN 'the owner or the tenant is disabled'
        WHEN principal.id IS NULL THEN 'the user or the token does not exist'
        WHEN token_id IS NOT NULL AND for_user <> user_id THEN 'the token is of another user'
        WHEN principal.disabled_at IS NOT NULL THEN 'the user is disabled'
        WHEN principal.tenant_id <> root.tenant_id THEN 'the user is of another tenant'
        WHEN actor_user_id IS NULL AND user_id <> root.user_id OR actor_user_id <> root.user_id THEN 'the key has another owner'
        WHEN actor_user_id IS NOT NULL AND root.acts_for <> 'tenant' THEN 'the key acts for no other user'
    END;
    IF refusal IS NOT NULL THEN
        RETURN;
    END IF;
    held := keyproxy.effective_scopes(root.scopes, root.roles, root.user_roles, root.tenant_roles);
    IF cardinality(held) > effective_scopes_max THEN
        held := '{}';
    END IF;
    IF actor_user_id IS NOT NULL THEN
        ceiling := keyproxy.scopes_of_roles(principal.roles);
        held := ARRAY(SELECT s.scope FROM unnest(held) AS s (scope) WHERE ceiling IS NULL OR s.scope = ANY (ceiling));
    END IF;
    agents := '{}';
    WHILE next_token IS NOT NULL LOOP
        SELECT t.scopes, t.expires_at, t.revoked_at, t.token_budget, t.request_budget, t.parent_token_id, t.agent_id,
               t.user_id, t.actor_user_id, t.root_key_id, a.roles, a.disabled_at
        INTO link
        FROM keyproxy.agent_tokens AS t
        JOIN keyproxy.agents AS a ON a.user_id = t.user_id AND a.id = t.agent_id
        WHERE t.id = next_token;
        refusal := CASE
            WHEN link.root_key_id IS DISTINCT FROM key_id OR link.user_id <> user_id
                 OR link.actor_user_id IS DISTINCT FROM actor_user_id OR cardinality(agents) > depth_max
                THEN 'the token was not cut from this key'
            WHEN link.revoked_at IS NOT NULL THEN 'a token of the chain is revoked'
            WHEN link.expires_at <= right_now THEN 'a token of the chain has expired'
            WHEN link.disabled_at IS NOT NULL THEN 'an agent of the chain is disabled'
        END;
        IF refusal IS NOT NULL THEN
            RETURN;
        END IF;
        ceiling := keyproxy.scopes_of_roles(link.roles);
        held := ARRAY(
            SELECT s.scope FROM unnest(held) AS s (scope)
            WHERE s.scope = ANY (link.scopes) AND (ceiling IS NULL OR s.scope = ANY (ceiling))
        );
        agents := agents || link.agent_id;
        expires_at := least(expires_at, link.expires_at);
        token_budget := least(token_budget, link.token_budget);
        request_budget := least(request_budget, link.request_budget);
        next_token := link.parent_token_id;
    END LOOP;
    grantable := held;
    SELECT a.roles, a.disabled_at INTO agent FROM keyproxy.agents AS a WHERE a.user_id = principal.id AND a.id = new_agent;
    is_agent_new := NOT FOUND;
    IF is_agent_new THEN
        PERFORM FROM keyproxy.agents AS a WHERE a.user_id = principal.id OFFSET 999 LIMIT 1;
        IF FOUND THEN
            refusal := 'the user has 1000 agents already';
        END IF;
    ELSIF agent.disabled_at IS NOT NULL THEN
        refusal := 'the agent is disabled';
    ELSE
        ceiling := keyproxy.scopes_of_roles(agent.roles);
        grantable := ARRAY(SELECT s.scope FROM unnest(held) AS s (scope) WHERE ceiling IS NULL OR s.scope = ANY (ceiling));
    END IF;
END
$$;

-- Mint a token, if every bound holds against the rows of this moment. A proxy, which may insert no token, may call this: it
-- grants no more than the parent has, and only to a parent that holds `agents:mint`. `is_operator`: without that scope, for
-- roles that may insert tokens themselves; the audit log then has the actor that the client set, or `operator`.
--
-- `outcome`: `minted`; `refused`; `full`, if the key has `tokens_max` live tokens, with the time until the first expires; or
-- `busy`, if another transaction keeps a row of the chain locked.
--
-- The locks, in the order in which deletions take them too: the tenant, the users, the key, the agents, the tokens. That of
-- the key makes the count of its tokens exact, that of the user the count of its agents. Those of the whole chain order this
-- before or after a change of each, so that either the change is seen here, or its trigger notes the new token. A transaction
-- with the opposite order is not the one that has to give way: a mint waits less than a server takes to detect a deadlock.
CREATE FUNCTION keyproxy.mint_agent_token(
    new_id text, new_digest bytea, key_id text, token_id text, for_user text, new_agent text, role text, new_scopes text[],
    new_audience text, new_token_budget bigint, new_request_budget bigint, expires_wall_seconds float8, depth_max int,
    tokens_max int, is_operator boolean, operator text, OUT outcome text, OUT reset_seconds float8
) LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '900ms' AS $$
DECLARE
    budget_max constant bigint := 1000000000000000;
    right_now timestamptz;
    owner record;
    principal text;
    one_user text;
    link record;
    chain_agents text[] := ARRAY[new_agent];
    chain_tokens text[] := '{}';
    next_token text := token_id;
    live bigint;
    first_end timestamptz;
BEGIN
    -- At other levels the checks would read the rows of an earlier moment.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'agent tokens are minted at the isolation level read committed'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    IF is_operator AND NOT has_table_privilege(session_user, 'keyproxy.agent_tokens', 'INSERT') THEN
        RAISE EXCEPTION 'role % may not mint agent tokens as an operator', session_user
            USING ERRCODE = 'insufficient_privilege';
    END IF;

    SELECT k.user_id, u.tenant_id INTO owner
    FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id WHERE k.id = key_id;
    principal := coalesce(for_user, owner.user_id);
    WHILE next_token IS NOT NULL AND cardinality(chain_tokens) <= 3 LOOP
        SELECT t.user_id, t.agent_id, t.parent_token_id INTO link FROM keyproxy.agent_tokens AS t WHERE t.id = next_token;
        principal := coalesce(link.user_id, principal);
        chain_agents := chain_agents || link.agent_id;
        chain_tokens := chain_tokens || next_token;
        next_token := link.parent_token_id;
    END LOOP;
    -- An owner that is gone when its lock is free may exist again already, but is not locked: the order would be another one.
    outcome := 'refused';
    BEGIN
        PERFORM FROM keyproxy.tenants AS t WHERE t.id = owner.tenant_id FOR KEY SHARE;
        IF NOT FOUND THEN
            RETURN;
        END IF;
        FOREACH one_user IN ARRAY ARRAY[least(owner.user_id, principal), greatest(owner.user_id, principal)] LOOP
            IF one_user = principal THEN
                PERFORM FROM keyproxy.users AS u WHERE u.id = one_user FOR NO KEY UPDATE;
            ELSE
                PERFORM FROM keyproxy.users AS u WHERE u.id = one_user FOR KEY SHARE;
            END IF;
            IF NOT FOUND THEN
                RETURN;
            END IF;
        END LOOP;
        PERFORM FROM keyproxy.api_keys AS k WHERE k.id = key_id FOR NO KEY UPDATE;
        IF NOT FOUND THEN
            RETURN;
        END IF;
        PERFORM FROM keyproxy.agents AS a WHERE a.user_id = principal AND a.id = ANY (chain_agents) ORDER BY a.id FOR SHARE;
        PERFORM FROM keyproxy.agent_tokens AS t WHERE t.id = ANY (chain_tokens) ORDER BY t.depth FOR SHARE;
    EXCEPTION WHEN lock_not_available THEN
        outcome := 'busy';
        RETURN;
    END;

    right_now := clock_timestamp();
    SELECT count(*), min(t.expires_at) INTO live, first_end FROM keyproxy.agent_tokens AS t
    WHERE t.root_key_id = key_id AND t.expires_at > right_now AND t.revoked_at IS NULL;
    IF (live < tokens_max) IS NOT TRUE THEN
        outcome := 'full';
        reset_seconds := extract(epoch FROM first_end - right_now);
        RETURN;
    END IF;

    IF is_operator IS NOT TRUE THEN
        PERFORM set_config('keyproxy.actor', coalesce('agent_token:' || token_id, 'key:' || key_id), true);
    ELSIF coalesce(current_setting('keyproxy.actor', true), '') = '' THEN
        PERFORM set_config('keyproxy.actor', operator, true);
    END IF;
    WITH parent AS MATERIALIZED (
        SELECT p.*, to_timestamp(expires_wall_seconds) AS ends_at
        FROM keyproxy.minting_authority(key_id, token_id, for_user, new_agent) AS p
        WHERE p.refusal IS NULL
          AND (is_operator OR 'agents:mint' = ANY (p.held))
          AND new_scopes <> '{}' AND new_scopes <@ p.grantable
          AND (role IS NULL OR new_scopes <@ keyproxy.scopes_of_roles(ARRAY[role]))
          AND cardinality(p.agents) <= depth_max AND cardinality(p.agents) <= 3
          AND to_timestamp(expires_wall_seconds) > right_now
          AND to_timestamp(expires_wall_seconds) <= least(p.expires_at, right_now + interval '15 minutes 5 seconds')
          AND coalesce(new_token_budget, 0) BETWEEN 0 AND least(p.token_budget, budget_max)
          AND coalesce(new_request_budget, 0) BETWEEN 0 AND least(p.request_budget, budget_max)
    ), new_row AS (
        INSERT INTO keyproxy.agents (user_id, id)
        SELECT p.user_id, new_agent FROM parent AS p WHERE p.is_agent_new
        ON CONFLICT DO NOTHING
    )
    INSERT INTO keyproxy.agent_tokens (
        id, digest, user_id, agent_id, root_key_id, actor_user_id, parent_token_id, scopes, audience, token_budget,
        request_budget, depth, created_at, expires_at
    )
    SELECT new_id, new_digest, p.user_id, new_agent, key_id, p.actor_user_id, token_id, new_scopes, new_audience,
           new_token_budget, new_request_budget, cardinality(p.agents), right_now, p.ends_at
    FROM parent AS p;
    outcome := CASE WHEN FOUND THEN 'minted' ELSE 'refused' END;
END
$$;

-- Delete what ended more than a day ago: tokens, with their windows, and signing keys; `portion` of each at most. Whether
-- there may be more.
CREATE FUNCTION keyproxy.tend_agent_tokens(portion int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '250ms' AS $$
DECLARE
    long_ago constant timestamptz := clock_timestamp() - interval '24 hours';
    ended text[];
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('keyproxy.tend_agent_tokens', 0)) THEN
        RETURN false;
    END IF;
    DELETE FROM keyproxy.signing_keys AS s WHERE s.kid = ANY (ARRAY(
        SELECT o.kid FROM keyproxy.signing_keys AS o WHERE o.ends_at < long_ago
        ORDER BY o.ends_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    ended := ARRAY(
        SELECT t.id FROM keyproxy.agent_tokens AS t WHERE t.expires_at < long_ago
        ORDER BY t.expires_at LIMIT portion FOR UPDATE SKIP LOCKED
    );
    DELETE FROM keyproxy.windows AS w WHERE w.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.windows AS o
        WHERE o.pool_kind = 'token' AND o.pool_id = ANY (ended) AND o.held = 0
          AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.window_id = o.id)
        FOR UPDATE SKIP LOCKED
    ));
    DELETE FROM keyproxy.agent_tokens AS t WHERE t.id = ANY (ended);
    RETURN cardinality(ended) >= portion;
END
$$;

-- Proxies of the previous release, which may not read the table, call it in forget_windows: see 0023_agent_budgets.sql.
CREATE FUNCTION keyproxy.has_agent_token(wanted text) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    RETURN EXISTS (SELECT FROM keyproxy.agent_tokens AS t WHERE t.id = wanted);
END
$$;

REVOKE EXECUTE ON FUNCTION keyproxy.mint_agent_token(
    text, bytea, text, text, text, text, text, text[], text, bigint, bigint, float8, int, int, boolean, text
), keyproxy.tend_agent_tokens(int) FROM PUBLIC;
