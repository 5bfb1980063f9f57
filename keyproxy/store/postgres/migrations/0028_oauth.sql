-- OAuth: clients, what users have granted them, sessions, codes and tokens.
--
-- Expand only. The previous release reads none of it, and treats the truncation of a table as a change of every key.

-- A client is identified by the id that it presents and has no owner. Its row exists once a user has consented, or an operator
-- has entered it; the primary key follows from the client id, so there is one row for each.
CREATE TABLE keyproxy.oauth_clients (
    id            text PRIMARY KEY,
    client_id     text NOT NULL CHECK (octet_length(client_id) BETWEEN 1 AND 2000),
    kind          text NOT NULL CHECK (kind IN ('value', 'document', 'listed', 'registered')),
    name          text NOT NULL DEFAULT '' CHECK (length(name) <= 200),
    redirect_uris text[] NOT NULL DEFAULT '{}'
                  CHECK (cardinality(redirect_uris) <= 10 AND array_position(redirect_uris, NULL) IS NULL),
    auth_method   text NOT NULL DEFAULT 'none'
                  CHECK (auth_method IN ('none', 'client_secret', 'private_key_jwt', 'tls_client_auth')),
    secret_digest bytea CHECK (length(secret_digest) = 32),
    jwks          jsonb CHECK (jsonb_typeof(jwks) = 'object' AND octet_length(jwks::text) <= 65536),
    tls_subject   text CHECK (octet_length(tls_subject) BETWEEN 1 AND 2000),
    created_at    timestamptz NOT NULL DEFAULT now(),
    disabled_at   timestamptz,
    CONSTRAINT oauth_clients_id CHECK (id = 'cli_' || left(encode(sha256(convert_to(client_id, 'UTF8')), 'hex'), 32)),
    CONSTRAINT oauth_clients_secret CHECK ((auth_method = 'client_secret') = (secret_digest IS NOT NULL)),
    CONSTRAINT oauth_clients_jwks CHECK (auth_method <> 'private_key_jwt' OR jwks IS NOT NULL OR kind = 'document'),
    CONSTRAINT oauth_clients_tls CHECK ((auth_method = 'tls_client_auth') = (tls_subject IS NOT NULL)),
    CONSTRAINT oauth_clients_public CHECK (kind NOT IN ('value', 'listed') OR auth_method = 'none')
);
COMMENT ON COLUMN keyproxy.oauth_clients.client_id IS 'as presented, or `listed:` and the name of a known client';
COMMENT ON COLUMN keyproxy.oauth_clients.secret_digest IS 'SHA-256 of the secret, which is stored nowhere';

-- Users as the identity provider knows them.
CREATE TABLE keyproxy.oauth_subjects (
    issuer     text NOT NULL CHECK (octet_length(issuer) BETWEEN 1 AND 1000),
    subject    text NOT NULL CHECK (octet_length(subject) BETWEEN 1 AND 1000),
    user_id    text NOT NULL REFERENCES keyproxy.users (id) ON UPDATE CASCADE ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (issuer, subject)
);
CREATE INDEX oauth_subjects_user_id ON keyproxy.oauth_subjects (user_id);

-- What a user has granted a client, or, for a service, an operator has.
CREATE TABLE keyproxy.oauth_grants (
    id         text PRIMARY KEY CHECK (id ~ '^gra_[0-9A-Za-z]{22}$'),
    user_id    text NOT NULL REFERENCES keyproxy.users (id) ON UPDATE CASCADE ON DELETE CASCADE,
    client_id  text NOT NULL REFERENCES keyproxy.oauth_clients (id) ON UPDATE CASCADE ON DELETE CASCADE,
    resource   text NOT NULL CHECK (octet_length(resource) BETWEEN 1 AND 1000),
    scopes     text[] NOT NULL
               CHECK (cardinality(scopes) <= 128 AND array_position(scopes, NULL) IS NULL AND keyproxy.are_scopes(scopes)),
    is_test    boolean NOT NULL DEFAULT false,
    is_service boolean NOT NULL DEFAULT false,
    plan_id    text REFERENCES keyproxy.plans (id) ON UPDATE CASCADE,
    granted_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (user_id, client_id, resource)
);
COMMENT ON COLUMN keyproxy.oauth_grants.client_id IS 'the id of the row in oauth_clients';
CREATE UNIQUE INDEX oauth_grants_service ON keyproxy.oauth_grants (client_id, resource) WHERE is_service;
CREATE INDEX oauth_grants_client_id ON keyproxy.oauth_grants (client_id);
CREATE INDEX oauth_grants_plan_id ON keyproxy.oauth_grants (plan_id) WHERE plan_id IS NOT NULL;

