-- A bound on every table of the ledger and of usage, and on the work of each call that keeps to it; and no message to the
-- ledger is compiled by LLVM.

-- In the order in which messages lock them, so that this does not deadlock with proxies that go on meanwhile.
LOCK TABLE keyproxy.ledger_history, keyproxy.lease_holders, keyproxy.leases, keyproxy.windows IN ACCESS EXCLUSIVE MODE;

-- Holders that hold nothing rest instead of ending, and rows of ended holders are deleted after a day.
--
--   ended_at  is_resting  is_ending
--   null      false       false       active, or its time is over and no proxy has looked yet
--   set       true        false       rests: it held nothing when its time was over. Its next message makes it active again.
--   set       false       true        ended, and leases of it are still to be charged, a portion at a time
--   set       false       false       ended for good
--
-- A process that is idle now and then stays one holder, so the table has a row for each process that was active in the last
-- day, and for each time in that day that one was cut off while it held something.
ALTER TABLE keyproxy.lease_holders
    ADD COLUMN is_resting boolean NOT NULL DEFAULT false,
    ADD COLUMN is_ending boolean NOT NULL DEFAULT false;
-- No index has expires_at: every message changes it, and that must stay an update within the page (HOT). Living holders are
-- few, and lease_holders_alive has them.
CREATE INDEX lease_holders_ended ON keyproxy.lease_holders (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX lease_holders_ending ON keyproxy.lease_holders (id) WHERE is_ending;

-- A restored dump lacks the latest commits too, on the same timeline, but its tables are others.
ALTER TABLE keyproxy.ledger_history
    ADD COLUMN table_oid oid,
    ADD COLUMN changed_at timestamptz NOT NULL DEFAULT '-infinity';
COMMENT ON COLUMN keyproxy.ledger_history.table_oid IS 'of lease_holders when the last message was processed; null: none yet';
COMMENT ON COLUMN keyproxy.ledger_history.changed_at IS
    'when history was last found to be another: for a day, holders that rest or are not stored may claim leases';
-- A dump that is restored and migrated is one whose rows may be missing.
UPDATE keyproxy.ledger_history SET changed_at = clock_timestamp() WHERE timeline <> '';

CREATE OR REPLACE FUNCTION keyproxy.ledger_settles_until(longest float8) RETURNS timestamptz
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    here text := left(pg_walfile_name(pg_current_wal_lsn()), 8);
    present oid := 'keyproxy.lease_holders'::regclass;
    until timestamptz;
BEGIN
    -- `is_only` is what makes this an index scan. Within sync_leases sequential scans are off: one would cost 10^10, and pass
    -- every threshold for LLVM.
    SELECT g.settles_until INTO until FROM keyproxy.ledger_history AS g
    WHERE g.is_only AND g.timeline = here AND g.lease_seconds >= longest AND g.table_oid = present;
    IF FOUND THEN
        RETURN until;
    END IF;
    UPDATE keyproxy.ledger_history AS g
    SET timeline = here,
        lease_seconds = greatest(g.lease_seconds, longest),
        settles_until = CASE
            WHEN g.timeline IN ('', here) AND coalesce(g.table_oid = present, true) THEN g.settles_until
            ELSE clock_timestamp() + make_interval(secs => least(60, greatest(g.lease_seconds, longest)))
        END,
        table_oid = present,
        changed_at = CASE
            WHEN g.timeline IN ('', here) AND coalesce(g.table_oid = present, true) THEN g.changed_at
            ELSE clock_timestamp()
        END
    WHERE g.is_only
    RETURNING g.settles_until INTO until;
    RETURN until;
END
$$;

-- As 0004_ledger.sql and 0010_ledger_lookups.sql have made it, but for holders, jit, windows that are deleted meanwhile, and
-- two look-ups of leases, for which PostgreSQL 15 read all leases of a holder, or of all of them.
CREATE OR REPLACE FUNCTION keyproxy.sync_leases(
    sender text, message bigint, lease_seconds float8, lines keyproxy.lease_line[],
    OUT lease bigint, OUT starts bigint, OUT granted bigint, OUT spent bigint, OUT held bigint,
    OUT ends_seconds float8, OUT wait_seconds float8, OUT is_wanted boolean
) RETURNS SETOF record LANGUAGE plpgsql
-- Planning this anew for every message costs more than running it; and a plan that was made when the tables were empty must
-- do when they are not: every row is found by its index. What pins the planner also pins jit: costs mean nothing here.
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    here keyproxy.lease_holders;
    alive bigint;
    instant float8;
    settles_until timestamptz := keyproxy.ledger_settles_until(lease_seconds);
    settles boolean;
    is_stored boolean;
    wanted bigint[];
    locked bigint;
BEGIN
    UPDATE keyproxy.lease_holders AS h
    SET serial = message, expires_at = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE h.id = sender AND h.ended_at IS NULL AND h.serial < message;
    IF NOT FOUND THEN
        SELECT * INTO here FROM keyproxy.lease_holders AS h WHERE h.id = sender;
        is_stored := FOUND;
        IF is_stored AND here.ended_at IS NOT NULL AND NOT here.is_resting THEN
            RETURN;
        END IF;
        -- Nothing is held by a holder that rests or is not stored. If this one has been granted units, they were charged when
        -- it ended, and its row was deleted since; or that is in the history that was lost.
        IF (NOT is_stored OR here.is_resting)
            AND EXISTS (SELECT FROM unnest(lines) AS l WHERE l.granted > 0 AND l.interval_seconds = 0 AND NOT l.is_closing)
            AND NOT EXISTS (
                SELECT FROM keyproxy.ledger_history AS g
                WHERE g.is_only AND g.changed_at > clock_timestamp() - interval '24 hours'
            )
        THEN
            RETURN;
        END IF;
        INSERT INTO keyproxy.lease_holders AS h (id, serial, expires_at)
        VALUES (sender, message, clock_timestamp() + make_interval(secs => lease_seconds))
        ON CONFLICT (id) DO UPDATE
        SET serial = excluded.serial, expires_at = excluded.expires_at, ended_at = NULL, is_resting = false
            WHERE (h.ended_at IS NULL OR h.is_resting) AND h.serial < excluded.serial;
        IF NOT FOUND THEN
            SELECT * INTO here FROM keyproxy.lease_holders AS h WHERE h.id = sender;
            IF here.ended_at IS NOT NULL AND NOT here.is_resting THEN
                RETURN;
            END IF;
            RAISE EXCEPTION 'a later message of this holder was processed already'
                USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END IF;
    SELECT count(*) INTO alive FROM keyproxy.lease_holders WHERE ended_at IS NULL AND expires_at > clock_timestamp();
    settles := settles_until > clock_timestamp();
    lease := 0; starts := 0; granted := alive; spent := 0; held := 0; ends_seconds := 0; is_wanted := false;
    wait_seconds := CASE WHEN settles THEN extract(epoch FROM settles_until - clock_timestamp()) ELSE 0 END;
    RETURN NEXT;
    IF cardinality(lines) = 0 THEN
        RETURN;
    END IF;
    instant := extract(epoch FROM clock_timestamp());
    lines := ARRAY(
        -- A lease whose first answer got lost stays in the window that it began in, though its holder cannot say which.
        SELECT ROW(l.lease, l.pool_kind, l.pool_id, l.is_test, l.measure, coalesce(
                       (SELECT (SELECT w.starts FROM keyproxy.windows AS w WHERE w.id = x.window_id)
                        FROM keyproxy.leases AS x WHERE x.holder = sender AND x.lease = l.lease),
                       keyproxy.window_start(l.measure, instant)
                   ), l.bound, l.interval_seconds, l.granted, l.used, l.returned, l.want, l.at_least, l.takes_all, l.is_closing
               )::keyproxy.lease_line
        FROM unnest(lines) AS l WHERE l.starts = 0
        UNION ALL
        SELECT l FROM unnest(lines) AS l WHERE l.starts <> 0
    );

    -- Again if a window was deleted as unused between being found and being locked.
    LOOP
        INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts)
        SELECT DISTINCT l.pool_kind, l.pool_id, l.is_test, l.measure, l.starts
        FROM unnest(lines) AS l
        WHERE (
            SELECT w.id FROM keyproxy.windows AS w
            WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
              AND w.starts = l.starts
        ) IS NULL
        ORDER BY 1, 2, 3, 4, 5
        ON CONFLICT DO NOTHING;

        wanted := ARRAY(
            SELECT DISTINCT (
                SELECT v.id FROM keyproxy.windows AS v
                WHERE v.pool_kind = l.pool_kind AND v.pool_id = l.pool_id AND v.is_test = l.is_test AND v.measure = l.measure
                  AND v.starts = l.starts
            ) FROM unnest(lines) AS l
        );
        PERFORM FROM keyproxy.windows AS w WHERE w.id = ANY (wanted) ORDER BY w.id FOR NO KEY UPDATE;
        GET DIAGNOSTICS locked = ROW_COUNT;
        EXIT WHEN locked = cardinality(wanted);
    END LOOP;
    instant := extract(epoch FROM clock_timestamp());

    RETURN QUERY
    WITH line AS (
        SELECT l.*, w.id AS window_id, w.starts AS window_starts, w.spent AS was_spent, w.held AS was_held,
               w.theoretical, w.wanted_at, w.wanted_by,
               keyproxy.window_end(l.measure, w.starts) AS ends,
               x.holder IS NOT NULL AS is_known,
               coalesce(x.granted, 0) AS was_granted, coalesce(x.used, 0) AS was_used, coalesce(x.returned, 0) AS was_returned,
               l.interval_seconds > 0 AS is_rate
        FROM unnest(lines) AS l
        JOIN LATERAL (
            SELECT * FROM keyproxy.windows AS w
            WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
              AND w.starts = l.starts LIMIT 1
        ) AS w ON true
        LEFT JOIN LATERAL (
            SELECT * FROM keyproxy.leases AS x WHERE x.holder = sender AND x.lease = l.lease LIMIT 1
        ) AS x ON true
    ), settled AS (
        -- What the ledger has forgotten it hears again from who holds it; a lease that is closed already is closed.
        SELECT line.*,
               NOT is_rate AND (is_known OR NOT is_closing) AS counts,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_granted, line.granted) END AS now_granted,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_used, line.used) END AS now_used,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_returned, line.returned) END AS now_returned,
               -- Never further ahead than that: the clock may have been set back, or the burst lowered.
               least(greatest(theoretical, instant) - instant, bound * interval_seconds) AS ahead
        FROM line
    ), summed AS (
        SELECT settled.*,
               CASE WHEN counts THEN now_used - was_used ELSE 0 END AS more_used,
               CASE
                   -- Closing returns also what was granted in an answer that got lost.
                   WHEN is_closing THEN now_used + now_returned
                   -- More used than was granted is granted by that.
                   ELSE greatest(now_granted, now_used + now_returned)
               END AS sure_granted
        FROM settled
    ), told AS (
        SELECT summed.*,
               CASE WHEN counts THEN sure_granted - now_used - now_returned ELSE 0 END AS outstanding,
               CASE WHEN counts THEN sure_granted - now_used - now_returned - (was_granted - was_used - was_returned) ELSE 0
               END AS more_held,
               row_number() OVER (PARTITION BY window_id ORDER BY want > 0 DESC, lease DESC) = 1 AS is_asker
        FROM summed
    ), asked AS (
        SELECT told.*,
               CASE
                   WHEN is_rate THEN floor((bound * interval_seconds - ahead) / interval_seconds + 1e-6)::bigint
                   WHEN settles OR instant >= ends THEN 0
                   ELSE bound - was_spent - was_held
                        - (sum(more_used + more_held) OVER (PARTITION BY window_id))::bigint
               END AS available
        FROM told
    ), judged AS (
        SELECT asked.*,
               CASE
                   WHEN want = 0 OR available < at_least OR NOT is_asker THEN 0
                   WHEN takes_all THEN available
                   WHEN alive <= 1 THEN least(want, available)
                   -- Whoever asks leaves something for the others, the less there is the less they take.
                   ELSE least(want, available, greatest(at_least, available / (2 * alive)))
               END AS given
        FROM asked
    ), totalled AS (
        -- Each line with what all lines of its window come to. To join them to the windows' new rows instead would take
        -- time with the square of their number.
        SELECT judged.*,
               sum(more_used) OVER of_window AS window_used,
               sum(more_held + CASE WHEN is_rate THEN 0 ELSE given END) OVER of_window AS window_held,
               max(instant + ahead + given * interval_seconds) OVER of_window AS window_theoretical,
               bool_or(want > 0 AND given = 0 AND is_asker AND NOT is_rate AND NOT settles AND instant < ends)
                   OVER of_window AS is_short,
               sum(outstanding) OVER of_window AS window_own
        FROM judged WINDOW of_window AS (PARTITION BY window_id)
    ), kept AS (
        INSERT INTO keyproxy.leases AS x (holder, lease, window_id, granted, used, returned)
        SELECT sender, j.lease, j.window_id, j.sure_granted + j.given, j.now_used, j.now_returned
        FROM totalled AS j WHERE j.counts AND NOT j.is_closing
        ON CONFLICT (holder, lease) DO UPDATE
        SET granted = excluded.granted, used = excluded.used, returned = excluded.returned
    ), closed AS (
        DELETE FROM keyproxy.leases AS x
        -- Not holder and = ANY (leases): PostgreSQL may take the holder for the index and look through all of its leases.
        WHERE x.ctid = ANY (ARRAY(
            SELECT (SELECT y.ctid FROM keyproxy.leases AS y WHERE y.holder = sender AND y.lease = j.lease)
            FROM totalled AS j WHERE j.is_closing AND j.is_known
        ))
    ), written AS (
        UPDATE keyproxy.windows AS w
        SET spent = w.spent + j.window_used,
            held = w.held + j.window_held,
            theoretical = CASE WHEN j.is_rate THEN j.window_theoretical ELSE w.theoretical END,
            wanted_at = CASE WHEN j.is_short AND w.held + j.window_held > j.window_own THEN instant ELSE w.wanted_at END,
            wanted_by = CASE WHEN j.is_short AND w.held + j.window_held > j.window_own THEN sender ELSE w.wanted_by END
        FROM totalled AS j
        WHERE w.id = j.window_id AND w.id = ANY (ARRAY(SELECT t.window_id FROM totalled AS t))
    )
    SELECT j.lease, j.window_starts,
           CASE WHEN j.is_rate THEN j.given WHEN j.counts THEN j.sure_granted + j.given ELSE j.used + j.returned END,
           CASE WHEN j.is_rate THEN 0 ELSE (j.was_spent + j.window_used)::bigint END,
           CASE WHEN j.is_rate THEN j.bound - greatest(0, j.available - j.given) ELSE (j.was_held + j.window_held)::bigint END,
           j.ends - instant,
           CASE WHEN j.is_rate AND j.want > 0 AND j.given = 0
                THEN greatest(0, j.ahead + j.at_least * j.interval_seconds - j.bound * j.interval_seconds) ELSE 0 END,
           instant - j.wanted_at < 2 AND j.wanted_by <> sender
    FROM totalled AS j;
