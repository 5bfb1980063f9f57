-- Rotated keys share one pool of limits; test traffic may have a plan of its own; the audit log knows whose tenant it is.

-- The key that a rotated key descends from, which names the pool of limits that all of them draw on. Null: its own id.
-- A name and no reference: it outlives the key it came from.
ALTER TABLE keyproxy.api_keys
    ADD COLUMN lineage text CHECK (lineage ~ '^[A-Za-z0-9][A-Za-z0-9._:@|+-]{0,127}$');

-- Whichever SQL client rotates a key: who replaces a key of the same user draws on its pool. A key of somebody else's
-- opens nobody's pool.
CREATE FUNCTION keyproxy.inherit_lineage() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    SELECT coalesce(k.lineage, k.id) INTO NEW.lineage
    FROM keyproxy.api_keys AS k WHERE k.id = NEW.replaces AND k.user_id = NEW.user_id AND k.is_test = NEW.is_test;
    RETURN NEW;
END
$$;
CREATE TRIGGER inherit_lineage BEFORE INSERT OR UPDATE OF replaces ON keyproxy.api_keys FOR EACH ROW
    WHEN (NEW.replaces IS NOT NULL AND NEW.lineage IS NULL)
    EXECUTE FUNCTION keyproxy.inherit_lineage();

-- What limits test traffic, which spends from pools of its own. Null: the limits of the live plan.
ALTER TABLE keyproxy.tenants ADD COLUMN test_plan_id text REFERENCES keyproxy.plans (id) ON UPDATE CASCADE;
ALTER TABLE keyproxy.users ADD COLUMN test_plan_id text REFERENCES keyproxy.plans (id) ON UPDATE CASCADE;
CREATE INDEX tenants_test_plan_id ON keyproxy.tenants (test_plan_id) WHERE test_plan_id IS NOT NULL;
CREATE INDEX users_test_plan_id ON keyproxy.users (test_plan_id) WHERE test_plan_id IS NOT NULL;

-- A key with a successor is retiring, and its holder is told: a successor that comes or goes is news for it too.
CREATE OR REPLACE FUNCTION keyproxy.note_key_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_change('key', encode(OLD.digest, 'hex'));
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.digest <> OLD.digest THEN
        PERFORM keyproxy.note_change('key', encode(NEW.digest, 'hex'));
    END IF;
    IF OLD.replaces IS DISTINCT FROM NEW.replaces THEN
        PERFORM keyproxy.note_change('key', encode(k.digest, 'hex'))
        FROM keyproxy.api_keys AS k WHERE k.id IN (OLD.replaces, NEW.replaces);
    END IF;
    RETURN NULL;
END
$$;

DROP TRIGGER note_update ON keyproxy.api_keys;
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.api_keys FOR EACH ROW
    WHEN ((OLD.id, OLD.user_id, OLD.digest, OLD.scopes, OLD.is_test, OLD.plan_id, OLD.expires_at, OLD.revoked_at,
           OLD.replaces, OLD.lineage)
          IS DISTINCT FROM
          (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.is_test, NEW.plan_id, NEW.expires_at, NEW.revoked_at,
           NEW.replaces, NEW.lineage))
    EXECUTE FUNCTION keyproxy.note_key_change();
ALTER TABLE keyproxy.api_keys ENABLE ALWAYS TRIGGER note_update;

-- Whose tenant an audit row is about, so that one may read its own. Null: nobody's (a plan), or written before this.
ALTER TABLE keyproxy.audit_log ADD COLUMN tenant_id text;
CREATE INDEX audit_log_tenant ON keyproxy.audit_log (tenant_id, id);

-- A key that goes with its user is told apart when the user's row is gone already: the log still knows it.
CREATE FUNCTION keyproxy.tenant_of_user(wanted text) RETURNS text LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(
        (SELECT u.tenant_id FROM keyproxy.users AS u WHERE u.id = wanted),
        (SELECT a.tenant_id FROM keyproxy.audit_log AS a
         WHERE a.entity = 'user' AND a.entity_id = wanted ORDER BY a.id DESC LIMIT 1)
    )
$$;

CREATE OR REPLACE FUNCTION keyproxy.audit() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    unlogged constant text[] := ARRAY['digest', 'last_used_at'];
    was jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - unlogged END;
    becomes jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - unlogged END;
    told jsonb := coalesce(becomes, was);
BEGIN
    -- A change of nothing but last_used_at is traffic; a changed digest is a changed key, although it is not shown.
    IF TG_OP = 'UPDATE' AND was = becomes AND to_jsonb(OLD) -> 'digest' IS NOT DISTINCT FROM to_jsonb(NEW) -> 'digest' THEN
        RETURN NULL;
    END IF;
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, before, after)
    VALUES (
        keyproxy.actor(),
        keyproxy.origin(),
        lower(TG_OP),
        TG_ARGV[0],
        told ->> 'id',
        CASE TG_ARGV[0]
            WHEN 'tenant' THEN told ->> 'id'
            WHEN 'user' THEN told ->> 'tenant_id'
            WHEN 'key' THEN keyproxy.tenant_of_user(told ->> 'user_id')
        END,
        was,
        becomes
    );
    RETURN NULL;
END
$$;