-- One sign-in of one device. A session that was ended has no row.
CREATE TABLE keyproxy.oauth_sessions (
    id           text PRIMARY KEY CHECK (id ~ '^ses_[0-9A-Za-z]{22}$'),
    grant_id     text NOT NULL REFERENCES keyproxy.oauth_grants (id) ON UPDATE CASCADE ON DELETE CASCADE,
    presented_as text NOT NULL CHECK (octet_length(presented_as) BETWEEN 1 AND 2000),
    scopes       text[] NOT NULL
                 CHECK (cardinality(scopes) <= 128 AND array_position(scopes, NULL) IS NULL AND keyproxy.are_scopes(scopes)),
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    last_used_at timestamptz,
    via_key      text REFERENCES keyproxy.api_keys (id) ON UPDATE CASCADE ON DELETE CASCADE,
    via_issuer   text,
    via_subject  text,
    FOREIGN KEY (via_issuer, via_subject) REFERENCES keyproxy.oauth_subjects (issuer, subject)
        ON UPDATE CASCADE ON DELETE CASCADE,
    CONSTRAINT oauth_sessions_via CHECK (
        (via_issuer IS NULL) = (via_subject IS NULL) AND (via_key IS NULL OR via_issuer IS NULL)
    )
);
COMMENT ON COLUMN keyproxy.oauth_sessions.presented_as IS 'the client id that the client has presented';
CREATE INDEX oauth_sessions_grant_id ON keyproxy.oauth_sessions (grant_id);
CREATE INDEX oauth_sessions_expires_at ON keyproxy.oauth_sessions (expires_at);
CREATE INDEX oauth_sessions_via_key ON keyproxy.oauth_sessions (via_key) WHERE via_key IS NOT NULL;
CREATE INDEX oauth_sessions_via_subject ON keyproxy.oauth_sessions (via_issuer, via_subject) WHERE via_issuer IS NOT NULL;

CREATE TABLE keyproxy.oauth_codes (
    digest       bytea PRIMARY KEY CHECK (length(digest) = 32),
    grant_id     text NOT NULL REFERENCES keyproxy.oauth_grants (id) ON UPDATE CASCADE ON DELETE CASCADE,
    client_id    text NOT NULL CHECK (octet_length(client_id) BETWEEN 1 AND 2000),
    redirect_uri text NOT NULL CHECK (octet_length(redirect_uri) BETWEEN 1 AND 500),
    challenge    bytea NOT NULL CHECK (length(challenge) = 32),
    scopes       text[] NOT NULL
                 CHECK (cardinality(scopes) <= 128 AND array_position(scopes, NULL) IS NULL AND keyproxy.are_scopes(scopes)),
    via_key      text REFERENCES keyproxy.api_keys (id) ON UPDATE CASCADE ON DELETE CASCADE,
    via_issuer   text,
    via_subject  text,
    expires_at   timestamptz NOT NULL,
    redeemed_at  timestamptz,
    session_id   text REFERENCES keyproxy.oauth_sessions (id) ON UPDATE CASCADE ON DELETE SET NULL,
    FOREIGN KEY (via_issuer, via_subject) REFERENCES keyproxy.oauth_subjects (issuer, subject)
        ON UPDATE CASCADE ON DELETE CASCADE,
    CONSTRAINT oauth_codes_via CHECK (
        (via_issuer IS NULL) = (via_subject IS NULL) AND (via_key IS NULL OR via_issuer IS NULL)
    )
);
COMMENT ON COLUMN keyproxy.oauth_codes.client_id IS 'as presented, not the id of a row';
COMMENT ON COLUMN keyproxy.oauth_codes.challenge IS 'SHA-256 of the code verifier (RFC 7636, S256)';
CREATE INDEX oauth_codes_grant_id ON keyproxy.oauth_codes (grant_id);
CREATE INDEX oauth_codes_expires_at ON keyproxy.oauth_codes (expires_at);
CREATE INDEX oauth_codes_session_id ON keyproxy.oauth_codes (session_id) WHERE session_id IS NOT NULL;
CREATE INDEX oauth_codes_via_key ON keyproxy.oauth_codes (via_key) WHERE via_key IS NOT NULL;
CREATE INDEX oauth_codes_via_subject ON keyproxy.oauth_codes (via_issuer, via_subject) WHERE via_issuer IS NOT NULL;

