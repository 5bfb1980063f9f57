-- Roles: named sets of scopes, for keys, and as ceilings of users and tenants; and the ids that a tenant owns.
--
-- Expand only. The previous release ignores roles, and treats the new kinds of changes as changes of every key.

-- A role as a key, user or tenant refers to it. No foreign key can refer from an array: an unknown role grants nothing.
CREATE FUNCTION keyproxy.are_roles(roles text[]) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(bool_and(role ~ '^[a-z][a-z0-9_-]{0,63}$'), true)
    FROM unnest(roles) AS role
$$;

CREATE TABLE keyproxy.roles (
    id         text PRIMARY KEY CHECK (id ~ '^[a-z][a-z0-9_-]{0,63}$'),
    scopes     text[] NOT NULL
               CHECK (cardinality(scopes) <= 64 AND array_position(scopes, NULL) IS NULL
                      AND keyproxy.are_scopes(scopes)),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Of a key: the roles that it has. Of a user or tenant: a ceiling, the most that its keys may do; null: there is none.
-- Not validated, because all existing rows have the default: that would lock the table while all of it is read.
ALTER TABLE keyproxy.api_keys ADD COLUMN roles text[] NOT NULL DEFAULT '{}';
ALTER TABLE keyproxy.users ADD COLUMN roles text[];
ALTER TABLE keyproxy.tenants ADD COLUMN roles text[];
ALTER TABLE keyproxy.api_keys ADD CONSTRAINT api_keys_roles CHECK (
    cardinality(roles) <= 16 AND array_position(roles, NULL) IS NULL AND keyproxy.are_roles(roles)
) NOT VALID;
ALTER TABLE keyproxy.users ADD CONSTRAINT users_roles CHECK (
    cardinality(roles) <= 16 AND array_position(roles, NULL) IS NULL AND keyproxy.are_roles(roles)
) NOT VALID;
ALTER TABLE keyproxy.tenants ADD CONSTRAINT tenants_roles CHECK (
    cardinality(roles) <= 16 AND array_position(roles, NULL) IS NULL AND keyproxy.are_roles(roles)
) NOT VALID;

-- Which keys, users and tenants have a role.
CREATE INDEX api_keys_roles ON keyproxy.api_keys USING gin (roles) WHERE roles <> '{}';
CREATE INDEX users_roles ON keyproxy.users USING gin (roles) WHERE roles IS NOT NULL;
CREATE INDEX tenants_roles ON keyproxy.tenants USING gin (roles) WHERE roles IS NOT NULL;

-- The scopes of roles: what a ceiling allows. Null: there is no ceiling.
CREATE FUNCTION keyproxy.scopes_of_roles(roles text[]) RETURNS text[] LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN roles IS NOT NULL THEN ARRAY(
        SELECT DISTINCT pg_catalog.unnest(r.scopes) COLLATE "C" AS scope FROM keyproxy.roles AS r WHERE r.id = ANY (roles)
        ORDER BY scope
    ) END
$$;

-- What a key may do: its scopes and those of its roles, as far as the ceilings of its user and its tenant allow them.
-- plpgsql keeps the plans of these statements, so that a batch of lookups does not pay for starting them where no key has
-- roles. It has no settings of its own, which each call would apply and reset; all names are qualified instead.
CREATE FUNCTION keyproxy.effective_scopes(scopes text[], key_roles text[], user_roles text[], tenant_roles text[])
RETURNS text[] LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE
    effective text[] := scopes;
    ceiling text[];
BEGIN
    IF key_roles <> '{}' THEN
        -- DISTINCT of one array, which is sorted; a UNION would start a hash table for each key.
        effective := ARRAY(SELECT pg_catalog.unnest(r.scopes) FROM keyproxy.roles AS r WHERE r.id = ANY (key_roles));
        effective := ARRAY(
            SELECT DISTINCT e.scope COLLATE "C" AS scope FROM pg_catalog.unnest(scopes || effective) AS e (scope)
            ORDER BY scope
        );
    END IF;
    IF user_roles IS NOT NULL THEN
        ceiling := ARRAY(SELECT pg_catalog.unnest(r.scopes) FROM keyproxy.roles AS r WHERE r.id = ANY (user_roles));
        effective := ARRAY(SELECT e.scope FROM pg_catalog.unnest(effective) AS e (scope) WHERE e.scope = ANY (ceiling));
    END IF;
    IF tenant_roles IS NOT NULL THEN
        ceiling := ARRAY(SELECT pg_catalog.unnest(r.scopes) FROM keyproxy.roles AS r WHERE r.id = ANY (tenant_roles));
        effective := ARRAY(SELECT e.scope FROM pg_catalog.unnest(effective) AS e (scope) WHERE e.scope = ANY (ceiling));
    END IF;
    RETURN effective;
END
$$;

-- Ids of the upstream's objects and the tenant that owns each. An id is a path without empty, `.` or `..` segments.
CREATE TABLE keyproxy.owned (
    kind       text NOT NULL CHECK (kind ~ '^[a-z][a-z0-9_-]{0,63}$'),
    id         text NOT NULL CHECK (length(id) <= 256 AND id ~ '^[A-Za-z0-9._:@|+~/=,!$-]+$' AND id !~ '(^|/)[.]{0,2}(/|$)'),
    tenant_id  text NOT NULL REFERENCES keyproxy.tenants (id) ON UPDATE CASCADE ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, id)
);
CREATE INDEX owned_tenant_id ON keyproxy.owned (tenant_id, kind, id);

