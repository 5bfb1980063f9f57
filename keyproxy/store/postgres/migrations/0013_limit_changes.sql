-- The feed distinguishes a change of limits from a change of standing.
--
-- When the store fails right after a change, proxies refuse the keys that the change was about: they may have been revoked
-- or disabled. A key whose plan alone changed needs no such caution; it goes on under the limits it had. So a change that
-- can neither end nor narrow what a key may do has a kind of its own. A proxy that does not know these kinds looks every key
-- up again, which is correct as well.

ALTER TABLE keyproxy.changes DROP CONSTRAINT changes_kind_check;
ALTER TABLE keyproxy.changes ADD CONSTRAINT changes_kind_check
    CHECK (kind IN ('key', 'user', 'tenant', 'plan', 'all', 'key_limits', 'user_limits', 'tenant_limits'));

CREATE OR REPLACE FUNCTION keyproxy.note_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    harmless constant text[] := ARRAY['name', 'plan_id', 'test_plan_id', 'created_at'];
BEGIN
    IF TG_OP = 'UPDATE' AND TG_ARGV[0] <> 'plan' AND to_jsonb(OLD) - harmless = to_jsonb(NEW) - harmless THEN
        PERFORM keyproxy.note_change(TG_ARGV[0] || '_limits', OLD.id);
    ELSE
        PERFORM keyproxy.note_change(TG_ARGV[0], OLD.id);
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION keyproxy.note_key_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE'
       AND (OLD.id, OLD.user_id, OLD.digest, OLD.scopes, OLD.is_test, OLD.expires_at, OLD.revoked_at)
           IS NOT DISTINCT FROM
           (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.is_test, NEW.expires_at, NEW.revoked_at) THEN
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