-- `follows` is the digest of the token that was exchanged for this one. No reference: old tokens are deleted.
CREATE TABLE keyproxy.oauth_refresh_tokens (
    digest      bytea PRIMARY KEY CHECK (length(digest) = 32),
    session_id  text NOT NULL REFERENCES keyproxy.oauth_sessions (id) ON UPDATE CASCADE ON DELETE CASCADE,
    follows     bytea CHECK (length(follows) = 32),
    issued_at   timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    used_at     timestamptz,
    replaced_at timestamptz
);
CREATE INDEX oauth_refresh_tokens_session_id ON keyproxy.oauth_refresh_tokens (session_id, issued_at DESC, digest DESC);
CREATE INDEX oauth_refresh_tokens_expires_at ON keyproxy.oauth_refresh_tokens (expires_at);

CREATE TABLE keyproxy.oauth_access_tokens (
    digest     bytea PRIMARY KEY CHECK (length(digest) = 32),
    session_id text NOT NULL REFERENCES keyproxy.oauth_sessions (id) ON UPDATE CASCADE ON DELETE CASCADE,
    scopes     text[] NOT NULL
               CHECK (cardinality(scopes) <= 128 AND array_position(scopes, NULL) IS NULL AND keyproxy.are_scopes(scopes)),
    issued_at  timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    bound_to   bytea CHECK (length(bound_to) = 32)
);
COMMENT ON COLUMN keyproxy.oauth_access_tokens.bound_to IS 'SHA-256 of the certificate that requests must present (RFC 8705)';
-- With the expiry, so that counting or noting the live tokens of a session does not read the expired ones.
CREATE INDEX oauth_access_tokens_session_id ON keyproxy.oauth_access_tokens (session_id, expires_at);
CREATE INDEX oauth_access_tokens_expires_at ON keyproxy.oauth_access_tokens (expires_at);

-- The `jti` of signed assertions that clients have used.
CREATE TABLE keyproxy.oauth_assertions (
    digest     bytea PRIMARY KEY CHECK (length(digest) = 32),
    expires_at timestamptz NOT NULL
);
CREATE INDEX oauth_assertions_expires_at ON keyproxy.oauth_assertions (expires_at);