END
$$;

-- Charge what ended holders have not returned, `portion` leases at most. How many were charged.
-- Holders before windows, windows in the order of their ids: as sync_leases locks them. Other proxies' portions are skipped.
CREATE FUNCTION keyproxy.charge_ended(portion int) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    ending text[] := ARRAY(
        SELECT h.id FROM keyproxy.lease_holders AS h WHERE h.is_ending ORDER BY h.id LIMIT 100 FOR UPDATE SKIP LOCKED
    );
    holders text[];
    numbers bigint[];
    charged bigint;
BEGIN
    IF cardinality(ending) = 0 THEN
        RETURN 0;
    END IF;
    SELECT array_agg(f.holder), array_agg(f.lease) INTO holders, numbers FROM (
        SELECT x.holder, x.lease FROM unnest(ending) AS e (id)
        CROSS JOIN LATERAL (
            SELECT l.holder, l.lease FROM keyproxy.leases AS l WHERE l.holder = e.id ORDER BY l.holder, l.lease LIMIT portion
        ) AS x
        LIMIT portion
    ) AS f;
    PERFORM FROM keyproxy.windows AS w
    WHERE w.id = ANY (ARRAY(
        SELECT (SELECT x.window_id FROM keyproxy.leases AS x WHERE x.holder = f.holder AND x.lease = f.lease)
        FROM unnest(holders, numbers) AS f (holder, lease)
    ))
    ORDER BY w.id FOR NO KEY UPDATE;
    WITH gone AS (
        DELETE FROM keyproxy.leases AS x
        WHERE x.ctid = ANY (ARRAY(
            SELECT (SELECT y.ctid FROM keyproxy.leases AS y WHERE y.holder = f.holder AND y.lease = f.lease)
            FROM unnest(holders, numbers) AS f (holder, lease)
        ))
        RETURNING x.window_id, x.granted - x.used - x.returned AS outstanding
    ), summed AS (
        SELECT g.window_id, sum(g.outstanding) AS outstanding FROM gone AS g GROUP BY g.window_id
    ), changed AS (
        UPDATE keyproxy.windows AS w
        SET held = w.held - s.outstanding,
            spent = w.spent + CASE WHEN w.measure = 'concurrency' THEN 0 ELSE s.outstanding END,
            forfeited = w.forfeited + CASE WHEN w.measure = 'concurrency' THEN 0 ELSE s.outstanding END
        FROM summed AS s WHERE w.id = s.window_id AND w.id = ANY (ARRAY(SELECT t.window_id FROM summed AS t))
    )
    SELECT count(*) INTO charged FROM gone;
    UPDATE keyproxy.lease_holders AS h SET is_ending = false
    WHERE h.id = ANY (ending) AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.holder = h.id);
    RETURN charged;
