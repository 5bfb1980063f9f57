-- sync_leases finds the rows a message is about one by one, by their index, whatever the planner believes of the tables.
-- leases is empty whenever nobody asks for anything. Once it had been analyzed like that, each line was looked for among all
-- leases of its holder, and windows were gone through from end to end: of a process with 12,000 leases a message of 200
-- lines took 0.2 to 0.5 s instead of 0.02, and grew with the square of what was held.
-- A LATERAL query with a LIMIT, a query in place of a value and = ANY (ARRAY(...)) are never made joins of.
-- Said as what changes in the function that 0004_ledger.sql has made, where all the rest of it stands.
DO $migration$
DECLARE
    -- Each as it was, and as it is from now on.
    changes CONSTANT text[] := ARRAY[
        $$WHERE NOT EXISTS (
        SELECT FROM keyproxy.windows AS w
        WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
          AND w.starts = l.starts
    )$$,
        $$WHERE (
        SELECT w.id FROM keyproxy.windows AS w
        WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
          AND w.starts = l.starts
    ) IS NULL$$,

        $$SELECT v.id FROM unnest(lines) AS l
        JOIN keyproxy.windows AS v
          ON v.pool_kind = l.pool_kind AND v.pool_id = l.pool_id AND v.is_test = l.is_test AND v.measure = l.measure
         AND v.starts = l.starts
    ))$$,
        $$SELECT (
            SELECT v.id FROM keyproxy.windows AS v
            WHERE v.pool_kind = l.pool_kind AND v.pool_id = l.pool_id AND v.is_test = l.is_test AND v.measure = l.measure
              AND v.starts = l.starts
        ) FROM unnest(lines) AS l
    ))$$,

        $$JOIN keyproxy.windows AS w
          ON w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
         AND w.starts = l.starts
        LEFT$$,
        $$JOIN LATERAL (
            SELECT * FROM keyproxy.windows AS w
            WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
              AND w.starts = l.starts LIMIT 1
        ) AS w ON true
        LEFT$$,

        $$LEFT JOIN keyproxy.leases AS x ON x.holder = sender AND x.lease = l.lease$$,
        $$LEFT JOIN LATERAL (
            SELECT * FROM keyproxy.leases AS x WHERE x.holder = sender AND x.lease = l.lease LIMIT 1
        ) AS x ON true$$,

        $$DELETE FROM keyproxy.leases AS x USING totalled AS j
        WHERE j.is_closing AND j.is_known AND x.holder = sender AND x.lease = j.lease$$,
        $$DELETE FROM keyproxy.leases AS x
        WHERE x.holder = sender
          AND x.lease = ANY (ARRAY(SELECT j.lease FROM totalled AS j WHERE j.is_closing AND j.is_known))$$,

        $$WHERE w.id = j.window_id
    )$$,
        $$WHERE w.id = j.window_id AND w.id = ANY (ARRAY(SELECT t.window_id FROM totalled AS t))
    )$$
    ];
    definition text := pg_catalog.pg_get_functiondef('keyproxy.sync_leases'::pg_catalog.regproc);
BEGIN
    FOR change IN 1 .. pg_catalog.cardinality(changes) BY 2 LOOP
        IF pg_catalog.strpos(definition, changes[change]) = 0 THEN
            RAISE EXCEPTION 'sync_leases is not as 0004_ledger.sql has made it: %', changes[change];
        END IF;
        definition := pg_catalog.replace(definition, changes[change], changes[change + 1]);
    END LOOP;
    EXECUTE definition;
END
$migration$;