-- The change feed. A token is known by its digest, as a key is, so its changes are changes of a key. No proxy has cached a
-- token that was just issued, and none serves an expired one: neither is noted. The deletion of a client, a grant or a session
-- cascades to tokens, which notes them.
CREATE FUNCTION keyproxy.note_tokens_of_sessions(of_sessions text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    right_now constant timestamptz := clock_timestamp();
BEGIN
    INSERT INTO keyproxy.changes (kind, subject)
    SELECT 'key', encode(t.digest, 'hex') FROM keyproxy.oauth_access_tokens AS t
    WHERE t.session_id = ANY (of_sessions) AND t.expires_at > right_now;
    IF FOUND THEN
        PERFORM pg_notify('keyproxy_changes', '');
    END IF;
END
$$;

CREATE FUNCTION keyproxy.note_oauth_token_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF OLD.expires_at > clock_timestamp() OR TG_OP = 'UPDATE' AND NEW.expires_at > clock_timestamp() THEN
        PERFORM keyproxy.note_change('key', encode(OLD.digest, 'hex'));
        IF TG_OP = 'UPDATE' AND NEW.digest <> OLD.digest THEN
            PERFORM keyproxy.note_change('key', encode(NEW.digest, 'hex'));
        END IF;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.oauth_access_tokens FOR EACH ROW
    WHEN ((OLD.digest, OLD.session_id, OLD.scopes, OLD.expires_at, OLD.bound_to)
          IS DISTINCT FROM (NEW.digest, NEW.session_id, NEW.scopes, NEW.expires_at, NEW.bound_to))
    EXECUTE FUNCTION keyproxy.note_oauth_token_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.oauth_access_tokens
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_oauth_token_change();

CREATE FUNCTION keyproxy.note_session_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM keyproxy.note_tokens_of_sessions(ARRAY[OLD.id, NEW.id]);
    RETURN NULL;
END
$$;
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.oauth_sessions FOR EACH ROW
    -- A token is stored with the expiry of its session at the latest, so that a longer session changes none.
    WHEN ((OLD.id, OLD.grant_id, OLD.via_key) IS DISTINCT FROM (NEW.id, NEW.grant_id, NEW.via_key)
          OR NEW.expires_at < OLD.expires_at)
    EXECUTE FUNCTION keyproxy.note_session_change();

CREATE FUNCTION keyproxy.note_grant_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM keyproxy.note_tokens_of_sessions(ARRAY(
        SELECT s.id FROM keyproxy.oauth_sessions AS s WHERE s.grant_id IN (OLD.id, NEW.id)
    ));
    RETURN NULL;
END
$$;
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.oauth_grants FOR EACH ROW
    WHEN ((OLD.id, OLD.user_id, OLD.client_id, OLD.resource, OLD.is_test, OLD.plan_id)
          IS DISTINCT FROM (NEW.id, NEW.user_id, NEW.client_id, NEW.resource, NEW.is_test, NEW.plan_id))
    EXECUTE FUNCTION keyproxy.note_grant_change();

CREATE FUNCTION keyproxy.note_client_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM keyproxy.note_tokens_of_sessions(ARRAY(
        SELECT s.id FROM keyproxy.oauth_grants AS g JOIN keyproxy.oauth_sessions AS s ON s.grant_id = g.id
        WHERE g.client_id IN (OLD.id, NEW.id)
    ));
    RETURN NULL;
END
$$;
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.oauth_clients FOR EACH ROW
    WHEN ((OLD.id, OLD.disabled_at) IS DISTINCT FROM (NEW.id, NEW.disabled_at))
    EXECUTE FUNCTION keyproxy.note_client_change();

-- With session_replication_role = replica deletions do not cascade: these triggers, which are enabled for that mode alone, note
-- the tokens that are left. A token without its session, grant or client is no credential.
CREATE TRIGGER note_orphans AFTER DELETE ON keyproxy.oauth_sessions
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_session_change();
CREATE TRIGGER note_orphans AFTER DELETE ON keyproxy.oauth_grants
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_grant_change();
CREATE TRIGGER note_orphans AFTER DELETE ON keyproxy.oauth_clients
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_client_change();
ALTER TABLE keyproxy.oauth_sessions ENABLE REPLICA TRIGGER note_orphans;
ALTER TABLE keyproxy.oauth_grants ENABLE REPLICA TRIGGER note_orphans;
ALTER TABLE keyproxy.oauth_clients ENABLE REPLICA TRIGGER note_orphans;

CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.oauth_access_tokens
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.oauth_sessions
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.oauth_grants
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.oauth_clients
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

-- A sign-in with a key does not outlive what the key allowed. The deletion of a key cascades to its sessions and codes.
--
-- Grants are locked first, as a deletion of them does, and then sessions before codes, each by id: a transaction that redeems a
-- code holds its grant until the session is visible. One that stores a code holds the key: see hold_login_key.
CREATE FUNCTION keyproxy.hold_grants_of_key(of_key text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    held text[] := ARRAY(
        SELECT s.grant_id FROM keyproxy.oauth_sessions AS s WHERE s.via_key = of_key
        UNION SELECT c.grant_id FROM keyproxy.oauth_codes AS c WHERE c.via_key = of_key
    );
BEGIN
    PERFORM FROM keyproxy.oauth_grants AS g WHERE g.id = ANY (held) ORDER BY g.id FOR UPDATE;
END
$$;

CREATE FUNCTION keyproxy.end_key_logins() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    of_key constant text := coalesce(NEW.id, OLD.id);
BEGIN
    IF TG_OP = 'DELETE' OR OLD.revoked_at IS NULL AND NEW.revoked_at IS NOT NULL
       OR NOT NEW.scopes @> OLD.scopes OR NOT NEW.roles @> OLD.roles OR NEW.is_test <> OLD.is_test
       -- A user that is renamed keeps its sessions; a key that is given to another user does not.
       OR NEW.user_id <> OLD.user_id AND EXISTS (SELECT FROM keyproxy.users AS u WHERE u.id = OLD.user_id) THEN
        PERFORM keyproxy.hold_grants_of_key(of_key);
        DELETE FROM keyproxy.oauth_sessions AS s WHERE s.id = ANY (ARRAY(
            SELECT o.id FROM keyproxy.oauth_sessions AS o WHERE o.via_key = of_key ORDER BY o.id FOR UPDATE
        ));
        DELETE FROM keyproxy.oauth_codes AS c WHERE c.via_key = of_key;
        RETURN NULL;
    END IF;
    IF NEW.expires_at IS DISTINCT FROM OLD.expires_at THEN
        PERFORM keyproxy.hold_grants_of_key(of_key);
        UPDATE keyproxy.oauth_sessions AS s SET expires_at = NEW.expires_at WHERE s.id = ANY (ARRAY(
            SELECT o.id FROM keyproxy.oauth_sessions AS o
            WHERE o.via_key = of_key AND o.expires_at > NEW.expires_at ORDER BY o.id FOR NO KEY UPDATE
        ));
        UPDATE keyproxy.oauth_codes AS c SET expires_at = NEW.expires_at
        WHERE c.via_key = of_key AND c.expires_at > NEW.expires_at;
    END IF;
    IF (NEW.suspended_at IS NULL) <> (OLD.suspended_at IS NULL) THEN
        PERFORM keyproxy.note_tokens_of_sessions(ARRAY(
            SELECT s.id FROM keyproxy.oauth_sessions AS s WHERE s.via_key = of_key
        ));
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER end_logins AFTER UPDATE ON keyproxy.api_keys FOR EACH ROW
    WHEN ((OLD.user_id, OLD.scopes, OLD.roles, OLD.is_test, OLD.expires_at, OLD.revoked_at IS NULL, OLD.suspended_at IS NULL)
          IS DISTINCT FROM
          (NEW.user_id, NEW.scopes, NEW.roles, NEW.is_test, NEW.expires_at, NEW.revoked_at IS NULL, NEW.suspended_at IS NULL))
    EXECUTE FUNCTION keyproxy.end_key_logins();

-- A deletion cascades, except with session_replication_role = replica.
CREATE TRIGGER end_orphans AFTER DELETE ON keyproxy.api_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.end_key_logins();
ALTER TABLE keyproxy.api_keys ENABLE REPLICA TRIGGER end_orphans;

-- An account at the identity provider that is linked to another user keeps no session or code of the former one. The locks are
-- taken as for a key.
CREATE FUNCTION keyproxy.end_subject_logins() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    of_issuer constant text := coalesce(NEW.issuer, OLD.issuer);
    of_subject constant text := coalesce(NEW.subject, OLD.subject);
    held text[];
BEGIN
    -- A user that is renamed keeps its sessions.
    IF TG_OP = 'UPDATE' AND NOT EXISTS (SELECT FROM keyproxy.users AS u WHERE u.id = OLD.user_id) THEN
        RETURN NULL;
    END IF;
    held := ARRAY(
        SELECT s.grant_id FROM keyproxy.oauth_sessions AS s WHERE s.via_issuer = of_issuer AND s.via_subject = of_subject
        UNION SELECT c.grant_id FROM keyproxy.oauth_codes AS c WHERE c.via_issuer = of_issuer AND c.via_subject = of_subject
    );
    PERFORM FROM keyproxy.oauth_grants AS g WHERE g.id = ANY (held) ORDER BY g.id FOR UPDATE;
    DELETE FROM keyproxy.oauth_sessions AS s WHERE s.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.oauth_sessions AS o WHERE o.via_issuer = of_issuer AND o.via_subject = of_subject
        ORDER BY o.id FOR UPDATE
    ));
    DELETE FROM keyproxy.oauth_codes AS c WHERE c.via_issuer = of_issuer AND c.via_subject = of_subject;
    RETURN NULL;
