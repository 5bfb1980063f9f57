-- Budgets of agent tokens, windows that never end; and the pools of agents and agent tokens.
--
-- These are the current texts of sync_leases, forget_windows and tenant_of_pool. docs/ledger.md lists where those of other functions are.
--
-- The previous release has no such windows, and never reads one.

-- A message that waits for this continues with the earlier sync_leases, which is the same for its windows.
LOCK TABLE keyproxy.windows IN ACCESS EXCLUSIVE MODE;

-- Not validated, because the constraints that these replace are narrower: that would lock the table while all of it is read.
ALTER TABLE keyproxy.windows
    DROP CONSTRAINT windows_pool_kind_check,
    ADD CONSTRAINT windows_pool_kind_known CHECK (pool_kind IN ('tenant', 'user', 'key', 'agent', 'token')) NOT VALID,
    DROP CONSTRAINT windows_measure_known,
    ADD CONSTRAINT windows_measure_known CHECK (measure IN (
        'rate', 'token_rate', 'concurrency',
        'requests_per_minute', 'requests_per_hour', 'requests_per_day', 'requests_per_week', 'requests_per_month',
        'tokens_per_minute', 'tokens_per_hour', 'tokens_per_day', 'tokens_per_week', 'tokens_per_month',
        'spend_per_minute', 'spend_per_hour', 'spend_per_day', 'spend_per_week', 'spend_per_month',
        'requests_total', 'tokens_total'
    )) NOT VALID;

-- The tenant of a pool of limits; null if it is not known any more. The pool of a key has the id of the first key in its line,
-- that of an agent is user/agent. No id of an agent contains a slash.
CREATE OR REPLACE FUNCTION keyproxy.tenant_of_pool(kind text, owner text) RETURNS text LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE kind
        WHEN 'tenant' THEN owner
        WHEN 'user' THEN keyproxy.tenant_of_user(owner)
        WHEN 'key' THEN coalesce(
            (SELECT u.tenant_id FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id WHERE k.id = owner),
            (SELECT a.tenant_id FROM keyproxy.audit_log AS a
             WHERE a.entity = 'key' AND a.entity_id = owner ORDER BY a.id DESC LIMIT 1)
        )
        WHEN 'agent' THEN keyproxy.tenant_of_user(regexp_replace(owner, '/[^/]*$', ''))
        WHEN 'token' THEN (
            SELECT u.tenant_id FROM keyproxy.agent_tokens AS t JOIN keyproxy.users AS u ON u.id = t.user_id WHERE t.id = owner
        )
    END
$$;

-- Delete unused windows among the next `portion` that do not end: rates, slots, and budgets whose token was deleted while they
-- were in use, or with its owner. Others go with their tokens: see tend_agent_tokens.
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
          AND (o.measure IN ('rate', 'token_rate') OR o.measure = 'concurrency' AND o.spent = 0
               OR o.pool_kind = 'token' AND NOT keyproxy.has_agent_token(o.pool_id))
          AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.window_id = o.id)
        ORDER BY o.id FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    next := CASE WHEN cardinality(seen) = portion THEN seen[portion] END;
END
$$;

