-- Tenants, users, keys, plans; the feed of changes to them; the audit log.
--
-- Forward only. A later migration expands first and contracts in a release after, so that the previous release keeps
-- running on the newer schema.

CREATE TABLE keyproxy.plans (
    id          text PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$'),
    limits      jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(limits) = 'object'),
    created_at  timestamptz NOT NULL DEFAULT now()
);

-- Ids travel as header values: visible ASCII, no spaces, nothing that a header or a log line could trip over.
CREATE TABLE keyproxy.tenants (
    id          text PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9._:@|+-]{0,127}$'),
    name        text NOT NULL DEFAULT '' CHECK (length(name) <= 200),
    plan_id     text REFERENCES keyproxy.plans (id) ON UPDATE CASCADE,
    disabled_at timestamptz,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX tenants_plan_id ON keyproxy.tenants (plan_id) WHERE plan_id IS NOT NULL;

CREATE TABLE keyproxy.users (
    id          text PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9._:@|+-]{0,127}$'),
    tenant_id   text NOT NULL REFERENCES keyproxy.tenants (id) ON UPDATE CASCADE ON DELETE CASCADE,
    plan_id     text REFERENCES keyproxy.plans (id) ON UPDATE CASCADE,
    disabled_at timestamptz,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX users_tenant_id ON keyproxy.users (tenant_id);
CREATE INDEX users_plan_id ON keyproxy.users (plan_id) WHERE plan_id IS NOT NULL;