END
$$;
CREATE TRIGGER end_logins AFTER UPDATE ON keyproxy.oauth_subjects FOR EACH ROW
    WHEN (OLD.user_id <> NEW.user_id) EXECUTE FUNCTION keyproxy.end_subject_logins();
CREATE TRIGGER end_orphans AFTER DELETE ON keyproxy.oauth_subjects
    FOR EACH ROW EXECUTE FUNCTION keyproxy.end_subject_logins();
ALTER TABLE keyproxy.oauth_subjects ENABLE ALWAYS TRIGGER end_logins;
ALTER TABLE keyproxy.oauth_subjects ENABLE REPLICA TRIGGER end_orphans;

-- A role that loses scopes narrows the keys that have it: end what was granted beyond what they still have. Null: any role.
CREATE FUNCTION keyproxy.end_logins_beyond_roles(of_role text, lost text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    DELETE FROM keyproxy.oauth_sessions AS s USING keyproxy.api_keys AS k
    WHERE k.id = s.via_key AND (of_role IS NULL AND k.roles <> '{}' OR k.roles @> ARRAY[of_role])
      AND (lost IS NULL OR s.scopes && lost)
      AND NOT s.scopes <@ keyproxy.effective_scopes(k.scopes, k.roles, NULL, NULL);
    DELETE FROM keyproxy.oauth_codes AS c USING keyproxy.api_keys AS k
    WHERE k.id = c.via_key AND (of_role IS NULL AND k.roles <> '{}' OR k.roles @> ARRAY[of_role])
      AND (lost IS NULL OR c.scopes && lost)
      AND NOT c.scopes <@ keyproxy.effective_scopes(k.scopes, k.roles, NULL, NULL);
END
$$;

CREATE FUNCTION keyproxy.end_role_logins() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM keyproxy.end_logins_beyond_roles(NULL, NULL);
    ELSIF TG_OP = 'DELETE' OR NEW.id <> OLD.id THEN
        PERFORM keyproxy.end_logins_beyond_roles(OLD.id, OLD.scopes);
    ELSIF NOT NEW.scopes @> OLD.scopes THEN
        PERFORM keyproxy.end_logins_beyond_roles(
            OLD.id, ARRAY(SELECT s.scope FROM unnest(OLD.scopes) AS s (scope) WHERE s.scope <> ALL (NEW.scopes))
        );
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER end_logins AFTER UPDATE OR DELETE ON keyproxy.roles
    FOR EACH ROW EXECUTE FUNCTION keyproxy.end_role_logins();
CREATE TRIGGER end_logins_truncate AFTER TRUNCATE ON keyproxy.roles
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.end_role_logins();

-- Lock the key of a sign-in, which the authorization server may not change, before grants, sessions and codes.
CREATE FUNCTION keyproxy.hold_login_key(wanted text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM FROM keyproxy.api_keys AS k WHERE k.id = wanted FOR SHARE;
END
$$;

-- The lock on the key makes a code that is inserted while the key changes visible to the trigger above, or ends here.
CREATE FUNCTION keyproxy.tie_code_to_key() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    login record;
BEGIN
    SELECT k.scopes, k.roles, k.expires_at, k.revoked_at INTO login
    FROM keyproxy.api_keys AS k WHERE k.id = NEW.via_key FOR SHARE;
    IF login.revoked_at IS NOT NULL OR login.expires_at <= clock_timestamp()
       OR NOT NEW.scopes <@ keyproxy.effective_scopes(login.scopes, login.roles, NULL, NULL) THEN
        RAISE EXCEPTION 'the key of this sign-in does not allow it'
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'oauth_codes_via_key';
    END IF;
    NEW.expires_at := least(NEW.expires_at, login.expires_at);
    RETURN NEW;
END
$$;
CREATE TRIGGER tie_to_key BEFORE INSERT ON keyproxy.oauth_codes FOR EACH ROW
    WHEN (NEW.via_key IS NOT NULL) EXECUTE FUNCTION keyproxy.tie_code_to_key();

-- A session of a key that expires ends with the key, however long sessions may last.
CREATE FUNCTION keyproxy.tie_session_to_key() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    NEW.expires_at := least(
        NEW.expires_at, (SELECT k.expires_at FROM keyproxy.api_keys AS k WHERE k.id = NEW.via_key)
    );
    RETURN NEW;
END
$$;
CREATE TRIGGER tie_to_key BEFORE INSERT OR UPDATE OF expires_at, via_key ON keyproxy.oauth_sessions FOR EACH ROW
    WHEN (NEW.via_key IS NOT NULL) EXECUTE FUNCTION keyproxy.tie_session_to_key();

-- Also for rows that arrive by logical replication or with session_replication_role = replica.
DO $$
DECLARE
    feed record;
BEGIN
    FOR feed IN
        SELECT tgrelid::regclass AS home, tgname FROM pg_trigger
        WHERE tgname LIKE 'note\_%' AND tgname <> 'note_orphans'
          AND tgrelid IN ('keyproxy.oauth_access_tokens'::regclass, 'keyproxy.oauth_sessions'::regclass,
                          'keyproxy.oauth_grants'::regclass, 'keyproxy.oauth_clients'::regclass)
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', feed.home, feed.tgname);
    END LOOP;
END
$$;
ALTER TABLE keyproxy.api_keys ENABLE ALWAYS TRIGGER end_logins;
ALTER TABLE keyproxy.roles ENABLE ALWAYS TRIGGER end_logins;
ALTER TABLE keyproxy.roles ENABLE ALWAYS TRIGGER end_logins_truncate;

-- The audit log. A client belongs to no tenant; the name of a subject is `issuer subject`. The tenant of a grant that was deleted
-- before its sessions is read from the log, as that of a user is.
CREATE FUNCTION keyproxy.tenant_of_grant(wanted text) RETURNS text LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(
        (SELECT keyproxy.tenant_of_user(g.user_id) FROM keyproxy.oauth_grants AS g WHERE g.id = wanted),
        (SELECT a.tenant_id FROM keyproxy.audit_log AS a
         WHERE a.entity = 'oauth_grant' AND a.entity_id = wanted ORDER BY a.id DESC LIMIT 1)
    )
$$;

CREATE FUNCTION keyproxy.audit_oauth() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    unlogged constant text[] := ARRAY['secret_digest', 'last_used_at'];
    was jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - unlogged END;
    becomes jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - unlogged END;
    shown jsonb := coalesce(becomes, was);
BEGIN
    -- A change of nothing but last_used_at is traffic; a changed secret is a change, although it is not shown.
    IF TG_OP = 'UPDATE' AND was = becomes
       AND to_jsonb(OLD) -> 'secret_digest' IS NOT DISTINCT FROM to_jsonb(NEW) -> 'secret_digest' THEN
        RETURN NULL;
    END IF;
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, before, after)
    VALUES (
        keyproxy.actor(), keyproxy.origin(), lower(TG_OP), TG_ARGV[0],
        CASE TG_ARGV[0] WHEN 'oauth_subject' THEN (shown ->> 'issuer') || ' ' || (shown ->> 'subject') ELSE shown ->> 'id' END,
        CASE TG_ARGV[0]
            WHEN 'oauth_grant' THEN keyproxy.tenant_of_user(shown ->> 'user_id')
            WHEN 'oauth_subject' THEN keyproxy.tenant_of_user(shown ->> 'user_id')
            WHEN 'oauth_session' THEN keyproxy.tenant_of_grant(shown ->> 'grant_id')
        END,
        was, becomes
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.oauth_clients
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_oauth('oauth_client');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.oauth_clients
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('oauth_client');
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.oauth_subjects
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_oauth('oauth_subject');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.oauth_subjects
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('oauth_subject');
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.oauth_grants
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_oauth('oauth_grant');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.oauth_grants
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('oauth_grant');
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.oauth_sessions
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_oauth('oauth_session');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.oauth_sessions
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('oauth_session');

-- As 0023_agent_budgets.sql has made it; the pool of a grant is one of a key.
CREATE OR REPLACE FUNCTION keyproxy.tenant_of_pool(kind text, owner text) RETURNS text LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE kind
        WHEN 'tenant' THEN owner
        WHEN 'user' THEN keyproxy.tenant_of_user(owner)
        WHEN 'key' THEN coalesce(
            (SELECT u.tenant_id FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id WHERE k.id = owner),
            (SELECT a.tenant_id FROM keyproxy.audit_log AS a
             WHERE a.entity = 'key' AND a.entity_id = owner ORDER BY a.id DESC LIMIT 1),
            keyproxy.tenant_of_grant(owner)
        )
        WHEN 'agent' THEN keyproxy.tenant_of_user(regexp_replace(owner, '/[^/]*$', ''))
        WHEN 'token' THEN (
            SELECT u.tenant_id FROM keyproxy.agent_tokens AS t JOIN keyproxy.users AS u ON u.id = t.user_id WHERE t.id = owner
        )
    END
$$;

-- Delete what has ended, `portion` rows of each table at most: codes ten minutes after their expiry; tokens, assertions and
-- sessions that have expired; refresh tokens beyond the last 64 of a session; grants without a session and an open code that
-- are `grant_days` old, except those of services; and clients without a grant, except those that an operator has entered or
-- disabled.
--
-- What no index shows is looked for in the next `10 * portion` rows: sessions with too many refresh tokens, unused grants and
-- unused clients. `after`: the ids of the rows at which the previous call stopped, in this order; `next`: those at which this one
-- did, empty at the end of a table. `is_more`: there may be more to delete. `sessions`: how many have expired.
--
-- Whether a grant or client is unused is judged by a second statement, which sees what was committed before its row was locked.
CREATE FUNCTION keyproxy.tend_oauth(
    portion int, grant_days int, after text[], right_now timestamptz,
    OUT next text[], OUT is_more boolean, OUT sessions int
) LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '250ms' AS $$
DECLARE
    kept_max constant int := 64;
    step constant int := 10 * portion;
    forgotten_at constant timestamptz := right_now - make_interval(days => grant_days);
    done int;
    most int := 0;
    unused text[];
    swept text[];
BEGIN
    next := after;
    is_more := false;
    sessions := 0;
    IF NOT pg_try_advisory_xact_lock(hashtextextended('keyproxy.tend_oauth', 0)) THEN
        RETURN;
    END IF;
    PERFORM set_config('keyproxy.actor', 'oauth:gc', true);
    DELETE FROM keyproxy.oauth_codes AS c WHERE c.digest = ANY (ARRAY(
        SELECT o.digest FROM keyproxy.oauth_codes AS o WHERE o.expires_at <= right_now - interval '10 minutes'
        ORDER BY o.expires_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    DELETE FROM keyproxy.oauth_assertions AS a WHERE a.digest = ANY (ARRAY(
        SELECT o.digest FROM keyproxy.oauth_assertions AS o WHERE o.expires_at <= right_now
        ORDER BY o.expires_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    DELETE FROM keyproxy.oauth_access_tokens AS t WHERE t.digest = ANY (ARRAY(
        SELECT o.digest FROM keyproxy.oauth_access_tokens AS o WHERE o.expires_at <= right_now
        ORDER BY o.expires_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    DELETE FROM keyproxy.oauth_refresh_tokens AS t WHERE t.digest = ANY (ARRAY(
        SELECT o.digest FROM keyproxy.oauth_refresh_tokens AS o WHERE o.expires_at <= right_now
        ORDER BY o.expires_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    DELETE FROM keyproxy.oauth_sessions AS s WHERE s.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.oauth_sessions AS o WHERE o.expires_at <= right_now
        ORDER BY o.expires_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS sessions = ROW_COUNT;
    most := greatest(most, sessions);

    swept := ARRAY(
        SELECT o.id FROM keyproxy.oauth_sessions AS o WHERE o.id > after[1] ORDER BY o.id LIMIT step
    );
    DELETE FROM keyproxy.oauth_refresh_tokens AS t WHERE t.digest = ANY (ARRAY(
        SELECT o.digest FROM unnest(swept) AS s (id)
        CROSS JOIN LATERAL (
            SELECT x.digest FROM keyproxy.oauth_refresh_tokens AS x WHERE x.session_id = s.id
            ORDER BY x.issued_at DESC, x.digest DESC OFFSET kept_max
        ) AS o
        LIMIT portion
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    -- The same rows again if there may be more to delete of them.
    IF done < portion THEN
        next[1] := CASE WHEN cardinality(swept) = step THEN swept[step] ELSE '' END;
    END IF;

    swept := ARRAY(SELECT o.id FROM keyproxy.oauth_grants AS o WHERE o.id > after[2] ORDER BY o.id LIMIT step);
    unused := ARRAY(
        SELECT o.id FROM keyproxy.oauth_grants AS o
        WHERE o.id = ANY (swept) AND NOT o.is_service AND o.granted_at <= forgotten_at
          AND (SELECT true FROM keyproxy.oauth_sessions AS s WHERE s.grant_id = o.id LIMIT 1) IS NULL
          AND (SELECT true FROM keyproxy.oauth_codes AS c WHERE c.grant_id = o.id AND c.redeemed_at IS NULL LIMIT 1) IS NULL
        LIMIT portion FOR UPDATE SKIP LOCKED
    );
    IF cardinality(unused) < portion THEN
        next[2] := CASE WHEN cardinality(swept) = step THEN swept[step] ELSE '' END;
    END IF;
    DELETE FROM keyproxy.oauth_grants AS g
    WHERE g.id = ANY (unused) AND g.granted_at <= forgotten_at
      AND NOT EXISTS (SELECT FROM keyproxy.oauth_sessions AS s WHERE s.grant_id = g.id)
      AND NOT EXISTS (SELECT FROM keyproxy.oauth_codes AS c WHERE c.grant_id = g.id AND c.redeemed_at IS NULL);
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);

    swept := ARRAY(SELECT o.id FROM keyproxy.oauth_clients AS o WHERE o.id > after[3] ORDER BY o.id LIMIT step);
    unused := ARRAY(
        SELECT o.id FROM keyproxy.oauth_clients AS o
        WHERE o.id = ANY (swept) AND o.kind <> 'registered' AND o.disabled_at IS NULL
          AND (SELECT true FROM keyproxy.oauth_grants AS g WHERE g.client_id = o.id LIMIT 1) IS NULL
        LIMIT portion FOR UPDATE SKIP LOCKED
    );
    IF cardinality(unused) < portion THEN
        next[3] := CASE WHEN cardinality(swept) = step THEN swept[step] ELSE '' END;
    END IF;
    DELETE FROM keyproxy.oauth_clients AS c
    WHERE c.id = ANY (unused) AND c.disabled_at IS NULL
      AND NOT EXISTS (SELECT FROM keyproxy.oauth_grants AS g WHERE g.client_id = c.id);
    GET DIAGNOSTICS done = ROW_COUNT;
    is_more := greatest(most, done) >= portion;
END
$$;
REVOKE EXECUTE ON FUNCTION keyproxy.tend_oauth(int, int, text[], timestamptz), keyproxy.hold_login_key(text) FROM PUBLIC;