END
$$;

-- End holders: what they have not returned is charged, slots are free again; here and now as far as a portion goes, and the
-- rest by whichever proxy looks next. Meanwhile it stays held. The number of holders that were ended.
CREATE OR REPLACE FUNCTION keyproxy.end_holders(ending text[]) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    ended bigint;
BEGIN
    UPDATE keyproxy.lease_holders SET ended_at = clock_timestamp(), is_ending = true
    WHERE id = ANY (ending) AND ended_at IS NULL;
    GET DIAGNOSTICS ended = ROW_COUNT;
    PERFORM keyproxy.charge_ended(1000);
    RETURN ended;
END
$$;

-- End the holders whose time is over, and charge some of their leases: as many as the setting keyproxy.portion allows, 1,000
-- without it. How much was done: called again until that is 0, everything is.
-- It deletes no holder, so that nothing that goes wrong with deleting keeps slots taken.
CREATE OR REPLACE FUNCTION keyproxy.reap_holders() RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    portion int := coalesce(nullif(current_setting('keyproxy.portion', true), '')::int, 1000);
    dead text[];
BEGIN
    IF keyproxy.ledger_settles_until(0) > clock_timestamp() THEN
        -- A holder that seems dead may have spoken in the history that was lost.
        RETURN 0;
    END IF;
    dead := ARRAY(
        SELECT h.id FROM keyproxy.lease_holders AS h
        WHERE h.ended_at IS NULL AND h.expires_at <= clock_timestamp()
        ORDER BY h.id LIMIT least(100, portion) FOR UPDATE SKIP LOCKED
    );
    -- A statement of its own: it sees the leases as they are now that the holders are locked.
    UPDATE keyproxy.lease_holders AS h
    SET ended_at = clock_timestamp(),
        is_ending = EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.holder = h.id),
        is_resting = NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.holder = h.id)
    WHERE h.id = ANY (dead);
    RETURN cardinality(dead) + keyproxy.charge_ended(portion);
