-- Windows that many processes share: their messages are paced, and a shortage recalls idle units from few holders.
--
-- The previous release ignores both: its holders report as often as before and learn of a shortage from `is_wanted`.

-- In the order in which messages lock them: see 0011_bounds.sql.
LOCK TABLE keyproxy.leases, keyproxy.windows IN ACCESS EXCLUSIVE MODE;

-- is_recalled: the holder shall return what is idle. It reads this together with the change feed; its next report clears it.
ALTER TABLE keyproxy.leases ADD COLUMN is_recalled boolean NOT NULL DEFAULT false;
CREATE INDEX leases_recalled ON keyproxy.leases (holder) WHERE is_recalled;

ALTER TABLE keyproxy.windows ADD COLUMN recalled_at float8 NOT NULL DEFAULT 0;
COMMENT ON COLUMN keyproxy.windows.theoretical IS
    'GCRA: the theoretical arrival time, Unix time; of units of a rate, else of requests that were granted nothing, in a window with many holders';

-- The leases of a holder whose idle units another one is short of. Needs: leases_recalled.
CREATE FUNCTION keyproxy.recalled_leases(sender text) RETURNS SETOF bigint LANGUAGE plpgsql STABLE ROWS 1
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
BEGIN
    RETURN QUERY SELECT x.lease FROM keyproxy.leases AS x WHERE x.holder = sender AND x.is_recalled LIMIT 1000;
END
$$;

-- Recall units from as few other holders as suffice, those that hold most first; if it is a repetition, from as many as
-- allowed, since those did not suffice: what they hold is in use, or used and not reported yet. Its caller has locked the window,
-- and so all of its leases. Returns the number of leases.
CREATE FUNCTION keyproxy.recall_units(id bigint, sender text, units bigint, is_repeat boolean) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    recalled bigint;
BEGIN
    UPDATE keyproxy.leases AS x SET is_recalled = true
    WHERE x.ctid = ANY (ARRAY(
        SELECT o.tid FROM (
            SELECT l.tid, sum(l.outstanding) OVER (ORDER BY l.outstanding DESC, l.holder COLLATE "C", l.lease) - l.outstanding
                   AS before
            FROM (
                SELECT y.ctid AS tid, y.holder, y.lease, y.granted - y.used - y.returned AS outstanding
                FROM keyproxy.leases AS y
                WHERE y.window_id = recall_units.id AND y.holder <> sender AND NOT y.is_recalled
                  AND y.granted > y.used + y.returned
                ORDER BY y.granted - y.used - y.returned DESC, y.holder COLLATE "C", y.lease LIMIT 100
            ) AS l
        ) AS o
        WHERE is_repeat OR o.before < units
    ));
    GET DIAGNOSTICS recalled = ROW_COUNT;
    RETURN recalled;
END
$$;

DO $migration$
DECLARE
    -- What sync_leases has, and what takes its place.
    changes CONSTANT text[] := ARRAY[
        $$w.holders AS were_holders, w.alerted,$$,
        $$w.holders AS were_holders, w.alerted, w.recalled_at,
               w.holders > 60 AND l.interval_seconds = 0 AS are_many,$$,

        -- Half of what a holder wants lasts until its next report: smaller slices would only make more messages.
        $$ELSE least(want, available, greatest(at_least, most, available / (2 * alive)))$$,
        $$ELSE least(want, available, greatest(
                       at_least, most, available / (2 * alive), CASE WHEN are_many THEN want / 2 ELSE 0 END
                   ))$$,

        $$sum(outstanding) OVER of_window)::bigint AS window_own,$$,
        $$sum(outstanding) OVER of_window)::bigint AS window_own,
               instant + least(greatest(theoretical - instant, 0) + 1 / 60.0::float8, 20) AS paced,$$,

        $$        FROM totalled AS t
    ), kept AS ($$,
        $$               ,
               CASE
                   -- Not more often than the holders learn of it, and not for more than can be returned.
                   WHEN t.is_asker AND t.is_short AND t.was_held + t.window_held > t.window_own
                    AND t.at_least <= t.bound + t.window_credited - t.was_spent - t.window_used
                    AND instant - t.recalled_at >= 0.5
                   THEN keyproxy.recall_units(
                       t.window_id, sender, t.at_least - greatest(0, t.available),
                       instant - t.wanted_at < 2 AND NOT (t.are_many AND t.paced - instant >= 0.25)
                   )
               END AS recalled
        FROM totalled AS t
    ), kept AS ($$,

        $$SET granted = excluded.granted, used = excluded.used, returned = excluded.returned
    ), closed AS ($$,
        $$SET granted = excluded.granted, used = excluded.used, returned = excluded.returned, is_recalled = false
    ), closed AS ($$,

        $$theoretical = CASE WHEN j.is_rate THEN j.window_theoretical ELSE w.theoretical END,$$,
        $$theoretical = CASE WHEN j.is_rate THEN j.window_theoretical WHEN j.are_many AND j.is_short THEN j.paced ELSE w.theoretical END,
            recalled_at = CASE WHEN j.recalled IS NULL THEN w.recalled_at ELSE instant END,$$,

        $$THEN greatest(0, j.ahead + j.at_least * j.interval_seconds - j.bound * j.interval_seconds) ELSE 0 END,$$,
        $$THEN greatest(0, j.ahead + j.at_least * j.interval_seconds - j.bound * j.interval_seconds)
                WHEN j.are_many AND j.want > 0 AND j.given = 0 AND NOT settles AND instant < j.ends
                THEN greatest(0.7, j.paced - instant) ELSE 0 END,$$,

        $$instant - j.wanted_at < 2 AND j.wanted_by <> sender,$$,
        $$instant - j.wanted_at < 2 AND j.wanted_by <> sender AND NOT j.are_many,$$
    ];
    definition text := pg_catalog.pg_get_functiondef(
        'keyproxy.sync_leases(text,bigint,float8,keyproxy.lease_report[],integer[])'::pg_catalog.regprocedure
    );
BEGIN
    FOR change IN 1 .. pg_catalog.cardinality(changes) BY 2 LOOP
        IF pg_catalog.strpos(definition, changes[change]) = 0 THEN
            RAISE EXCEPTION 'sync_leases is not as 0015_ai_traffic.sql has made it: %', changes[change];
        END IF;
        definition := pg_catalog.replace(definition, changes[change], changes[change + 1]);
    END LOOP;
    EXECUTE definition;
END
$migration$;