-- One message of a holder. One row per line and one in front, of lease 0, whose granted is the number of living holders, and
-- whose wait_seconds is for how long nothing will be granted; no row at all: this holder has ended.
-- percentages: of limit and credit together, at which a window gets an alert, in ascending order. 100 also applies once a
-- request needs more than what is not spent.
-- A line about a rate returns `returned` units, once: a lost message only admits less.
-- A window with more than 60 holders, expected ones included, has a schedule of 120 messages per second: see
-- limits/ledger/message_schedule.py.
-- A window of a budget never ends, and is one of those that alerts are about.
CREATE OR REPLACE FUNCTION keyproxy.sync_leases(
    sender text, message bigint, lease_seconds float8, lines keyproxy.lease_report[], percentages int[],
    OUT lease bigint, OUT starts bigint, OUT granted bigint, OUT spent bigint, OUT held bigint,
    OUT ends_seconds float8, OUT wait_seconds float8, OUT is_wanted boolean, OUT credited bigint, OUT holders bigint,
    OUT granted_at float8
) RETURNS SETOF record LANGUAGE plpgsql
-- Planning this for every message costs more than running it, and a plan that was made for empty tables has to suit full
-- ones: every row is found by its index. As the plan is pinned, its costs mean nothing: jit, which follows them, is off.
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
        -- A lease whose first reply was lost stays in the window in which it began, which its holder does not know.
        SELECT ROW(l.lease, l.pool_kind, l.pool_id, l.is_test, l.measure, l.selector, coalesce(
                       (SELECT (SELECT w.starts FROM keyproxy.windows AS w WHERE w.id = x.window_id)
                        FROM keyproxy.leases AS x WHERE x.holder = sender AND x.lease = l.lease),
                       keyproxy.window_start(l.measure, instant)
                   ), l.bound, l.interval_seconds, l.granted, l.used, l.returned, l.want, l.at_least, l.most, l.is_closing,
                   l.granted_at
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
            -- A new window expects the holders of the one before it, for three intervals of their reports.
            INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts, selector, carried, carried_until)
            SELECT DISTINCT l.pool_kind, l.pool_id, l.is_test, l.measure, l.starts, l.selector, coalesce(b.holders, 0),
                   instant + greatest(5, 3 * coalesce(b.holders, 0) / 120.0::float8)
            FROM unnest(lines) AS l
            LEFT JOIN LATERAL (
                SELECT v.holders FROM keyproxy.windows AS v
                WHERE l.starts > 0 AND v.pool_kind = l.pool_kind AND v.pool_id = l.pool_id AND v.is_test = l.is_test
                  AND v.measure = l.measure AND v.starts = keyproxy.window_start(l.measure, l.starts - 1)
                  AND v.selector = l.selector LIMIT 1
            ) AS b ON true
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
               w.theoretical, w.wanted_at, w.wanted_by, w.credited AS window_credited, w.holders AS were_holders, w.alerted,
               w.recalled_at, w.expected, greatest(1, w.holders, w.expected) AS crowd,
               greatest(w.holders, w.expected) > 60 AND l.interval_seconds = 0 AS are_many,
               keyproxy.window_end(l.measure, w.starts) AS ends,
               x.holder IS NOT NULL AS is_known, x.tid,
               coalesce(x.granted, 0) AS was_granted, coalesce(x.used, 0) AS was_used, coalesce(x.returned, 0) AS was_returned,
               l.interval_seconds > 0 AS is_rate
        FROM unnest(lines) AS l
        JOIN LATERAL (
            SELECT *, CASE WHEN instant < w.carried_until THEN w.carried ELSE 0 END AS expected
            FROM keyproxy.windows AS w
            WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
              AND w.starts = l.starts AND w.selector = l.selector LIMIT 1
        ) AS w ON true
        LEFT JOIN LATERAL (
            SELECT x.*, x.ctid AS tid FROM keyproxy.leases AS x WHERE x.holder = sender AND x.lease = l.lease LIMIT 1
        ) AS x ON true
    ), settled AS (
        -- A report restores what is in lost history; a lease that is closed already stays closed.
        SELECT line.*,
               NOT is_rate AND (is_known OR NOT is_closing) AS counts,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_granted, line.granted) END AS now_granted,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_used, line.used) END AS now_used,
               CASE WHEN is_rate THEN 0 ELSE greatest(was_returned, line.returned) END AS now_returned,
               -- At most the burst: the clock may have been set back, or the burst lowered. What is returned has been
               -- refilled in part since it was granted; use beyond the grant counts in full.
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
                   -- Closing also returns what was granted in a reply that was lost.
                   WHEN is_closing THEN now_used + now_returned
                   -- Use beyond the grant counts as granted.
                   ELSE greatest(now_granted, now_used + now_returned)
               END AS sure_granted
        FROM settled
    ), resulting AS (
        SELECT summed.*,
               CASE WHEN counts THEN sure_granted - now_used - now_returned ELSE 0 END AS outstanding,
               CASE WHEN counts THEN sure_granted - now_used - now_returned - (was_granted - was_used - was_returned) ELSE 0
               END AS more_held,
               row_number() OVER (PARTITION BY window_id ORDER BY want > 0 DESC, lease DESC) = 1 AS is_asker
        FROM summed
    ), asked AS (
        SELECT resulting.*,
               CASE
                   WHEN is_rate THEN floor((bound * interval_seconds - ahead) / interval_seconds + 1e-6)::bigint
                   WHEN settles OR instant >= ends THEN 0
                   ELSE bound + window_credited - was_spent - was_held
                        - (sum(more_used + more_held) OVER (PARTITION BY window_id))::bigint
               END AS available,
               was_held + (sum(more_held) OVER (PARTITION BY window_id))::bigint AS now_held
        FROM resulting
    ), judged AS (
        SELECT asked.*,
               CASE
                   WHEN want = 0 OR available < at_least OR NOT is_asker THEN 0
                   -- Beyond what its requests wait for, a holder leaves units for the others: the fewer are available, the
                   -- fewer it gets.
                   ELSE least(available, greatest(
                       CASE WHEN alive <= 1 THEN want ELSE least(want, greatest(at_least, most, available / (2 * alive))) END,
                       CASE
                           WHEN NOT are_many THEN 0
                           -- Others are short: half of what they hold on average, which is used up soon.
                           WHEN instant - wanted_at < 2 THEN least(want / 2, now_held / (2 * crowd))
                           -- What a new holder wants lasts for two seconds; it needs enough for two intervals of reports.
                           WHEN most > 0 AND NOT is_known
                           THEN greatest(want / 2, least(floor(want * crowd / 120.0::float8)::bigint, available / (4 * alive)))
                           -- Enough until its next report: smaller slices would only make more messages.
                           ELSE want / 2
                       END
                   ))
               END AS given
        FROM asked
    ), totalled AS (
        -- Each line with the totals over all lines of its window. Joining the lines to the windows' new rows instead would
        -- take time with the square of their number.
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
    ), scheduled AS (
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
        -- One line stands for its window: is_asker.
        SELECT t.*,
               CASE WHEN t.changes = 0 THEN 0 ELSE keyproxy.more_holders(
                   t.window_id, sender, t.changes & 65535, t.changes >> 16
               ) END AS more_holders,
               CASE
                   WHEN t.is_asker AND NOT t.is_rate AND t.measure <> 'concurrency'
                        AND ((t.was_spent + t.window_used) * 100 >= lowest * (t.bound + t.window_credited) OR t.is_short)
                        AND NOT t.alerted @> percentages
                   THEN keyproxy.alerts_due(
                       percentages, t.alerted, t.bound + t.window_credited, t.was_spent + t.window_used,
                       -- A request for more tokens or money than the whole window never fits: no alert. A limit of 0
                       -- requests is spent from the start.
                       t.is_short
                       AND t.at_least <= greatest(t.bound + t.window_credited, starts_with(t.measure, 'requests_')::int)
                       AND t.at_least > t.bound + t.window_credited - t.was_spent - t.window_used
                   )
                   ELSE '{}'
               END AS reached,
               CASE
                   -- Not more often than the holders learn of it, and not for more than can be returned.
                   WHEN t.is_asker AND t.is_short AND t.was_held + t.window_held > t.window_own
                        AND t.at_least <= t.bound + t.window_credited - t.was_spent - t.window_used
                        AND instant - t.recalled_at >= 0.5
                   THEN keyproxy.recall_units(
                       t.window_id, sender,
                       CASE WHEN instant - t.wanted_at < 2 THEN t.was_held + t.window_held
                            ELSE t.at_least - greatest(0, t.available) END,
                       -- If messages are that far ahead of their schedule, many compete for units.
                       CASE WHEN t.are_many AND t.paced - instant >= 0.25 THEN 12 ELSE 100 END
                   )
               END AS recalled
        FROM scheduled AS t
    ), kept AS (
        INSERT INTO keyproxy.leases AS x (holder, lease, window_id, granted, used, returned)
        SELECT sender, j.lease, j.window_id, j.sure_granted + j.given, j.now_used, j.now_returned
        FROM counted AS j WHERE j.counts AND NOT j.is_closing
        ON CONFLICT (holder, lease) DO UPDATE
        SET granted = excluded.granted, used = excluded.used, returned = excluded.returned, is_recalled = false
    ), closed AS (
        DELETE FROM keyproxy.leases AS x
        -- Not holder and = ANY (leases): PostgreSQL may use the index for the holder alone, and go through all of its leases.
        WHERE x.ctid = ANY (ARRAY(SELECT j.tid FROM counted AS j WHERE j.is_closing AND j.is_known))
    ), written AS (
        UPDATE keyproxy.windows AS w
        SET spent = w.spent + j.window_used,
            held = w.held + j.window_held,
            theoretical = CASE WHEN j.is_rate THEN j.window_theoretical WHEN j.are_many THEN j.paced ELSE w.theoretical END,
            recalled_at = CASE WHEN j.recalled IS NULL THEN w.recalled_at ELSE instant END,
            wanted_at = CASE WHEN j.is_short AND w.held + j.window_held > j.window_own THEN instant ELSE w.wanted_at END,
            wanted_by = CASE WHEN j.is_short AND w.held + j.window_held > j.window_own THEN sender ELSE w.wanted_by END,
            holders = w.holders + j.more_holders,
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
                THEN greatest(0, j.ahead + j.at_least * j.interval_seconds - j.bound * j.interval_seconds)
                WHEN j.are_many AND j.want > 0 AND j.given = 0 AND NOT settles AND instant < j.ends
                THEN greatest(0.7, least(j.paced - instant, 20))
                -- Many others are short too: this one waits for its turn if it becomes short.
                WHEN j.are_many AND instant - j.wanted_at < 2 AND j.paced - instant >= 0.25 AND NOT settles
                     AND instant < j.ends
                THEN least(j.paced - instant, 20)
                ELSE 0 END,
           instant - j.wanted_at < 2 AND j.wanted_by <> sender AND NOT j.are_many,
           j.window_credited,
           -- As many as fill the schedule, if it is ahead: holders pace their reports by this number.
           CASE WHEN j.is_rate THEN 1 ELSE greatest(
               1, j.expected, CASE WHEN j.are_many THEN floor((j.paced - instant) * 120) END,
               j.were_holders + j.more_holders + CASE
                   WHEN j.reached = '{}' THEN 0
                   ELSE keyproxy.note_alerts(
                       j.window_id, j.reached, j.bound + j.window_credited, j.was_spent + j.window_used
                   )
               END
           )::bigint END,
           CASE WHEN j.is_rate THEN instant ELSE 0 END
    FROM counted AS j;
END
$$;