END
$$;

-- Delete holders that ended more than a day ago, `portion` at most. How many were deleted.
-- By then no message of theirs is under way any more. One that was suspended with units it was granted learns from
-- sync_leases that it has ended, row or no row.
CREATE FUNCTION keyproxy.forget_holders(portion int) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    gone bigint;
BEGIN
    DELETE FROM keyproxy.lease_holders AS h WHERE h.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.lease_holders AS o
        WHERE o.ended_at < clock_timestamp() - interval '24 hours' AND NOT o.is_ending
        ORDER BY o.ended_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END
$$;

-- Windows that are no calendar window, rates and concurrency, which nothing else deletes: those of users and keys that are
-- gone would stay for ever. After the id `after`, `portion` are looked at, and those deleted that are as new and not
-- in use; the next message makes them again. Where to go on; null: that was the last of them.
CREATE INDEX windows_timeless ON keyproxy.windows (id) WHERE starts = 0;
CREATE FUNCTION keyproxy.forget_windows(after bigint, portion int, OUT next bigint, OUT gone bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    seen bigint[] := ARRAY(
        SELECT w.id FROM keyproxy.windows AS w WHERE w.starts = 0 AND w.id > after ORDER BY w.id LIMIT portion
    );
    long_ago float8 := extract(epoch FROM clock_timestamp()) - 86400;
BEGIN
    DELETE FROM keyproxy.windows AS w WHERE w.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.windows AS o
        WHERE o.id = ANY (seen) AND o.held = 0 AND o.theoretical < long_ago AND o.wanted_at < long_ago
          AND (o.measure = 'rate' OR o.measure = 'concurrency' AND o.spent = 0)
          AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.window_id = o.id)
        ORDER BY o.id FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    next := CASE WHEN cardinality(seen) = portion THEN seen[portion] END;
