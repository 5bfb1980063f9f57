-- The ledger: windows, the processes that hold slices of them, and the slices. docs/ledger.md says how they are spoken to.

-- limits is checked where it is written, by whichever SQL client: a plan that cannot be read must not be let in.
CREATE FUNCTION keyproxy.are_limits(limits jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
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
$$;
ALTER TABLE keyproxy.plans ADD CONSTRAINT plans_limits_known CHECK (keyproxy.are_limits(limits)) NOT VALID;

-- One row per window that anything was ever taken from. limit is not here: it is the plan's, told with every message.
-- Concurrency and rates have one row that begins at 0. Only what no index holds is updated, and rows leave room: such
-- updates stay on their page (HOT).
CREATE TABLE keyproxy.windows (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    pool_kind   text NOT NULL CHECK (pool_kind IN ('tenant', 'user', 'key')),
    pool_id     text NOT NULL,
    is_test     boolean NOT NULL,
    measure     text NOT NULL CHECK (measure IN ('rate', 'concurrency', 'requests_per_day', 'requests_per_month',
                                                 'tokens_per_day', 'tokens_per_month')),
    starts      bigint NOT NULL,
    spent       bigint NOT NULL DEFAULT 0 CHECK (spent >= 0),
    held        bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    forfeited   bigint NOT NULL DEFAULT 0 CHECK (forfeited BETWEEN 0 AND spent),
    theoretical float8 NOT NULL DEFAULT 0,
    wanted_at   float8 NOT NULL DEFAULT 0,
    wanted_by   text NOT NULL DEFAULT '',
    UNIQUE (pool_kind, pool_id, is_test, measure, starts)
) WITH (fillfactor = 60);
COMMENT ON COLUMN keyproxy.windows.starts IS 'Unix time at which the day or month begins (UTC); 0: not a calendar window';
COMMENT ON COLUMN keyproxy.windows.forfeited IS 'the part of spent that was charged because its holder died with it';
COMMENT ON COLUMN keyproxy.windows.theoretical IS 'GCRA: the theoretical arrival time, Unix time';
CREATE INDEX windows_starts ON keyproxy.windows (starts) WHERE starts > 0;

-- A proxy process that holds leases, from its first message to its end. serial orders its messages; what was said before
-- is not heard after. Ended holders stay for a while, so that one that wakes up late is told so.
CREATE TABLE keyproxy.lease_holders (
    id          text PRIMARY KEY,
    serial      bigint NOT NULL,
    expires_at  timestamptz NOT NULL,
    ended_at    timestamptz
) WITH (fillfactor = 60);
CREATE INDEX lease_holders_alive ON keyproxy.lease_holders (id) WHERE ended_at IS NULL;

-- Cumulative since the lease began; held for it: granted - used - returned.
CREATE TABLE keyproxy.leases (
    holder      text NOT NULL REFERENCES keyproxy.lease_holders (id) ON DELETE CASCADE,
    lease       bigint NOT NULL,
    window_id   bigint NOT NULL REFERENCES keyproxy.windows (id),
    granted     bigint NOT NULL CHECK (granted >= 0),
    used        bigint NOT NULL CHECK (used >= 0),
    returned    bigint NOT NULL CHECK (returned >= 0),
    CHECK (used + returned <= granted),
    PRIMARY KEY (holder, lease)
) WITH (fillfactor = 60);
CREATE INDEX leases_window_id ON keyproxy.leases (window_id);

-- The name of this ledger, where another store accounts parts of it: two ledgers may share that store and stay apart.
CREATE TABLE keyproxy.ledger (
    id          text PRIMARY KEY DEFAULT gen_random_uuid()::text,
    is_only     boolean NOT NULL DEFAULT true UNIQUE CHECK (is_only)
);
INSERT INTO keyproxy.ledger DEFAULT VALUES;

-- Which history this database is of. A server that was promoted from a replica, or restored from a backup, may lack the
-- latest commits; it begins a new timeline. Then nothing is granted for as long as the longest lease lasts, a minute at
-- most: by that time every process has told again what it holds, or holds nothing any more.
CREATE TABLE keyproxy.ledger_history (
    is_only       boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    timeline      text NOT NULL DEFAULT '',
    lease_seconds float8 NOT NULL DEFAULT 0,
    settles_until timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO keyproxy.ledger_history DEFAULT VALUES;
COMMENT ON COLUMN keyproxy.ledger_history.timeline IS 'in which the last message was heard, as WAL files are named; empty: none yet';
COMMENT ON COLUMN keyproxy.ledger_history.lease_seconds IS 'the longest that any process has asked for';

-- Until when nothing is granted.
CREATE FUNCTION keyproxy.ledger_settles_until(longest float8) RETURNS timestamptz
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    here text := left(pg_walfile_name(pg_current_wal_lsn()), 8);
    until timestamptz;
BEGIN
    SELECT g.settles_until INTO until FROM keyproxy.ledger_history AS g WHERE g.timeline = here AND g.lease_seconds >= longest;
    IF FOUND THEN
        RETURN until;
    END IF;
    UPDATE keyproxy.ledger_history AS g
    SET timeline = here,
        lease_seconds = greatest(g.lease_seconds, longest),
        settles_until = CASE
            WHEN g.timeline IN ('', here) THEN g.settles_until
            ELSE clock_timestamp() + make_interval(secs => least(60, greatest(g.lease_seconds, longest)))
        END
    RETURNING g.settles_until INTO until;
    RETURN until;
END
$$;

-- The calendar window that an instant is in: when it starts and ends, Unix time. On timestamps without a zone, where the
-- epoch depends on no setting: so they are immutable in earnest, and inlined. Called, they would cost a millisecond.
CREATE FUNCTION keyproxy.window_start(measure text, at float8) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN measure LIKE '%\_per\_day' THEN
            extract(epoch FROM date_trunc('day', to_timestamp(at) AT TIME ZONE 'UTC'))::bigint
        WHEN measure LIKE '%\_per\_month' THEN
            extract(epoch FROM date_trunc('month', to_timestamp(at) AT TIME ZONE 'UTC'))::bigint
        ELSE 0
    END
$$;

CREATE FUNCTION keyproxy.window_end(measure text, starts bigint) RETURNS float8 LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN measure LIKE '%\_per\_day' THEN starts + 86400
        WHEN measure LIKE '%\_per\_month' THEN
            extract(epoch FROM (to_timestamp(starts) AT TIME ZONE 'UTC' + interval '1 month'))::float8
        ELSE 'Infinity'::float8
    END
$$;

CREATE TYPE keyproxy.lease_line AS (
    lease bigint, pool_kind text, pool_id text, is_test boolean, measure text, starts bigint, bound bigint,
    interval_seconds float8, granted bigint, used bigint, returned bigint, want bigint, at_least bigint,
    takes_all boolean, is_closing boolean
);

-- One message of a holder: what became of its leases, and what it asks for. Everything is counted or nothing is.
-- One row per line and one in front, of lease 0, whose granted is the number of living holders, and whose wait_seconds
-- says for how long nothing will be granted; no row at all: this holder has ended.
-- All lines are settled first, then what is free is granted: of lines that ask of one window to the latest lease alone.
-- A message that is older than one that was heard is an error. Windows are locked in the order of their ids, by everyone.
CREATE FUNCTION keyproxy.sync_leases(
    sender text, message bigint, lease_seconds float8, lines keyproxy.lease_line[],
    OUT lease bigint, OUT starts bigint, OUT granted bigint, OUT spent bigint, OUT held bigint,
    OUT ends_seconds float8, OUT wait_seconds float8, OUT is_wanted boolean
) RETURNS SETOF record LANGUAGE plpgsql
-- Planning this anew for every message costs more than running it; and a plan that was made when the tables were empty must
-- do when they are not: every row is looked up by its index.
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    here keyproxy.lease_holders;
    alive bigint;
    instant float8;
    settles_until timestamptz := keyproxy.ledger_settles_until(lease_seconds);
    settles boolean;
BEGIN
    INSERT INTO keyproxy.lease_holders AS h (id, serial, expires_at)
    VALUES (sender, message, clock_timestamp() + make_interval(secs => lease_seconds))
    ON CONFLICT (id) DO UPDATE SET serial = excluded.serial, expires_at = clock_timestamp() + make_interval(secs => lease_seconds)
        WHERE h.ended_at IS NULL AND h.serial < excluded.serial;
    IF NOT FOUND THEN
        SELECT * INTO here FROM keyproxy.lease_holders WHERE id = sender;
        IF here.ended_at IS NOT NULL THEN
            RETURN;
        END IF;
        RAISE EXCEPTION 'a later message of this holder was heard already' USING ERRCODE = 'object_not_in_prerequisite_state';
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
                       (SELECT w.starts FROM keyproxy.leases AS x JOIN keyproxy.windows AS w ON w.id = x.window_id
                        WHERE x.holder = sender AND x.lease = l.lease),
                       keyproxy.window_start(l.measure, instant)
                   ), l.bound, l.interval_seconds, l.granted, l.used, l.returned, l.want, l.at_least, l.takes_all, l.is_closing
               )::keyproxy.lease_line
        FROM unnest(lines) AS l WHERE l.starts = 0
        UNION ALL
        SELECT l FROM unnest(lines) AS l WHERE l.starts <> 0
    );

    INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts)
    SELECT DISTINCT l.pool_kind, l.pool_id, l.is_test, l.measure, l.starts
    FROM unnest(lines) AS l
    WHERE NOT EXISTS (
        SELECT FROM keyproxy.windows AS w
        WHERE w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
          AND w.starts = l.starts
    )
    ORDER BY 1, 2, 3, 4, 5
    ON CONFLICT DO NOTHING;

    PERFORM FROM keyproxy.windows AS w
    WHERE w.id = ANY (ARRAY(
        SELECT v.id FROM unnest(lines) AS l
        JOIN keyproxy.windows AS v
          ON v.pool_kind = l.pool_kind AND v.pool_id = l.pool_id AND v.is_test = l.is_test AND v.measure = l.measure
         AND v.starts = l.starts
    ))
    ORDER BY w.id
    FOR NO KEY UPDATE;
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
        JOIN keyproxy.windows AS w
          ON w.pool_kind = l.pool_kind AND w.pool_id = l.pool_id AND w.is_test = l.is_test AND w.measure = l.measure
         AND w.starts = l.starts
        LEFT JOIN keyproxy.leases AS x ON x.holder = sender AND x.lease = l.lease
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
        DELETE FROM keyproxy.leases AS x USING totalled AS j
        WHERE j.is_closing AND j.is_known AND x.holder = sender AND x.lease = j.lease
    ), written AS (
        UPDATE keyproxy.windows AS w
        SET spent = w.spent + j.window_used,
            held = w.held + j.window_held,
            theoretical = CASE WHEN j.is_rate THEN j.window_theoretical ELSE w.theoretical END,
            wanted_at = CASE WHEN j.is_short AND w.held + j.window_held > j.window_own THEN instant ELSE w.wanted_at END,
            wanted_by = CASE WHEN j.is_short AND w.held + j.window_held > j.window_own THEN sender ELSE w.wanted_by END
        FROM totalled AS j
        WHERE w.id = j.window_id
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

-- End holders: what they have not returned is charged, slots are free again. The number of holders that were ended.
-- Holders before windows, windows in the order of their ids: as sync_leases locks them.
CREATE FUNCTION keyproxy.end_holders(ending text[]) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ended bigint;
BEGIN
    UPDATE keyproxy.lease_holders SET ended_at = clock_timestamp() WHERE id = ANY(ending) AND ended_at IS NULL;
    GET DIAGNOSTICS ended = ROW_COUNT;
    PERFORM FROM keyproxy.windows AS w
    WHERE w.id IN (SELECT x.window_id FROM keyproxy.leases AS x WHERE x.holder = ANY(ending))
    ORDER BY w.id FOR NO KEY UPDATE;
    WITH gone AS (
        DELETE FROM keyproxy.leases AS x WHERE x.holder = ANY(ending)
        RETURNING x.window_id, x.granted - x.used - x.returned AS outstanding
    ), summed AS (
        SELECT g.window_id, sum(g.outstanding) AS outstanding FROM gone AS g GROUP BY g.window_id
    )
    UPDATE keyproxy.windows AS w
    SET held = w.held - s.outstanding,
        spent = w.spent + CASE WHEN w.measure = 'concurrency' THEN 0 ELSE s.outstanding END,
        forfeited = w.forfeited + CASE WHEN w.measure = 'concurrency' THEN 0 ELSE s.outstanding END
    FROM summed AS s WHERE w.id = s.window_id;
    RETURN ended;
END
$$;

-- End the holders whose time is over, and forget those that ended long ago.
CREATE FUNCTION keyproxy.reap_holders() RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    dead text[];
BEGIN
    IF keyproxy.ledger_settles_until(0) > clock_timestamp() THEN
        -- Who seems dead may have been heard in the history that was lost.
        RETURN 0;
    END IF;
    SELECT array_agg(id) INTO dead FROM (
        SELECT h.id FROM keyproxy.lease_holders AS h
        WHERE h.ended_at IS NULL AND h.expires_at <= clock_timestamp()
        ORDER BY h.id FOR UPDATE SKIP LOCKED
    ) AS found;
    -- Longer than the longest window: whatever a holder still says then is of a window that is over.
    DELETE FROM keyproxy.lease_holders WHERE ended_at < clock_timestamp() - interval '62 days';
    RETURN CASE WHEN dead IS NULL THEN 0 ELSE keyproxy.end_holders(dead) END;
END
$$;