-- The change feed. A role may widen or narrow any key, also one that has no roles: it may be the ceiling of the tenant.
ALTER TABLE keyproxy.changes DROP CONSTRAINT changes_kind_check;
ALTER TABLE keyproxy.changes ADD CONSTRAINT changes_kind_check CHECK (kind IN (
    'key', 'user', 'tenant', 'plan', 'all', 'key_limits', 'user_limits', 'tenant_limits', 'window', 'role', 'owned'
)) NOT VALID;

CREATE FUNCTION keyproxy.note_role_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM keyproxy.note_change('role', CASE WHEN TG_OP = 'INSERT' THEN NEW.id ELSE OLD.id END);
    RETURN NULL;
END
$$;

-- The subject: kind, id and tenant, as JSON.
CREATE FUNCTION keyproxy.note_owned_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_change('owned', jsonb_build_array(OLD.kind, OLD.id, OLD.tenant_id)::text);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM keyproxy.note_change('owned', jsonb_build_array(NEW.kind, NEW.id, NEW.tenant_id)::text);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.roles
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_role_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.roles FOR EACH ROW
    WHEN ((OLD.id, OLD.scopes) IS DISTINCT FROM (NEW.id, NEW.scopes)) EXECUTE FUNCTION keyproxy.note_role_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.roles
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_role_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.roles
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.owned
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_owned_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.owned FOR EACH ROW
    WHEN ((OLD.kind, OLD.id, OLD.tenant_id) IS DISTINCT FROM (NEW.kind, NEW.id, NEW.tenant_id))
    EXECUTE FUNCTION keyproxy.note_owned_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.owned
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_owned_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.owned
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

-- Roles of a key are no limits: a change of them may end what the key may do. The triggers of users and tenants watch
-- every column already, and note_change takes a change of `roles` for one of standing.
CREATE OR REPLACE FUNCTION keyproxy.note_key_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE'
       AND (OLD.id, OLD.user_id, OLD.digest, OLD.scopes, OLD.roles, OLD.is_test, OLD.expires_at, OLD.revoked_at)
           IS NOT DISTINCT FROM
           (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.roles, NEW.is_test, NEW.expires_at, NEW.revoked_at) THEN
        PERFORM keyproxy.note_change('key_limits', encode(OLD.digest, 'hex'));
    ELSE
        IF TG_OP <> 'INSERT' THEN
            PERFORM keyproxy.note_change('key', encode(OLD.digest, 'hex'));
        END IF;
        IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.digest <> OLD.digest THEN
            PERFORM keyproxy.note_change('key', encode(NEW.digest, 'hex'));
        END IF;
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
           OLD.revoked_at, OLD.replaces, OLD.lineage)
          IS DISTINCT FROM
          (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.roles, NEW.is_test, NEW.plan_id, NEW.expires_at,
           NEW.revoked_at, NEW.replaces, NEW.lineage))
    EXECUTE FUNCTION keyproxy.note_key_change();

-- Also for rows that arrive by logical replication or with session_replication_role = replica.
DO $$
DECLARE
    feed record;
BEGIN
    FOR feed IN
        SELECT tgrelid::regclass AS home, tgname FROM pg_trigger
        WHERE tgname LIKE 'note\_%'
          AND tgrelid IN ('keyproxy.roles'::regclass, 'keyproxy.owned'::regclass, 'keyproxy.api_keys'::regclass)
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', feed.home, feed.tgname);
    END LOOP;
END
$$;

-- The audit log. A role concerns no tenant in particular; an owned id has the name `kind/id`.
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.roles
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit('role');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.roles
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('role');

CREATE FUNCTION keyproxy.audit_owned() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    was jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END;
    becomes jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END;
    shown jsonb := coalesce(becomes, was);
BEGIN
    IF was = becomes THEN
        RETURN NULL;
    END IF;
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, before, after)
    VALUES (
        keyproxy.actor(), keyproxy.origin(), lower(TG_OP), 'owned', (shown ->> 'kind') || '/' || (shown ->> 'id'),
        shown ->> 'tenant_id', was, becomes
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.owned
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_owned();
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.owned
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('owned');
