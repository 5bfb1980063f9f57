-- The role of applications, `<prefix>_app`, writes users and keys with any SQL client: the tables themselves keep what no
-- application may undo.

-- A revocation is final. Only the owner of the schema can undo one, or move its time; the reason may change.
-- The function runs as the client, so that current_user is the role that the statement runs as. In replication, the
-- publisher has already checked the change: the trigger does not fire there.
CREATE FUNCTION keyproxy.keep_revocation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    owner constant name := (SELECT pg_get_userbyid(n.nspowner) FROM pg_namespace AS n WHERE n.nspname = TG_TABLE_SCHEMA);
BEGIN
    IF current_user <> owner THEN
        RAISE EXCEPTION 'API key % is revoked: only the owner of the schema can change revoked_at', OLD.id
        USING ERRCODE = 'insufficient_privilege',
              HINT = 'Issue another key, or change only keys WHERE revoked_at IS NULL.';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER keep_revocation BEFORE UPDATE ON keyproxy.api_keys FOR EACH ROW
    WHEN (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS DISTINCT FROM OLD.revoked_at)
    EXECUTE FUNCTION keyproxy.keep_revocation();

-- A key that replaces another one of the same user keeps its plan, whichever client rotates it: a role that may not set plans
-- may not remove one either. Roles and acts_for would widen the new key: they are not taken over. A role that may set plans
-- decides itself. The condition is evaluated as the role of the statement, and the function runs as the owner.
CREATE FUNCTION keyproxy.inherit_plan() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    SELECT k.plan_id INTO NEW.plan_id
    FROM keyproxy.api_keys AS k WHERE k.id = NEW.replaces AND k.user_id = NEW.user_id;
    RETURN NEW;
END
$$;
CREATE TRIGGER inherit_plan BEFORE INSERT ON keyproxy.api_keys FOR EACH ROW
    WHEN (NEW.replaces IS NOT NULL AND NEW.plan_id IS NULL
          AND NOT has_column_privilege('keyproxy.api_keys', 'plan_id', 'INSERT'))
    EXECUTE FUNCTION keyproxy.inherit_plan();

-- A function that runs as its owner is for the roles that are named, and not for PUBLIC: applications now use the schema too.
-- A trigger needs no right to its function, but a role that has it can attach the function to a temporary table of its own,
-- and so write audit rows and events of changes that did not happen. Three others are called by functions that run as the
-- proxy: roles that write leases keep them.
DO $$
DECLARE
    definer record;
    proxy record;
BEGIN
    FOR definer IN
        SELECT p.oid::regprocedure AS signature FROM pg_proc AS p
        WHERE p.pronamespace = 'keyproxy'::regnamespace AND p.prosecdef
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', definer.signature);
    END LOOP;
    FOR proxy IN
        SELECT r.rolname FROM pg_roles AS r
        WHERE NOT r.rolsuper AND r.rolname !~ '^pg_' AND has_table_privilege(r.oid, 'keyproxy.leases', 'INSERT')
    LOOP
        EXECUTE format(
            'GRANT EXECUTE ON FUNCTION keyproxy.make_event_days(), keyproxy.note_alerts(bigint, int[], bigint, bigint),'
            ' keyproxy.has_agent_token(text) TO %I',
            proxy.rolname
        );
    END LOOP;
END
$$;
