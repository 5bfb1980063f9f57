-- Credentials of upstreams, sealed: the table holds nothing that opens without a key of the operator.

CREATE TABLE keyproxy.provider_keys (
    id           text PRIMARY KEY CHECK (id ~ '^pvk_[0-9A-Za-z]{1,40}$'),
    provider     text NOT NULL CHECK (provider ~ '^[A-Za-z0-9_.-]{1,128}$'),
    tenant_id    text REFERENCES keyproxy.tenants (id) ON UPDATE CASCADE ON DELETE CASCADE,
    is_test      boolean NOT NULL DEFAULT false,
    sealed       bytea NOT NULL CHECK (length(sealed) BETWEEN 30 AND 16384),
    sealed_with  text NOT NULL CHECK (sealed_with ~ '^[A-Za-z0-9_.-]{1,64}$'),
    hint         text NOT NULL DEFAULT '' CHECK (length(hint) <= 4),
    starts_at    timestamptz NOT NULL DEFAULT now(),
    ends_at      timestamptz,
    revoked_at   timestamptz,
    checked_at   timestamptz,
    check_status integer CHECK (check_status BETWEEN 100 AND 599),
    created_at   timestamptz NOT NULL DEFAULT now(),
    CHECK ((check_status IS NULL) = (checked_at IS NULL))
);
COMMENT ON COLUMN keyproxy.provider_keys.tenant_id IS 'the only tenant whose requests it is for; null: those of all tenants without rows';
COMMENT ON COLUMN keyproxy.provider_keys.sealed IS
    'AES-256-GCM: a version byte, the nonce, the ciphertext and the tag; bound to provider, tenant, mode and id';
COMMENT ON COLUMN keyproxy.provider_keys.sealed_with IS 'the name of the key in secrets.key_file that opens it';
COMMENT ON COLUMN keyproxy.provider_keys.check_status IS 'the status of the upstream''s response when it was checked';

-- Lookups read the rows of one provider and tenant; those for all tenants are few, and have an index of their own.
CREATE INDEX provider_keys_of_tenant ON keyproxy.provider_keys (tenant_id, provider) WHERE tenant_id IS NOT NULL;
CREATE INDEX provider_keys_shared ON keyproxy.provider_keys (provider) WHERE tenant_id IS NULL;

-- Proxies have the rows of a provider and tenant in memory together, so their number is bounded. One transaction inserts
-- at a time for each: two that count at once would not see each other's rows.
CREATE FUNCTION keyproxy.bound_provider_keys() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(
        hashtextextended(format('keyproxy.provider_keys %s %s', NEW.provider, NEW.tenant_id), 0)
    );
    PERFORM FROM keyproxy.provider_keys AS p
    WHERE p.provider = NEW.provider AND p.tenant_id IS NOT DISTINCT FROM NEW.tenant_id OFFSET 64 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'there are 64 provider keys already'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'provider_keys_bound';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER bound AFTER INSERT ON keyproxy.provider_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.bound_provider_keys();

-- The change feed. The subject is the provider and the tenant, as a JSON array; the tenant is empty for shared rows.
CREATE FUNCTION keyproxy.note_provider_key_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_change(
            'provider_key', jsonb_build_array(OLD.provider, coalesce(OLD.tenant_id, ''))::text
        );
    END IF;
    IF TG_OP = 'INSERT'
       OR TG_OP = 'UPDATE' AND (NEW.provider, NEW.tenant_id) IS DISTINCT FROM (OLD.provider, OLD.tenant_id) THEN
        PERFORM keyproxy.note_change(
            'provider_key', jsonb_build_array(NEW.provider, coalesce(NEW.tenant_id, ''))::text
        );
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.provider_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_provider_key_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.provider_keys
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION keyproxy.note_provider_key_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.provider_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_provider_key_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.provider_keys
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

-- Also for rows that arrive by logical replication or with session_replication_role = replica.
DO $$
DECLARE
    feed record;
BEGIN
    FOR feed IN
        SELECT tgrelid::regclass AS home, tgname FROM pg_trigger
        WHERE tgname LIKE 'note\_%' AND tgrelid = 'keyproxy.provider_keys'::regclass
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', feed.home, feed.tgname);
    END LOOP;
END
$$;

-- The audit log, without the sealed secret: the log outlives a key that is destroyed, and its readers are others.
CREATE FUNCTION keyproxy.audit_provider_key() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    was jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - 'sealed' END;
    becomes jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - 'sealed' END;
    shown jsonb := coalesce(becomes, was);
BEGIN
    -- Changed sealed bytes are a change, although they are not shown.
    IF TG_OP = 'UPDATE' AND OLD.* IS NOT DISTINCT FROM NEW.* THEN
        RETURN NULL;
    END IF;
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, before, after)
    VALUES (
        keyproxy.actor(), keyproxy.origin(), lower(TG_OP), 'provider_key', shown ->> 'id', shown ->> 'tenant_id', was,
        becomes
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.provider_keys
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_provider_key();
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.provider_keys
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('provider_key');
