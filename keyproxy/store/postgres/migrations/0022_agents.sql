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