-- A scope is one word without wildcards. Joined with spaces they are the value of a header.
CREATE FUNCTION keyproxy.are_scopes(scopes text[]) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(bool_and(scope ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'), true)
    FROM unnest(scopes) AS scope
$$;

CREATE TABLE keyproxy.api_keys (
    id            text PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9._:@|+-]{0,127}$'),
    user_id       text NOT NULL REFERENCES keyproxy.users (id) ON UPDATE CASCADE ON DELETE CASCADE,
    digest        bytea NOT NULL UNIQUE CHECK (length(digest) = 32),
    hint          text NOT NULL DEFAULT '' CHECK (length(hint) <= 40),
    name          text NOT NULL DEFAULT '' CHECK (length(name) <= 200),
    scopes        text[] NOT NULL DEFAULT '{}'
                  CHECK (cardinality(scopes) <= 64 AND array_position(scopes, NULL) IS NULL
                         AND keyproxy.are_scopes(scopes)),
    is_test       boolean NOT NULL DEFAULT false,
    plan_id       text REFERENCES keyproxy.plans (id) ON UPDATE CASCADE,
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz,
    revoked_at    timestamptz,
    revoke_reason text CHECK (length(revoke_reason) <= 500),
    replaces      text REFERENCES keyproxy.api_keys (id) ON UPDATE CASCADE ON DELETE SET NULL,
    last_used_at  timestamptz,
    CHECK (revoke_reason IS NULL OR revoked_at IS NOT NULL)
);
CREATE INDEX api_keys_user_id ON keyproxy.api_keys (user_id);
CREATE INDEX api_keys_plan_id ON keyproxy.api_keys (plan_id) WHERE plan_id IS NOT NULL;
CREATE INDEX api_keys_replaces ON keyproxy.api_keys (replaces) WHERE replaces IS NOT NULL;

-- The change feed. Every change to what a proxy may have cached leaves a row, whichever SQL client made it, with the
-- transaction that made it. A reader that keeps the snapshot of its last look asks for what is visible now and was not
-- then: this misses nothing, although transactions do not commit in the order in which they begin.
CREATE TABLE keyproxy.changes (
    xid         xid8 NOT NULL DEFAULT pg_current_xact_id(),
    kind        text NOT NULL CHECK (kind IN ('key', 'user', 'tenant', 'plan', 'all')),
    subject     text NOT NULL
);
CREATE INDEX changes_xid ON keyproxy.changes (xid);

-- The functions run as their owner, so that a client needs no rights on the feed and the log to be heard by them. They are
-- for rows rather than statements, because logical replication fires no triggers for statements.
CREATE FUNCTION keyproxy.note_change(kind text, subject text) RETURNS void LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO keyproxy.changes (kind, subject) VALUES (kind, subject);
    SELECT pg_notify('keyproxy_changes', '');
$$;

CREATE FUNCTION keyproxy.note_key_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_change('key', encode(OLD.digest, 'hex'));
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.digest <> OLD.digest THEN
        PERFORM keyproxy.note_change('key', encode(NEW.digest, 'hex'));
    END IF;
    RETURN NULL;
END
$$;

-- Users, tenants and plans: TG_ARGV[0] is the kind.
CREATE FUNCTION keyproxy.note_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM keyproxy.note_change(TG_ARGV[0], OLD.id);
    RETURN NULL;
END
$$;

-- Nobody has cached a user or tenant that was only just made. Replication and restores, though, may bring keys before their
-- owners: those keys are strangers until then.
CREATE FUNCTION keyproxy.note_owner() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_ARGV[0] = 'user' THEN
        PERFORM keyproxy.note_change('key', encode(k.digest, 'hex'))
        FROM keyproxy.api_keys AS k WHERE k.user_id = NEW.id;
    ELSE
        PERFORM keyproxy.note_change('key', encode(k.digest, 'hex'))
        FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id WHERE u.tenant_id = NEW.id;
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION keyproxy.note_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM keyproxy.note_change('all', TG_TABLE_NAME);
    RETURN NULL;
END
$$;

-- What no proxy has cached of a key (when it was last used, its names) is nobody's news.
CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.api_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_key_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.api_keys FOR EACH ROW
    WHEN ((OLD.id, OLD.user_id, OLD.digest, OLD.scopes, OLD.is_test, OLD.plan_id, OLD.expires_at, OLD.revoked_at)
          IS DISTINCT FROM
          (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.is_test, NEW.plan_id, NEW.expires_at, NEW.revoked_at))
    EXECUTE FUNCTION keyproxy.note_key_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.api_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_key_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.users
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_owner('user');
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.users
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION keyproxy.note_change('user');
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.users
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_change('user');
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.users
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.tenants
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_owner('tenant');
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.tenants
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION keyproxy.note_change('tenant');
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.tenants
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_change('tenant');
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.tenants
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.plans
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION keyproxy.note_change('plan');
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.plans
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_change('plan');
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.plans
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

-- Also for rows that arrive by logical replication or with session_replication_role = replica.
DO $$
DECLARE
    feed record;
BEGIN
    FOR feed IN SELECT tgrelid::regclass AS home, tgname FROM pg_trigger WHERE tgname LIKE 'note\_%' LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', feed.home, feed.tgname);
    END LOOP;
END
$$;

-- The audit log: every change to a tenant, user, key or plan, by whichever SQL client, in the same transaction as the
-- change. keyproxy says who acts in the setting keyproxy.actor; for others it is the database role. Rows are only ever
-- added. `before` and `after` hold no secret: the digest stays out, the plaintext of a key is nowhere.
CREATE TABLE keyproxy.audit_log (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor       text NOT NULL,
    origin      text NOT NULL DEFAULT '',
    action      text NOT NULL,
    entity      text NOT NULL,
    entity_id   text NOT NULL,
    before      jsonb,
    after       jsonb
);
CREATE INDEX audit_log_entity ON keyproxy.audit_log (entity, entity_id, id);

CREATE FUNCTION keyproxy.actor() RETURNS text LANGUAGE sql STABLE AS $$
    SELECT coalesce(nullif(current_setting('keyproxy.actor', true), ''), 'sql:' || session_user)
$$;

CREATE FUNCTION keyproxy.origin() RETURNS text LANGUAGE sql STABLE AS $$
    SELECT coalesce(nullif(current_setting('keyproxy.origin', true), ''), host(inet_client_addr()), 'local')
$$;

CREATE FUNCTION keyproxy.audit() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    unlogged constant text[] := ARRAY['digest', 'last_used_at'];
    was jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - unlogged END;
    becomes jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - unlogged END;
BEGIN
    -- A change of nothing but last_used_at is traffic; a changed digest is a changed key, although it is not shown.
    IF TG_OP = 'UPDATE' AND was = becomes AND to_jsonb(OLD) -> 'digest' IS NOT DISTINCT FROM to_jsonb(NEW) -> 'digest' THEN
        RETURN NULL;
    END IF;
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, before, after)
    VALUES (
        keyproxy.actor(),
        keyproxy.origin(),
        lower(TG_OP),
        TG_ARGV[0],
        coalesce(becomes, was) ->> 'id',
        was,
        becomes
    );
    RETURN NULL;
END
$$;

-- A table that is emptied at once fires nothing for its rows: one row tells that all of them went.
CREATE FUNCTION keyproxy.audit_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id)
    VALUES (keyproxy.actor(), keyproxy.origin(), 'truncate', TG_ARGV[0], '*');
    RETURN NULL;
END
$$;

CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.tenants
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit('tenant');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.tenants
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('tenant');
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.users
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit('user');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.users
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('user');
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.api_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit('key');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('key');
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.plans
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit('plan');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.plans
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('plan');

CREATE FUNCTION keyproxy.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'keyproxy.audit_log is append-only' USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON keyproxy.audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.refuse_change();
