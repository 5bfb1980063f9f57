-- Limits per model, route and mode, on money, and per minute, hour and week; credits; alerts of limits that run out.
--
-- The previous release keeps working: it knows windows without a selector, and its calls go to the functions below.

-- Limits are an object, or an array for what it cannot express. What limits/plan.py reads, no less and no more.
CREATE FUNCTION keyproxy.is_limit(entry jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN jsonb_typeof(entry) <> 'object' THEN false
        WHEN entry - ARRAY['measure', 'per', 'amount', 'burst', 'model', 'route', 'mode'] <> '{}' THEN false
        WHEN jsonb_typeof(entry -> 'measure') IS DISTINCT FROM 'string'
          OR jsonb_typeof(entry -> 'amount') IS DISTINCT FROM 'number' THEN false
        WHEN coalesce(jsonb_typeof(entry -> 'per'), 'string') <> 'string'
          OR coalesce(jsonb_typeof(entry -> 'burst'), 'number') <> 'number'
          OR coalesce(jsonb_typeof(entry -> 'model'), 'string') <> 'string'
          OR coalesce(jsonb_typeof(entry -> 'route'), 'string') <> 'string'
          OR coalesce(jsonb_typeof(entry -> 'mode'), 'string') <> 'string' THEN false
        ELSE
            coalesce(entry ->> 'model', '') ~ '^[A-Za-z0-9._:/@-]{0,128}$'
            -- Printable ASCII without comma, quote and backslash.
            AND coalesce(entry ->> 'route', '') ~ '^[ !#-+\u002d-\u005b\u005d-~]{0,128}$'
            AND coalesce(entry ->> 'mode', '') IN ('', 'live', 'test')
            AND CASE
                WHEN entry ->> 'measure' IN ('request-rate', 'token-rate') THEN
                    coalesce(entry ->> 'per', '') IN ('second', 'minute', 'hour', 'day')
                    AND (entry ->> 'amount')::numeric
                        / CASE entry ->> 'per' WHEN 'second' THEN 1 WHEN 'minute' THEN 60 WHEN 'hour' THEN 3600 ELSE 86400 END
                        BETWEEN 1 / 86400.0 AND CASE entry ->> 'measure' WHEN 'request-rate' THEN 1000000 ELSE 100000000 END
                    AND (entry ->> 'measure' = 'request-rate' OR (entry ->> 'amount')::numeric % 1 = 0)
                    AND (
                        NOT entry ? 'burst'
                        OR (entry ->> 'burst')::numeric BETWEEN 1 AND 999999999999999 AND (entry ->> 'burst')::numeric % 1 = 0
                    )
                ELSE
                    NOT entry ? 'burst'
                    AND (entry ->> 'amount')::numeric BETWEEN 0 AND 999999999999999
                    AND (entry ->> 'amount')::numeric % 1 = 0
                    AND CASE entry ->> 'measure'
                        WHEN 'requests' THEN entry ->> 'per' IN ('minute', 'hour', 'day', 'week', 'month')
                        WHEN 'tokens' THEN entry ->> 'per' IN ('minute', 'hour', 'day', 'week', 'month', 'request')
                        WHEN 'spend' THEN entry ->> 'per' IN ('minute', 'hour', 'day', 'week', 'month', 'request')
                        WHEN 'concurrency' THEN coalesce(entry ->> 'per', '') = ''
                        ELSE false
                    END IS TRUE
            END
    END
$$;

CREATE OR REPLACE FUNCTION keyproxy.are_limits(limits jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE jsonb_typeof(limits)
        WHEN 'object' THEN (
            SELECT coalesce(bool_and(
                CASE
                    WHEN jsonb_typeof(value) = 'null' THEN true
                    WHEN jsonb_typeof(value) <> 'number' THEN false
                    WHEN key = 'rate' THEN (value #>> '{}')::numeric BETWEEN 1 / 86400.0 AND 1000000
                    WHEN key = 'burst' THEN (value #>> '{}')::numeric BETWEEN 1 AND 1e15 AND limits ? 'rate'
                    ELSE (value #>> '{}')::numeric BETWEEN 0 AND 1e15
                END
                AND key IN ('rate', 'burst', 'concurrency', 'requests_per_day', 'requests_per_month',
                            'tokens_per_request', 'tokens_per_day', 'tokens_per_month')
                AND (key = 'rate' OR jsonb_typeof(value) = 'null' OR (value #>> '{}')::numeric % 1 = 0)
            ), true)
            FROM jsonb_each(limits)
        )
        WHEN 'array' THEN
            jsonb_array_length(limits) <= 32
            AND (SELECT coalesce(bool_and(keyproxy.is_limit(entry)), true) FROM jsonb_array_elements(limits) AS entry)
            -- No limit twice: a rate is the same one whatever its interval.
            AND NOT EXISTS (
                SELECT FROM jsonb_array_elements(limits) AS entry
                GROUP BY entry ->> 'measure',
                         CASE WHEN entry ->> 'measure' NOT IN ('request-rate', 'token-rate') THEN coalesce(entry ->> 'per', '') END,
                         coalesce(entry ->> 'model', ''), coalesce(entry ->> 'route', ''), coalesce(entry ->> 'mode', '')
                HAVING count(*) > 1
            )
        ELSE false
    END
$$;
ALTER TABLE keyproxy.plans DROP CONSTRAINT plans_limits_check;

-- In the order in which messages lock them: see 0011_bounds.sql.
LOCK TABLE keyproxy.ledger_history, keyproxy.lease_holders, keyproxy.leases, keyproxy.windows IN ACCESS EXCLUSIVE MODE;

-- selector: `mode:…`, `model:…`, `route:…`, in this order, those that apply, separated by commas; '' for a limit on everything.
-- credited: added to the plan's limit for this window alone. holders: how many holders have a lease on this window, kept in
-- step with the leases, so that no message has to count them. alerted: the percentages that have a row in limit_alerts.
-- recalled_at: when idle units were last recalled from holders that report rarely, because they are many.
ALTER TABLE keyproxy.windows
    ADD COLUMN selector text NOT NULL DEFAULT '',
    ADD COLUMN credited bigint NOT NULL DEFAULT 0,
    ADD COLUMN holders int NOT NULL DEFAULT 0,
    ADD COLUMN alerted int[] NOT NULL DEFAULT '{}',
    ADD COLUMN recalled_at float8 NOT NULL DEFAULT 0,
    ADD CONSTRAINT windows_selector_short CHECK (length(selector) <= 600) NOT VALID,
    DROP CONSTRAINT windows_measure_check,
    ADD CONSTRAINT windows_measure_known CHECK (measure IN (
        'rate', 'token_rate', 'concurrency',
        'requests_per_minute', 'requests_per_hour', 'requests_per_day', 'requests_per_week', 'requests_per_month',
        'tokens_per_minute', 'tokens_per_hour', 'tokens_per_day', 'tokens_per_week', 'tokens_per_month',
        'spend_per_minute', 'spend_per_hour', 'spend_per_day', 'spend_per_week', 'spend_per_month'
    )) NOT VALID,
    DROP CONSTRAINT windows_pool_kind_pool_id_is_test_measure_starts_key,
    ADD CONSTRAINT windows_account UNIQUE (pool_kind, pool_id, is_test, measure, starts, selector);
COMMENT ON COLUMN keyproxy.windows.starts IS 'Unix time at which the calendar window begins (UTC); 0: not a calendar window';
COMMENT ON COLUMN keyproxy.windows.credited IS 'the limit of this window is the plan''s plus this';
-- Windows of a minute or an hour are many, and deleted sooner than others.
CREATE INDEX windows_short ON keyproxy.windows (starts)
    WHERE measure IN ('requests_per_minute', 'requests_per_hour', 'tokens_per_minute', 'tokens_per_hour',
                      'spend_per_minute', 'spend_per_hour');

-- A message counts the holders of a window by their change: whether this holder had a lease on it before and has one after.
-- A hash, because PostgreSQL would go through an index with the holder itself to find the leases of a holder.
CREATE INDEX leases_window_holder ON keyproxy.leases (window_id, hashtext(holder));
DROP INDEX keyproxy.leases_window_id;
UPDATE keyproxy.windows AS w SET holders = c.holders
FROM (SELECT x.window_id, count(DISTINCT x.holder) AS holders FROM keyproxy.leases AS x GROUP BY x.window_id) AS c
WHERE w.id = c.window_id;

-- Calendar windows begin at fixed multiples, except months. 1970-01-01 was a Thursday: weeks begin three days earlier.
CREATE OR REPLACE FUNCTION keyproxy.window_start(measure text, at float8) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE split_part(measure, '_per_', 2)
        WHEN 'day' THEN (floor(at / 86400) * 86400)::bigint
        WHEN 'month' THEN extract(epoch FROM date_trunc('month', to_timestamp(at) AT TIME ZONE 'UTC'))::bigint
        WHEN 'minute' THEN (floor(at / 60) * 60)::bigint
        WHEN 'hour' THEN (floor(at / 3600) * 3600)::bigint
        WHEN 'week' THEN (floor((at + 259200) / 604800) * 604800 - 259200)::bigint
        ELSE 0
    END
$$;

CREATE OR REPLACE FUNCTION keyproxy.window_end(measure text, starts bigint) RETURNS float8
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE split_part(measure, '_per_', 2)
        WHEN 'day' THEN starts + 86400
        WHEN 'month' THEN extract(epoch FROM (to_timestamp(starts) AT TIME ZONE 'UTC' + interval '1 month'))::float8
        WHEN 'minute' THEN starts + 60
        WHEN 'hour' THEN starts + 3600
        WHEN 'week' THEN starts + 604800
        ELSE 'Infinity'::float8
    END
$$;

-- The outbox of alerts: one row for each window and percentage, and so one message id, however often it is sent. A sender
-- claims a row by moving next_at ahead; if it dies, the row is free again then. Amounts are those of the moment at which the
-- percentage was reached.
CREATE TABLE keyproxy.limit_alerts (
    window_id    bigint NOT NULL REFERENCES keyproxy.windows (id) ON DELETE CASCADE,
    percentage   int NOT NULL CHECK (percentage BETWEEN 1 AND 100),
    message_id   text NOT NULL UNIQUE CHECK (message_id ~ '^alr_[0-9a-f]{32}$'),
    amount       bigint NOT NULL,
    spent        bigint NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    attempts     int NOT NULL DEFAULT 0,
    delivered_at timestamptz,
    given_up_at  timestamptz,
    last_error   text CHECK (length(last_error) <= 500),
    PRIMARY KEY (window_id, percentage)
);
COMMENT ON COLUMN keyproxy.limit_alerts.amount IS 'the limit of the window, with what was credited';
CREATE INDEX limit_alerts_waiting ON keyproxy.limit_alerts (next_at) WHERE delivered_at IS NULL AND given_up_at IS NULL;

-- Which of these percentages a window has reached that has no alert for them yet. refused: a request needs more than is left.
CREATE FUNCTION keyproxy.alerts_due(percentages int[], alerted int[], amount bigint, spent bigint, refused boolean)
RETURNS int[] LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    RETURN ARRAY(
        SELECT p FROM unnest(percentages) AS p
        WHERE p <> ALL (alerted) AND (spent > 0 AND spent * 100 >= p * amount OR p = 100 AND refused)
    );
END
$$;

-- Write the alerts of a window for these percentages; 0, so that a message can call it in passing. As its owner: proxies may
-- write alerts through messages alone. The id is derived from what the alert is about, so that it is the same in a database
-- that was restored from a backup.
CREATE FUNCTION keyproxy.note_alerts(id bigint, percentages int[], amount bigint, spent bigint) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    INSERT INTO keyproxy.limit_alerts (window_id, percentage, message_id, amount, spent)
    SELECT w.id, p, 'alr_' || left(encode(sha256(convert_to(
               concat_ws(' ', w.pool_kind, w.pool_id, w.is_test, w.measure, w.starts, p, w.selector), 'UTF8'
           )), 'hex'), 32), note_alerts.amount, note_alerts.spent
    FROM keyproxy.windows AS w CROSS JOIN unnest(percentages) AS p
    WHERE w.id = note_alerts.id
    ON CONFLICT DO NOTHING;
    RETURN 0;
END
$$;

-- By how much the number of holders of a window changes when one of them opens and closes so many leases on it.
CREATE FUNCTION keyproxy.more_holders(id bigint, owner text, opened bigint, closed bigint) RETURNS int
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    before bigint := (
        SELECT count(*) FROM keyproxy.leases AS x
        WHERE x.window_id = id AND hashtext(x.holder) = hashtext(owner) AND x.holder || '' = owner
    );
BEGIN
    RETURN (before + opened > closed)::int - (before > 0)::int;
END
$$;

-- Recalls of idle units, which holders read with the change feed. A table of its own: the previous release takes a kind of
-- change that it does not know for a change of any key.
CREATE TABLE keyproxy.recalls (
    xid         xid8 NOT NULL DEFAULT pg_current_xact_id(),
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    subject     text NOT NULL
);
CREATE INDEX recalls_xid ON keyproxy.recalls (xid);
CREATE INDEX recalls_at ON keyproxy.recalls (at);
COMMENT ON COLUMN keyproxy.recalls.subject IS 'JSON: pool kind, pool id, is_test, measure, selector, holders';

-- Ask as few holders of a window as suffice for their idle units, 100 at most: those with the most. 0, so that a message can
-- call it in passing. As its owner: proxies write recalls through messages alone.
CREATE FUNCTION keyproxy.recall_units(id bigint, asker text, needed bigint) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    long_ago timestamptz := clock_timestamp() - interval '1 minute';
BEGIN
    INSERT INTO keyproxy.recalls (subject)
    SELECT jsonb_build_array(w.pool_kind, w.pool_id, w.is_test, w.measure, w.selector, (
        SELECT jsonb_agg(c.holder ORDER BY c.outstanding DESC, c.holder) FROM (
            SELECT f.holder, f.outstanding, sum(f.outstanding) OVER (ORDER BY f.outstanding DESC, f.holder) - f.outstanding AS before
            FROM (
                SELECT x.holder, sum(x.granted - x.used - x.returned) AS outstanding FROM keyproxy.leases AS x
                WHERE x.window_id = w.id AND x.holder <> asker AND x.granted > x.used + x.returned
                GROUP BY x.holder ORDER BY 2 DESC, 1 LIMIT 100
            ) AS f
        ) AS c WHERE c.before < needed
    ))::text
    FROM keyproxy.windows AS w WHERE w.id = recall_units.id;
    -- Each row deletes more than it adds.
    DELETE FROM keyproxy.recalls AS r WHERE r.ctid = ANY (ARRAY(
        SELECT o.ctid FROM keyproxy.recalls AS o WHERE o.at < long_ago ORDER BY o.at LIMIT 10 FOR UPDATE SKIP LOCKED
    ));
    PERFORM pg_notify('keyproxy_changes', '');
    RETURN 0;
END
$$;

CREATE TYPE keyproxy.lease_report AS (
    lease bigint, pool_kind text, pool_id text, is_test boolean, measure text, selector text, starts bigint, bound bigint,
    interval_seconds float8, granted bigint, used bigint, returned bigint, want bigint, at_least bigint,
    most bigint, is_closing boolean, granted_at float8
);

-- One message of a holder, as 0011_bounds.sql had it, for windows with selectors and credits. One row per line and one in
-- front, of lease 0, whose granted is the number of living holders, and whose wait_seconds says for how long nothing will be
-- granted; no row at all: this holder has ended.
-- percentages: of limit and credit together, at which a window gets an alert, in ascending order. 100 also applies once a
-- request needs more than what is not spent.
-- A line about a rate gives `returned` units back, this once: a lost message only admits less.
CREATE FUNCTION keyproxy.sync_leases(
    sender text, message bigint, lease_seconds float8, lines keyproxy.lease_report[], percentages int[],
    OUT lease bigint, OUT starts bigint, OUT granted bigint, OUT spent bigint, OUT held bigint,
    OUT ends_seconds float8, OUT wait_seconds float8, OUT is_wanted boolean, OUT credited bigint, OUT holders bigint,
    OUT granted_at float8
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
    lowest int := percentages[1];
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
    credited := 0; holders := 0; granted_at := 0;
    wait_seconds := CASE WHEN settles THEN extract(epoch FROM settles_until - clock_timestamp()) ELSE 0 END;
    RETURN NEXT;
    IF cardinality(lines) = 0 THEN
        RETURN;
    END IF;
    instant := extract(epoch FROM clock_timestamp());
    lines := ARRAY(
        -- A lease whose first answer got lost stays in the window that it began in, though its holder cannot say which.
        SELECT ROW(l.lease, l.pool_kind, l.pool_id, l.is_test, l.measure, l.selector, coalesce(
                       (SELECT (SELECT w.starts FROM keyproxy.windows AS w WHERE w.id = x.window_id)
                        FROM keyproxy.leases AS x WHERE x.holder = sender AND x.lease = l.lease),
                       keyproxy.window_start(l.measure, instant)
                   ), l.bound, l.interval_seconds, l.granted, l.used, l.returned, l.want, l.at_least, l.most, l.is_closing, l.granted_at
               )::keyproxy.lease_report
        FROM unnest(lines) AS l WHERE l.starts = 0
        UNION ALL
        SELECT l FROM unnest(lines) AS l WHERE l.starts <> 0
    );

    -- Again if a window is made, or was deleted as unused between being found and being locked.
    LOOP
        wanted := ARRAY(
            SELECT DISTINCT (
                SELECT v.id FROM keyproxy.windows AS v
                WHERE v.pool_kind = l.pool_kind AND v.pool_id = l.pool_id AND v.is_test = l.is_test AND v.measure = l.measure
                  AND v.starts = l.starts AND v.selector = l.selector
            ) FROM unnest(lines) AS l
        );
        IF array_position(wanted, NULL) IS NOT NULL THEN
            INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts, selector)
            SELECT DISTINCT l.pool_kind, l.pool_id, l.is_test, l.measure, l.starts, l.selector
            FROM unnest(lines) AS l
            WHERE (
                SELECT w.id FROM keyproxy.windows AS w
                WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
                  AND w.starts = l.starts AND w.selector = l.selector
            ) IS NULL
            ORDER BY 1, 2, 3, 4, 5, 6
            ON CONFLICT DO NOTHING;
            CONTINUE;
        END IF;
        PERFORM FROM keyproxy.windows AS w WHERE w.id = ANY (wanted) ORDER BY w.id FOR NO KEY UPDATE;
        GET DIAGNOSTICS locked = ROW_COUNT;
        EXIT WHEN locked = cardinality(wanted);
    END LOOP;
    instant := extract(epoch FROM clock_timestamp());

    RETURN QUERY
    WITH line AS (
        SELECT l.*, w.id AS window_id, w.starts AS window_starts, w.spent AS was_spent, w.held AS was_held,
               w.theoretical, w.wanted_at, w.wanted_by, w.recalled_at, w.credited AS window_credited, w.holders AS were_holders, w.alerted,
               keyproxy.window_end(l.measure, w.starts) AS ends,
               x.holder IS NOT NULL AS is_known, x.tid,
               coalesce(x.granted, 0) AS was_granted, coalesce(x.used, 0) AS was_used, coalesce(x.returned, 0) AS was_returned,
               l.interval_seconds > 0 AS is_rate
        FROM unnest(lines) AS l
        JOIN LATERAL (
            SELECT * FROM keyproxy.windows AS w
            WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
              AND w.starts = l.starts AND w.selector = l.selector LIMIT 1
        ) AS w ON true
        LEFT JOIN LATERAL (
            SELECT x.*, x.ctid AS tid FROM keyproxy.leases AS x WHERE x.holder = sender AND x.lease = l.lease LIMIT 1
        ) AS x ON true
    ), settled AS (
        -- What the ledger has forgotten it hears again from who holds it; a lease that is closed already is closed.
        SELECT line.*,
               NOT is_rate AND (is_known OR NOT is_closing) AS counts,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_granted, line.granted) END AS now_granted,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_used, line.used) END AS now_used,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_returned, line.returned) END AS now_returned,
               -- Never further ahead than that: the clock may have been set back, or the burst lowered.
               -- What is given back has been refilled in part since it was granted; use beyond what was granted counts in full.
               CASE WHEN is_rate THEN greatest(0, least(
                   least(greatest(theoretical, instant) - instant, bound * interval_seconds)
                   - CASE WHEN measure <> 'token_rate' THEN 0
                          WHEN line.returned > 0
                          THEN greatest(0, line.returned * interval_seconds - greatest(0, instant - line.granted_at))
                          ELSE line.returned * interval_seconds END,
                   bound * interval_seconds
               )) END AS ahead
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
                   ELSE bound + window_credited - was_spent - was_held
                        - (sum(more_used + more_held) OVER (PARTITION BY window_id))::bigint
               END AS available
        FROM told
    ), judged AS (
        SELECT asked.*,
               CASE
                   WHEN want = 0 OR available < at_least OR NOT is_asker THEN 0
                   WHEN alive <= 1 THEN least(want, available)
                   -- Beyond what its requests wait for, a holder leaves something for the others: the less there is, the
                   -- less it gets.
                   ELSE least(want, available, greatest(at_least, most, available / (2 * alive)))
               END AS given
        FROM asked
    ), totalled AS (
        -- Each line with what all lines of its window come to. To join them to the windows' new rows instead would take
        -- time with the square of their number.
        SELECT judged.*,
               (sum(more_used) OVER of_window)::bigint AS window_used,
               (sum(more_held + CASE WHEN is_rate THEN 0 ELSE given END) OVER of_window)::bigint AS window_held,
               max(instant + ahead + given * interval_seconds) OVER of_window AS window_theoretical,
               bool_or(want > 0 AND given = 0 AND is_asker AND NOT is_rate AND NOT settles AND instant < ends)
                   OVER of_window AS is_short,
               (sum(outstanding) OVER of_window)::bigint AS window_own,
               -- The leases that are opened, and 2^16 times those that are closed.
               sum(CASE WHEN is_known AND is_closing THEN 65536 WHEN counts AND NOT is_known THEN 1 ELSE 0 END) OVER of_window
                   AS changes
        FROM judged WINDOW of_window AS (PARTITION BY window_id)
    ), counted AS (
        SELECT t.*,
               CASE WHEN t.changes = 0 THEN 0 ELSE keyproxy.more_holders(
                   t.window_id, sender, t.changes & 65535, t.changes >> 16
               ) END AS more_holders,
               -- Few holders report often enough to notice by themselves that units are wanted.
               t.is_short AND t.is_asker AND t.were_holders > 30 AND t.was_held + t.window_held > t.window_own
                   AND instant - t.recalled_at >= 1 AS recalls,
               -- One line speaks for its window.
               CASE
                   WHEN t.is_asker AND t.ends < 'Infinity'
                        AND ((t.was_spent + t.window_used) * 100 >= lowest * (t.bound + t.window_credited) OR t.is_short)
                        AND NOT t.alerted @> percentages
                   THEN keyproxy.alerts_due(
                       percentages, t.alerted, t.bound + t.window_credited, t.was_spent + t.window_used,
                       t.is_short AND t.at_least <= t.bound + t.window_credited
                       AND t.at_least > t.bound + t.window_credited - t.was_spent - t.window_used
                   )
                   ELSE '{}'
               END AS reached
        FROM totalled AS t
    ), kept AS (
        INSERT INTO keyproxy.leases AS x (holder, lease, window_id, granted, used, returned)
        SELECT sender, j.lease, j.window_id, j.sure_granted + j.given, j.now_used, j.now_returned
        FROM counted AS j WHERE j.counts AND NOT j.is_closing
        ON CONFLICT (holder, lease) DO UPDATE
        SET granted = excluded.granted, used = excluded.used, returned = excluded.returned
    ), closed AS (
        DELETE FROM keyproxy.leases AS x
        -- Not holder and = ANY (leases): PostgreSQL may take the holder for the index and look through all of its leases.
        WHERE x.ctid = ANY (ARRAY(SELECT j.tid FROM counted AS j WHERE j.is_closing AND j.is_known))
    ), written AS (
        UPDATE keyproxy.windows AS w
        SET spent = w.spent + j.window_used,
            held = w.held + j.window_held,
            theoretical = CASE WHEN j.is_rate THEN j.window_theoretical ELSE w.theoretical END,
            wanted_at = CASE WHEN j.is_short AND w.held + j.window_held > j.window_own THEN instant ELSE w.wanted_at END,
            wanted_by = CASE WHEN j.is_short AND w.held + j.window_held > j.window_own THEN sender ELSE w.wanted_by END,
            holders = w.holders + j.more_holders,
            recalled_at = CASE WHEN j.recalls THEN instant ELSE w.recalled_at END,
            alerted = CASE WHEN j.reached = '{}' THEN w.alerted ELSE w.alerted || j.reached END
        FROM counted AS j
        WHERE j.is_asker AND w.id = j.window_id AND w.id = ANY (ARRAY(SELECT t.window_id FROM counted AS t))
    )
    SELECT j.lease, j.window_starts,
           CASE WHEN j.is_rate THEN j.given WHEN j.counts THEN j.sure_granted + j.given ELSE j.used + j.returned END,
           CASE WHEN j.is_rate THEN 0 ELSE j.was_spent + j.window_used END,
           CASE WHEN j.is_rate THEN j.bound - greatest(0, j.available - j.given) ELSE j.was_held + j.window_held END,
           j.ends - instant,
           CASE WHEN j.is_rate AND j.want > 0 AND j.given = 0
                THEN greatest(0, j.ahead + j.at_least * j.interval_seconds - j.bound * j.interval_seconds) ELSE 0 END,
           instant - j.wanted_at < 2 AND j.wanted_by <> sender,
           j.window_credited,
           CASE WHEN j.is_rate THEN 1 ELSE greatest(1, j.were_holders + j.more_holders + CASE
               WHEN j.reached = '{}' THEN 0
               ELSE keyproxy.note_alerts(
                   j.window_id, j.reached, j.bound + j.window_credited, j.was_spent + j.window_used
               )
           END + CASE
               WHEN j.recalls THEN keyproxy.recall_units(j.window_id, sender, j.at_least - greatest(0, j.available))
               ELSE 0
           END)::bigint END,
           CASE WHEN j.is_rate THEN instant ELSE 0 END
    FROM counted AS j;
END
$$;

-- As the previous release calls it: windows without a selector, no alerts.
CREATE OR REPLACE FUNCTION keyproxy.sync_leases(
    sender text, message bigint, lease_seconds float8, lines keyproxy.lease_line[],
    OUT lease bigint, OUT starts bigint, OUT granted bigint, OUT spent bigint, OUT held bigint,
    OUT ends_seconds float8, OUT wait_seconds float8, OUT is_wanted boolean
) RETURNS SETOF record LANGUAGE sql
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
    SELECT r.lease, r.starts, r.granted, r.spent, r.held, r.ends_seconds, r.wait_seconds, r.is_wanted
    FROM keyproxy.sync_leases(sender, message, lease_seconds, ARRAY(
        -- Units of a rate were not returned, and takes_all asked for whatever is left.
        SELECT ROW(l.lease, l.pool_kind, l.pool_id, l.is_test, l.measure, '', l.starts, l.bound, l.interval_seconds, l.granted,
                   l.used, CASE WHEN l.interval_seconds > 0 THEN 0 ELSE l.returned END,
                   CASE WHEN l.takes_all AND l.want > 0 THEN l.bound ELSE l.want END, l.at_least,
                   CASE WHEN l.takes_all AND l.want > 0 THEN l.bound ELSE 0 END, l.is_closing, 0)::keyproxy.lease_report
        FROM unnest(lines) AS l
    ), NULL) AS r
$$;

-- As 0011_bounds.sql had it, with the holders of each window.
CREATE OR REPLACE FUNCTION keyproxy.charge_ended(portion int) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    ending text[] := ARRAY(
        SELECT h.id FROM keyproxy.lease_holders AS h WHERE h.is_ending ORDER BY h.id LIMIT 100 FOR UPDATE SKIP LOCKED
    );
    owners text[];
    numbers bigint[];
    charged bigint;
BEGIN
    IF cardinality(ending) = 0 THEN
        RETURN 0;
    END IF;
    SELECT array_agg(f.holder), array_agg(f.lease) INTO owners, numbers FROM (
        SELECT x.holder, x.lease FROM unnest(ending) AS e (id)
        CROSS JOIN LATERAL (
            SELECT l.holder, l.lease FROM keyproxy.leases AS l WHERE l.holder = e.id ORDER BY l.holder, l.lease LIMIT portion
        ) AS x
        LIMIT portion
    ) AS f;
    PERFORM FROM keyproxy.windows AS w
    WHERE w.id = ANY (ARRAY(
        SELECT (SELECT x.window_id FROM keyproxy.leases AS x WHERE x.holder = f.holder AND x.lease = f.lease)
        FROM unnest(owners, numbers) AS f (holder, lease)
    ))
    ORDER BY w.id FOR NO KEY UPDATE;
    WITH gone AS (
        DELETE FROM keyproxy.leases AS x
        WHERE x.ctid = ANY (ARRAY(
            SELECT (SELECT y.ctid FROM keyproxy.leases AS y WHERE y.holder = f.holder AND y.lease = f.lease)
            FROM unnest(owners, numbers) AS f (holder, lease)
        ))
        RETURNING x.window_id, x.holder, x.granted - x.used - x.returned AS outstanding
    ), of_holder AS (
        -- The leases as they were before the deletion: a holder with more of them than are gone still has one.
        SELECT g.window_id, sum(g.outstanding) AS outstanding,
               CASE WHEN (
                   SELECT count(*) FROM keyproxy.leases AS x
                   WHERE x.window_id = g.window_id AND hashtext(x.holder) = hashtext(g.holder) AND x.holder || '' = g.holder
               ) > count(*) THEN 0 ELSE 1 END AS leaves
        FROM gone AS g GROUP BY g.window_id, g.holder
    ), summed AS (
        SELECT o.window_id, sum(o.outstanding) AS outstanding, sum(o.leaves) AS leaving FROM of_holder AS o GROUP BY o.window_id
    ), changed AS (
        UPDATE keyproxy.windows AS w
        SET held = w.held - s.outstanding,
            spent = w.spent + CASE WHEN w.measure = 'concurrency' THEN 0 ELSE s.outstanding END,
            forfeited = w.forfeited + CASE WHEN w.measure = 'concurrency' THEN 0 ELSE s.outstanding END,
            holders = w.holders - s.leaving
        FROM summed AS s WHERE w.id = s.window_id AND w.id = ANY (ARRAY(SELECT t.window_id FROM summed AS t))
    )
    SELECT count(*) INTO charged FROM gone;
    UPDATE keyproxy.lease_holders AS h SET is_ending = false
    WHERE h.id = ANY (ending) AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.holder = h.id);
    RETURN charged;
END
$$;

-- Delete holders that ended almost an hour ago, `portion` at most. How many were deleted.
-- By then no message of theirs is under way any more. One that was suspended with units it was granted learns from
-- sync_leases that it has ended, row or no row.
CREATE OR REPLACE FUNCTION keyproxy.forget_holders(portion int) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    -- A variable: the index does not serve a comparison with clock_timestamp(), which is volatile.
    long_ago timestamptz := clock_timestamp() - interval '55 minutes';
    gone bigint;
BEGIN
    DELETE FROM keyproxy.lease_holders AS h WHERE h.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.lease_holders AS o
        WHERE o.ended_at < long_ago AND NOT o.is_ending
        ORDER BY o.ended_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END
$$;

-- As 0011_bounds.sql had it, for both kinds of rates.
CREATE OR REPLACE FUNCTION keyproxy.forget_windows(after bigint, portion int, OUT next bigint, OUT gone bigint)
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
          AND (o.measure IN ('rate', 'token_rate') OR o.measure = 'concurrency' AND o.spent = 0)
          AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.window_id = o.id)
        ORDER BY o.id FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    next := CASE WHEN cardinality(seen) = portion THEN seen[portion] END;
END
$$;

-- Credits: who raised or lowered the limit of one window, and why. With the window they go; the audit log keeps them.
CREATE TABLE keyproxy.window_credits (
    id          text PRIMARY KEY CHECK (id ~ '^crd_[0-9a-f]{32}$'),
    window_id   bigint NOT NULL REFERENCES keyproxy.windows (id) ON DELETE CASCADE,
    amount      bigint NOT NULL CHECK (amount <> 0),
    reason      text NOT NULL CHECK (length(reason) BETWEEN 1 AND 500),
    actor       text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX window_credits_window_id ON keyproxy.window_credits (window_id);

ALTER TABLE keyproxy.changes DROP CONSTRAINT changes_kind_check;
ALTER TABLE keyproxy.changes ADD CONSTRAINT changes_kind_check
    CHECK (kind IN ('key', 'user', 'tenant', 'plan', 'all', 'key_limits', 'user_limits', 'tenant_limits', 'window')) NOT VALID;

-- The tenant of a pool of limits; null if it is not known any more. A key's pool has the name of the first key in its line.
CREATE FUNCTION keyproxy.tenant_of_pool(kind text, owner text) RETURNS text LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE kind
        WHEN 'tenant' THEN owner
        WHEN 'user' THEN keyproxy.tenant_of_user(owner)
        WHEN 'key' THEN coalesce(
            (SELECT u.tenant_id FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id WHERE k.id = owner),
            (SELECT a.tenant_id FROM keyproxy.audit_log AS a
             WHERE a.entity = 'key' AND a.entity_id = owner ORDER BY a.id DESC LIMIT 1)
        )
    END
$$;

-- Add an amount, which may be negative, to the limit of the current window of a pool, and the change to the log and the feed.
-- bound: the plan's limit, which is not stored here; limit and credit together never get below zero.
CREATE FUNCTION keyproxy.credit_window(
    kind text, owner text, is_test boolean, measure text, selector text, bound bigint, amount bigint, reason text,
    OUT id text, OUT starts bigint, OUT ends_seconds float8, OUT credited bigint, OUT spent bigint, OUT held bigint
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_variable
DECLARE
    instant float8 := extract(epoch FROM clock_timestamp());
    target bigint;
    before bigint;
BEGIN
    starts := keyproxy.window_start(measure, instant);
    IF starts = 0 THEN
        RAISE EXCEPTION '% has no window to credit', measure
            USING ERRCODE = 'check_violation', CONSTRAINT = 'window_credits_calendar';
    END IF;
    -- Again if the window is deleted as unused between being made and being locked.
    LOOP
        INSERT INTO keyproxy.windows AS w (pool_kind, pool_id, is_test, measure, starts, selector)
        VALUES (kind, owner, is_test, measure, starts, selector) ON CONFLICT DO NOTHING;
        SELECT w.id, w.credited INTO target, before FROM keyproxy.windows AS w
        WHERE w.pool_kind = kind AND w.pool_id = owner AND w.is_test = credit_window.is_test
          AND w.measure = credit_window.measure AND w.starts = credit_window.starts AND w.selector = credit_window.selector
        FOR NO KEY UPDATE;
        EXIT WHEN FOUND;
    END LOOP;
    IF bound + before + amount NOT BETWEEN 0 AND 1000000000000000 THEN
        RAISE EXCEPTION 'the limit is % and % were credited: % would make it %', bound, before, amount, bound + before + amount
            USING ERRCODE = 'check_violation', CONSTRAINT = 'window_credits_bound';
    END IF;
    UPDATE keyproxy.windows AS w SET credited = before + amount WHERE w.id = target
    RETURNING w.credited, w.spent, w.held INTO credited, spent, held;
    id := 'crd_' || replace(gen_random_uuid()::text, '-', '');
    INSERT INTO keyproxy.window_credits (id, window_id, amount, reason, actor)
    VALUES (id, target, amount, reason, keyproxy.actor());
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, before, after)
    VALUES (
        keyproxy.actor(), keyproxy.origin(), 'window.credit', 'window', kind || ' ' || owner, keyproxy.tenant_of_pool(kind, owner),
        jsonb_build_object('credited', before),
        jsonb_build_object(
            'id', id, 'credited', credited, 'amount', amount, 'limit', bound, 'reason', reason, 'measure', measure,
            'selector', selector, 'is_test', is_test, 'starts', starts
        )
    );
    PERFORM keyproxy.note_change('window', jsonb_build_array(kind, owner, is_test, measure, selector)::text);
    ends_seconds := keyproxy.window_end(measure, starts) - instant;
END
$$;
REVOKE EXECUTE ON FUNCTION keyproxy.credit_window(text, text, boolean, text, text, bigint, bigint, text) FROM PUBLIC;

-- As 0011_bounds.sql had it, but that windows of a minute or an hour go after a day. One that has an alert to deliver stays
-- as long as any other.
CREATE OR REPLACE FUNCTION keyproxy.tend_usage(event_days int, usage_days int, portion int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms' SET jit = off
SET enable_seqscan = off AS $$
DECLARE
    today date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
    -- A whole number: the index on `starts` serves no comparison with another type, or with a volatile function.
    now_seconds bigint := extract(epoch FROM clock_timestamp());
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
        WHERE w.starts > 0 AND w.starts < now_seconds - 62 * 86400 AND w.held = 0
          AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.window_id = w.id)
        LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    is_more := is_more OR gone >= portion;
    DELETE FROM keyproxy.windows WHERE id = ANY (ARRAY(
        SELECT w.id FROM keyproxy.windows AS w
        WHERE w.measure IN ('requests_per_minute', 'requests_per_hour', 'tokens_per_minute', 'tokens_per_hour',
                            'spend_per_minute', 'spend_per_hour')
          AND w.starts < now_seconds - 86400 AND w.held = 0
          AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.window_id = w.id)
          AND NOT EXISTS (
              SELECT FROM keyproxy.limit_alerts AS a
              WHERE a.window_id = w.id AND a.delivered_at IS NULL AND a.given_up_at IS NULL
          )
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
