-- The first refusal under a limit of 0 requests writes the alert of 100 %, like that of any other limit of requests: it is
-- refused as spent. A request that needs more tokens or money than a whole window has never fits, which is no such refusal.

DO $migration$
DECLARE
    -- What sync_leases has, and what takes its place.
    before CONSTANT text := 't.is_short AND t.at_least <= t.bound + t.window_credited
';
    after CONSTANT text := 't.is_short
                       AND t.at_least <= greatest(t.bound + t.window_credited, starts_with(t.measure, ''requests_'')::int)
';
    definition text := pg_catalog.pg_get_functiondef(
        'keyproxy.sync_leases(text,bigint,float8,keyproxy.lease_report[],integer[])'::pg_catalog.regprocedure
    );
BEGIN
    IF pg_catalog.strpos(definition, before) = 0 THEN
        RAISE EXCEPTION 'sync_leases is not as 0015_ai_traffic.sql has made it: %', before;
    END IF;
    EXECUTE pg_catalog.replace(definition, before, after);
END
$migration$;
