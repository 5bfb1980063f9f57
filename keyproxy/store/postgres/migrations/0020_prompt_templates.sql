-- Templates of instructions: the category of a system prompt, by the digest of its texts.
--
-- Expand only. The previous release does not read the table, and treats its changes as changes of every key.

CREATE TABLE keyproxy.prompt_templates (
    digest     bytea PRIMARY KEY CHECK (length(digest) = 32),
    category   text NOT NULL CHECK (category ~ '^[a-z][a-z0-9_-]{0,63}$'),
    name       text NOT NULL DEFAULT '' CHECK (length(name) <= 200),
    tenant_id  text REFERENCES keyproxy.tenants (id) ON UPDATE CASCADE ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON COLUMN keyproxy.prompt_templates.tenant_id IS 'the only tenant that the template is registered for; null: all';
CREATE INDEX prompt_templates_tenant_id ON keyproxy.prompt_templates (tenant_id) WHERE tenant_id IS NOT NULL;

-- Every proxy has all templates in memory, so their number is bounded. One transaction inserts at a time: two that count
-- at once would not see each other's rows.
CREATE FUNCTION keyproxy.bound_prompt_templates() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('keyproxy.prompt_templates', 0));
    PERFORM FROM keyproxy.prompt_templates OFFSET 10000 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'there are 10000 prompt templates already'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'prompt_templates_bound';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER bound AFTER INSERT ON keyproxy.prompt_templates
    FOR EACH ROW EXECUTE FUNCTION keyproxy.bound_prompt_templates();

-- The change feed. The subject is the digest.
ALTER TABLE keyproxy.changes DROP CONSTRAINT changes_kind_check;
ALTER TABLE keyproxy.changes ADD CONSTRAINT changes_kind_check CHECK (kind IN (
    'key', 'user', 'tenant', 'plan', 'all', 'key_limits', 'user_limits', 'tenant_limits', 'window', 'role', 'owned',
    'template'
)) NOT VALID;

CREATE FUNCTION keyproxy.note_template_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_change('template', encode(OLD.digest, 'hex'));
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.digest <> OLD.digest THEN
        PERFORM keyproxy.note_change('template', encode(NEW.digest, 'hex'));
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.prompt_templates
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_template_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.prompt_templates FOR EACH ROW
    WHEN ((OLD.digest, OLD.category, OLD.tenant_id) IS DISTINCT FROM (NEW.digest, NEW.category, NEW.tenant_id))
    EXECUTE FUNCTION keyproxy.note_template_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.prompt_templates
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_template_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.prompt_templates
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

-- Also for rows that arrive by logical replication or with session_replication_role = replica.
DO $$
DECLARE
    feed record;
BEGIN
    FOR feed IN
        SELECT tgrelid::regclass AS home, tgname FROM pg_trigger
        WHERE tgname LIKE 'note\_%' AND tgrelid = 'keyproxy.prompt_templates'::regclass
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', feed.home, feed.tgname);
    END LOOP;
END
$$;

-- The audit log. The digest of a key is left out there, but that of a template is its name.
CREATE FUNCTION keyproxy.audit_template() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    was jsonb := CASE WHEN TG_OP <> 'INSERT'
                      THEN to_jsonb(OLD) || jsonb_build_object('digest', encode(OLD.digest, 'hex')) END;
    becomes jsonb := CASE WHEN TG_OP <> 'DELETE'
                          THEN to_jsonb(NEW) || jsonb_build_object('digest', encode(NEW.digest, 'hex')) END;
    shown jsonb := coalesce(becomes, was);
BEGIN
    IF was = becomes THEN
        RETURN NULL;
    END IF;
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, before, after)
    VALUES (
        keyproxy.actor(), keyproxy.origin(), lower(TG_OP), 'template', shown ->> 'digest', shown ->> 'tenant_id', was,
        becomes
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.prompt_templates
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit_template();
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.prompt_templates
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('template');