END
$$;

-- As 0007_usage.sql has made it, but that one call does no more than a statement's time allows, however much is overdue:
-- a few partitions, and of everything else `portion` rows.
CREATE OR REPLACE FUNCTION keyproxy.tend_usage(event_days int, usage_days int, portion int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms' SET jit = off AS $$
DECLARE
    today date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
    partitions_max CONSTANT int := 4;
    old_partition text;
    gone bigint := 0;
    is_more boolean;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('keyproxy.tend_usage', 0)) THEN
        RETURN false;
    END IF;
    IF event_days > 0 THEN
        PERFORM keyproxy.make_event_days();
    END IF;
    FOR old_partition IN
        SELECT c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'keyproxy.usage_event_batches'::regclass
          AND c.relname < 'usage_event_batches_' || to_char(today - event_days, 'YYYYMMDD')
        ORDER BY 1 LIMIT partitions_max
    LOOP
        BEGIN
            EXECUTE format('DROP TABLE keyproxy.%I', old_partition);
            gone := gone + 1;
        EXCEPTION WHEN lock_not_available THEN
            -- A reader has it, and may have the others: they go the next time. Waiting for each would hold up the writers.
            EXIT;
        END;
    END LOOP;
    is_more := gone >= partitions_max;
    DELETE FROM keyproxy.usage WHERE ctid = ANY (ARRAY(
        SELECT u.ctid FROM keyproxy.usage AS u WHERE u.day < today - usage_days LIMIT portion
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    is_more := is_more OR gone >= portion;
    DELETE FROM keyproxy.windows WHERE id = ANY (ARRAY(
        SELECT w.id FROM keyproxy.windows AS w
        WHERE w.starts > 0 AND w.starts < extract(epoch FROM clock_timestamp()) - 62 * 86400 AND w.held = 0
          AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.window_id = w.id)
        LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    is_more := is_more OR gone >= portion;
    -- One row per process that wrote in the last month: an index on a time that every batch changes would cost more.
    DELETE FROM keyproxy.usage_writers WHERE ctid = ANY (ARRAY(
        SELECT w.ctid FROM keyproxy.usage_writers AS w WHERE w.written_at < clock_timestamp() - interval '30 days'
        LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN is_more OR gone >= portion;
END
$$;
REVOKE EXECUTE ON FUNCTION keyproxy.tend_usage(int, int, int) FROM PUBLIC;
