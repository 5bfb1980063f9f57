-- Windows that many processes share: a schedule for all messages about one, the holders of the window before it, and smaller
-- slices once units are short.
--
-- The previous release follows the schedule as far as it knows it: a reply's number of holders, and the wait after a refusal.

-- In the order in which messages lock them: see 0011_bounds.sql.
LOCK TABLE keyproxy.leases, keyproxy.windows IN ACCESS EXCLUSIVE MODE;

-- carried: the holders of the window before this one when this one was made; as many are expected here until carried_until.
ALTER TABLE keyproxy.windows
    ADD COLUMN carried int NOT NULL DEFAULT 0,
    ADD COLUMN carried_until float8 NOT NULL DEFAULT 0;
COMMENT ON COLUMN keyproxy.windows.theoretical IS
    'GCRA: the theoretical arrival time, Unix time; of units of a rate, else of messages about a window with many holders';

-- Recall units from as few other holders as suffice, those that hold most first, and from at_most of them. Its caller has locked
-- the window, and so all of its leases. Returns the number of leases.
DROP FUNCTION keyproxy.recall_units(bigint, text, bigint, boolean);
CREATE FUNCTION keyproxy.recall_units(id bigint, sender text, units bigint, at_most int) RETURNS bigint
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
                ORDER BY y.granted - y.used - y.returned DESC, y.holder COLLATE "C", y.lease LIMIT at_most
            ) AS l
        ) AS o
        WHERE o.before < units
    ));
    GET DIAGNOSTICS recalled = ROW_COUNT;
    RETURN recalled;
END
$$;

DO $migration$
DECLARE
    -- What sync_leases has, and what takes its place.
    changes CONSTANT text[] := ARRAY[
        -- A new window expects the holders of the one before it.
        $$INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts, selector)
            SELECT DISTINCT l.pool_kind, l.pool_id, l.is_test, l.measure, l.starts, l.selector
            FROM unnest(lines) AS l
            WHERE ($$,
        $$INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts, selector, carried, carried_until)
            SELECT DISTINCT l.pool_kind, l.pool_id, l.is_test, l.measure, l.starts, l.selector, coalesce(b.holders, 0),
                   instant + greatest(5, 3 * coalesce(b.holders, 0) / 120.0::float8)
            FROM unnest(lines) AS l
            LEFT JOIN LATERAL (
                SELECT v.holders FROM keyproxy.windows AS v
                WHERE l.starts > 0 AND v.pool_kind = l.pool_kind AND v.pool_id = l.pool_id AND v.is_test = l.is_test
                  AND v.measure = l.measure AND v.starts = keyproxy.window_start(l.measure, l.starts - 1)
                  AND v.selector = l.selector LIMIT 1
            ) AS b ON true
            WHERE ($$,

        $$w.holders > 60 AND l.interval_seconds = 0 AS are_many,$$,
        $$w.expected, greatest(1, w.holders, w.expected) AS crowd,
               greatest(w.holders, w.expected) > 60 AND l.interval_seconds = 0 AS are_many,$$,

        $$            SELECT * FROM keyproxy.windows AS w
            WHERE$$,
        $$            SELECT *, CASE WHEN instant < w.carried_until THEN w.carried ELSE 0 END AS expected FROM keyproxy.windows AS w
            WHERE$$,

        $$               END AS available
        FROM told$$,
        $$               END AS available,
               was_held + (sum(more_held) OVER (PARTITION BY window_id))::bigint AS now_held
        FROM told$$,

        $$WHEN alive <= 1 THEN least(want, available)
                   -- Beyond what its requests wait for, a holder leaves something for the others: the less there is, the
                   -- less it gets.
                   ELSE least(want, available, greatest(
                       at_least, most, available / (2 * alive), CASE WHEN are_many THEN want / 2 ELSE 0 END
                   ))$$,
        $$-- Beyond what its requests wait for, a holder leaves something for the others: the less there is, the
                   -- less it gets.
                   ELSE least(available, greatest(
                       CASE WHEN alive <= 1 THEN want ELSE least(want, greatest(at_least, most, available / (2 * alive))) END,
                       CASE
                           WHEN NOT are_many THEN 0
                           -- Others are short: half of what they hold on average, which is used up soon.
                           WHEN instant - wanted_at < 2 THEN least(want / 2, now_held / (2 * crowd))
                           -- Enough until its next report: smaller slices would only make more messages. A new holder wants
                           -- what would last for two seconds.
                           WHEN most > 0 AND NOT is_known
                           THEN greatest(want / 2, least(floor(want * crowd / 120.0::float8)::bigint, available / (4 * alive)))
                           ELSE want / 2
                       END
                   ))$$,

        $$
               instant + least(greatest(theoretical - instant, 0) + 1 / 60.0::float8, 20) AS paced,$$,
        $$$$,

        $$    ), counted AS (
        SELECT t.*,$$,
        $$    ), scheduled AS (
        -- The message takes a place in the schedule of its window; several if it opens a lease, since others like it follow
        -- while processes join; and more if it is granted nothing, since it is repeated soon.
        SELECT totalled.*,
               instant + least(
                   greatest(theoretical - instant, 0)
                   + (CASE WHEN changes & 65535 > 0 THEN 4 ELSE 1 END + CASE WHEN is_short THEN 3 ELSE 0 END) / 120.0::float8,
                   2 * crowd / 120.0::float8
               ) AS paced
        FROM totalled
    ), counted AS (
        SELECT t.*,$$,

        $$t.window_id, sender, t.at_least - greatest(0, t.available),
                       instant - t.wanted_at < 2 AND NOT (t.are_many AND t.paced - instant >= 0.25)
                   )
               END AS recalled
        FROM totalled AS t$$,
        $$t.window_id, sender,
                       CASE WHEN instant - t.wanted_at < 2 THEN t.was_held + t.window_held
                            ELSE t.at_least - greatest(0, t.available) END,
                       -- If messages are that far ahead of their schedule, many compete for units.
                       CASE WHEN t.are_many AND t.paced - instant >= 0.25 THEN 12 ELSE 100 END
                   )
               END AS recalled
        FROM scheduled AS t$$,

        $$WHEN j.are_many AND j.is_short THEN j.paced$$,
        $$WHEN j.are_many THEN j.paced$$,

        $$THEN greatest(0.7, j.paced - instant) ELSE 0 END,$$,
        $$THEN greatest(0.7, least(j.paced - instant, 20))
                -- Others are short too, and many: this one waits for its turn when it is short.
                WHEN j.are_many AND instant - j.wanted_at < 2 AND j.paced - instant >= 0.25 AND NOT settles AND instant < j.ends
                THEN least(j.paced - instant, 20) ELSE 0 END,$$,

        $$ELSE greatest(1, j.were_holders + j.more_holders + CASE$$,
        $$ELSE greatest(1, j.expected, CASE WHEN j.are_many THEN floor((j.paced - instant) * 120) END, j.were_holders + j.more_holders + CASE$$
    ];
    definition text := pg_catalog.pg_get_functiondef(
        'keyproxy.sync_leases(text,bigint,float8,keyproxy.lease_report[],integer[])'::pg_catalog.regprocedure
    );
BEGIN
    FOR change IN 1 .. pg_catalog.cardinality(changes) BY 2 LOOP
        IF pg_catalog.strpos(definition, changes[change]) = 0 THEN
            RAISE EXCEPTION 'sync_leases is not as 0017_ledger_scale.sql has made it: %', changes[change];
        END IF;
        definition := pg_catalog.replace(definition, changes[change], changes[change + 1]);
    END LOOP;
    EXECUTE definition;
END
$migration$;
