-- Usage by model, with its cost; and a bound on how often a charged Idempotency-Key is free.
--
-- The previous release keeps writing: its calls go to the functions below, without a model and without a bound.

ALTER TABLE keyproxy.usage
    ADD COLUMN model text NOT NULL DEFAULT '',
    ADD COLUMN tokens_cached bigint NOT NULL DEFAULT 0,
    ADD COLUMN tokens_cache_write bigint NOT NULL DEFAULT 0,
    ADD COLUMN tokens_reasoning bigint NOT NULL DEFAULT 0,
    ADD COLUMN cost_micros bigint NOT NULL DEFAULT 0,
    DROP CONSTRAINT usage_pkey,
    ADD PRIMARY KEY (day, tenant_id, user_id, key_id, is_test, route, model);
COMMENT ON COLUMN keyproxy.usage.model IS 'the name of a configured model, or as sent, or other; empty: none was read';
COMMENT ON COLUMN keyproxy.usage.tokens_cached IS 'the part of tokens_in that was read from a cache';
COMMENT ON COLUMN keyproxy.usage.tokens_cache_write IS 'the part of tokens_in that was written to a cache';
COMMENT ON COLUMN keyproxy.usage.tokens_reasoning IS 'the part of tokens_out that is reasoning';

-- What belongs to models and money stands behind the policy, in events of requests that have any of it. There the previous
-- release skips it.
CREATE OR REPLACE VIEW keyproxy.usage_events AS
SELECT b.process || ':' || b.batch || ':' || e.place AS id,
       b.day AS recorded_on,
       to_timestamp((e.event ->> 0)::float8 / 1000) AS time,
       e.event ->> 1 AS request_id,
       e.event -> 2 ->> 0 AS tenant_id,
       e.event -> 2 ->> 1 AS user_id,
       e.event -> 2 ->> 2 AS key_id,
       e.event -> 2 ->> 3 AS mode,
       e.event -> 2 ->> 4 AS route,
       e.event -> 2 ->> 5 AS method,
       (e.event -> 2 ->> 6)::int AS status,
       e.event -> 2 ->> 7 AS code,
       (e.event ->> 6)::bigint AS tokens_in,
       (e.event ->> 7)::bigint AS tokens_out,
       (e.event ->> 8)::boolean AS estimated,
       (e.event ->> 3)::bigint AS request_bytes,
       (e.event ->> 4)::bigint AS response_bytes,
       (e.event ->> 5)::float8 / 1000000 AS duration_seconds,
       e.event -> 2 ->> 8 AS policy,
       e.event -> 2 ->> 9 AS model,
       (e.event -> 2 ->> 10)::bigint AS tokens_cached,
       (e.event -> 2 ->> 11)::bigint AS tokens_cache_write,
       (e.event -> 2 ->> 12)::bigint AS tokens_reasoning,
       (e.event -> 2 ->> 13)::bigint AS cost_micros
FROM keyproxy.usage_event_batches AS b
CROSS JOIN LATERAL json_array_elements(b.events) WITH ORDINALITY AS e (event, place);

-- One batch of a process, as 0007_usage.sql had it: counted once, however often it is sent. Whether it was counted now.
CREATE FUNCTION keyproxy.record_usage(
    writer text, number bigint, days date[], tenants text[], users text[], keys text[], tests boolean[], routes text[],
    models text[], requests bigint[], refusals bigint[], tokens_in bigint[], tokens_out bigint[], tokens_estimated bigint[],
    tokens_cached bigint[], tokens_cache_write bigint[], tokens_reasoning bigint[], cost_micros bigint[], events json
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    today date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
BEGIN
    INSERT INTO keyproxy.usage_writers AS w (process, batch, written_at)
    VALUES (writer, number, clock_timestamp())
    ON CONFLICT (process) DO UPDATE SET batch = excluded.batch, written_at = excluded.written_at
        WHERE w.batch < excluded.batch;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO keyproxy.usage AS u (
        day, tenant_id, user_id, key_id, is_test, route, model, requests, refusals, tokens_in, tokens_out, tokens_estimated,
        tokens_cached, tokens_cache_write, tokens_reasoning, cost_micros
    )
    SELECT l.day, l.tenant_id, l.user_id, l.key_id, l.is_test, l.route, l.model, sum(l.requests), sum(l.refusals),
           sum(l.tokens_in), sum(l.tokens_out), sum(l.tokens_estimated), sum(l.tokens_cached), sum(l.tokens_cache_write),
           sum(l.tokens_reasoning), sum(l.cost_micros)
    FROM unnest(days, tenants, users, keys, tests, routes, models, requests, refusals, tokens_in, tokens_out,
                tokens_estimated, tokens_cached, tokens_cache_write, tokens_reasoning, cost_micros)
        AS l (day, tenant_id, user_id, key_id, is_test, route, model, requests, refusals, tokens_in, tokens_out,
              tokens_estimated, tokens_cached, tokens_cache_write, tokens_reasoning, cost_micros)
    GROUP BY 1, 2, 3, 4, 5, 6, 7
    ORDER BY 1, 2, 3, 4, 5, 6, 7
    ON CONFLICT (day, tenant_id, user_id, key_id, is_test, route, model) DO UPDATE
    SET requests = u.requests + excluded.requests,
        refusals = u.refusals + excluded.refusals,
        tokens_in = u.tokens_in + excluded.tokens_in,
        tokens_out = u.tokens_out + excluded.tokens_out,
        tokens_estimated = u.tokens_estimated + excluded.tokens_estimated,
        tokens_cached = u.tokens_cached + excluded.tokens_cached,
        tokens_cache_write = u.tokens_cache_write + excluded.tokens_cache_write,
        tokens_reasoning = u.tokens_reasoning + excluded.tokens_reasoning,
        cost_micros = u.cost_micros + excluded.cost_micros;
    IF events IS NOT NULL THEN
        IF to_regclass('keyproxy.usage_event_batches_' || to_char(today, 'YYYYMMDD')) IS NULL THEN
            PERFORM keyproxy.make_event_days();
        END IF;
        INSERT INTO keyproxy.usage_event_batches (day, process, batch, events) VALUES (today, writer, number, events);
    END IF;
    RETURN true;
END
$$;

-- As the previous release calls it.
CREATE OR REPLACE FUNCTION keyproxy.record_usage(
    writer text, number bigint, days date[], tenants text[], users text[], keys text[], tests boolean[], routes text[],
    requests bigint[], refusals bigint[], tokens_in bigint[], tokens_out bigint[], tokens_estimated bigint[], events json
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    nothing bigint[] := array_fill(0::bigint, ARRAY[cardinality(days)]);
BEGIN
    RETURN keyproxy.record_usage(
        writer, number, days, tenants, users, keys, tests, routes, array_fill(''::text, ARRAY[cardinality(days)]),
        requests, refusals, tokens_in, tokens_out, tokens_estimated, nothing, nothing, nothing, nothing, events
    );
END
$$;

-- How many repeats the charge has covered.
ALTER TABLE keyproxy.idempotent_charges ADD COLUMN repeats int NOT NULL DEFAULT 0;

-- One batch of claims, as 0009_claims.sql had it, but that a charge covers only `repeats_max` repeats in its 24 hours. A
-- repeat beyond them is charged like a first attempt, and leaves the charge as it is.
-- A claim with `paid` was counted by cover_repeats, before it was admitted.
CREATE FUNCTION keyproxy.claim_charges(
    teller text, number bigint, fingerprints bytea[], used bigint[], paid bigint[], repeats_max int,
    OUT is_first boolean[], OUT charged bigint[]
) RETURNS SETOF record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    instant timestamptz := clock_timestamp();
    oldest timestamptz := instant - interval '24 hours';
    known bytea[];
    tokens bigint[];
    repeats int[];
BEGIN
    INSERT INTO keyproxy.claim_batches AS b (process, batch, told_at) VALUES (teller, number, instant)
    ON CONFLICT (process) DO UPDATE SET batch = excluded.batch, told_at = excluded.told_at
        WHERE b.batch < excluded.batch;
    IF NOT FOUND THEN
        RETURN QUERY SELECT b.is_first, b.charged FROM keyproxy.claim_batches AS b
                     WHERE b.process = teller AND b.batch = number;
        RETURN;
    END IF;
    -- Rows in the order of their key, so that two processes do not wait for each other. New ones get what they end up with;
    -- the others are locked, and say what they were: -1 for a charge that is too old.
    WITH claim AS (
        SELECT c.fingerprint, c.used, c.paid,
               row_number() OVER (PARTITION BY c.fingerprint, c.paid IS NULL ORDER BY c.place) AS nth
        FROM unnest(fingerprints, used, paid) WITH ORDINALITY AS c (fingerprint, used, paid, place)
    ), noted AS (
        INSERT INTO keyproxy.idempotent_charges AS k (fingerprint, tokens, tokens_were, charged_at, repeats)
        SELECT c.fingerprint, max(c.used) FILTER (WHERE c.paid IS NOT NULL OR c.nth <= repeats_max::bigint + 1), -1,
               CASE WHEN bool_and(c.paid IS NOT NULL) THEN '-infinity' ELSE instant END,
               least(repeats_max, greatest(0, count(*) FILTER (WHERE c.paid IS NULL) - 1))
        FROM claim AS c GROUP BY c.fingerprint ORDER BY c.fingerprint
        ON CONFLICT (fingerprint) DO UPDATE
        SET tokens_were = CASE WHEN k.charged_at > oldest THEN k.tokens ELSE -2 END
        RETURNING k.fingerprint, k.tokens_were, k.repeats
    )
    SELECT array_agg(n.fingerprint), array_agg(n.tokens_were), array_agg(n.repeats) INTO known, tokens, repeats
    FROM noted AS n;

    RETURN QUERY
    WITH charge AS (
        -- tokens: what was charged by earlier batches; -1: new, -2: too old.
        SELECT n.fingerprint, n.tokens, CASE WHEN n.tokens < 0 THEN 0 ELSE n.repeats END AS repeats
        FROM unnest(known, tokens, repeats) AS n (fingerprint, tokens, repeats)
    ), ranked AS (
        SELECT c.*, n.tokens AS tokens_were, n.repeats AS were_repeats,
               row_number() OVER (PARTITION BY c.fingerprint, c.paid IS NULL ORDER BY c.place)
                   - CASE WHEN n.tokens < 0 THEN 1 ELSE 0 END + n.repeats AS repeat
        FROM unnest(fingerprints, used, paid) WITH ORDINALITY AS c (fingerprint, used, paid, place)
        JOIN charge AS n ON n.fingerprint = c.fingerprint
    ), covered AS (
        SELECT r.*,
               r.paid IS NULL AND r.repeat > repeats_max AS is_beyond,
               r.paid IS NULL AND r.repeat = 0 AS starts
        FROM ranked AS r
    ), judged AS (
        SELECT c.*,
               max(CASE WHEN NOT c.is_beyond THEN c.used END) OVER (
                   PARTITION BY c.fingerprint ORDER BY c.place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
               ) AS used_before
        FROM covered AS c
    ), changed AS (
        UPDATE keyproxy.idempotent_charges AS k
        SET tokens = CASE WHEN s.tokens_were >= 0 THEN greatest(k.tokens, s.most) ELSE coalesce(s.most, k.tokens) END,
            tokens_were = greatest(s.tokens_were, -1),
            repeats = CASE WHEN s.tokens_were >= 0 OR s.starts THEN least(repeats_max, s.repeats) ELSE k.repeats END,
            charged_at = CASE WHEN s.starts THEN instant WHEN s.tokens_were >= 0 THEN k.charged_at ELSE '-infinity' END
        FROM (
            SELECT j.fingerprint, min(j.tokens_were) AS tokens_were, bool_or(j.starts) AS starts,
                   max(j.used) FILTER (WHERE NOT j.is_beyond) AS most,
                   greatest(min(j.were_repeats), max(j.repeat) FILTER (WHERE j.paid IS NULL)) AS repeats
            FROM judged AS j WHERE j.tokens_were <> -1 GROUP BY j.fingerprint
        ) AS s
        WHERE k.fingerprint = s.fingerprint AND k.fingerprint = ANY (known)
    ), answer AS (
        SELECT array_agg(j.starts OR j.is_beyond ORDER BY j.place) AS is_first,
               array_agg(
                   CASE WHEN j.starts OR j.is_beyond THEN j.used
                        ELSE greatest(0, j.used - greatest(j.tokens_were, j.used_before, j.paid)) END
                   ORDER BY j.place
               ) AS charged
        FROM judged AS j
    )
    UPDATE keyproxy.claim_batches AS b SET is_first = a.is_first, charged = a.charged
    FROM answer AS a WHERE b.process = teller
    RETURNING b.is_first, b.charged;
END
$$;

-- As the previous release calls it: without a bound.
CREATE OR REPLACE FUNCTION keyproxy.claim_charges(
    teller text, number bigint, fingerprints bytea[], used bigint[], paid bigint[],
    OUT is_first boolean[], OUT charged bigint[]
) RETURNS SETOF record
LANGUAGE sql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
    SELECT c.is_first, c.charged
    FROM keyproxy.claim_charges(teller, number, fingerprints, used, paid, 2147483647) AS c
$$;

-- Which of these requests, one fingerprint for each, are repeats that a charge of the last 24 hours covers: a row for each
-- fingerprint with a charge that covers any, its tokens, and how many of them it covers. Those are counted here and now, so
-- that no two replicas admit the same one. Rows in the order of their key, as claim_charges locks them.
CREATE FUNCTION keyproxy.cover_repeats(fingerprints bytea[], repeats_max int)
RETURNS TABLE (fingerprint bytea, tokens bigint, covered int)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM keyproxy.idempotent_charges AS k
    WHERE k.fingerprint = ANY (fingerprints) AND k.charged_at > clock_timestamp() - interval '24 hours'
      AND k.repeats < repeats_max
    ORDER BY k.fingerprint FOR NO KEY UPDATE;
    RETURN QUERY
    WITH wanted AS (
        SELECT f AS fingerprint, count(*)::int AS wanted FROM unnest(fingerprints) AS f GROUP BY f
    ), free AS (
        SELECT k.fingerprint, least(w.wanted, repeats_max - k.repeats) AS covered
        FROM wanted AS w CROSS JOIN LATERAL (
            SELECT * FROM keyproxy.idempotent_charges AS k WHERE k.fingerprint = w.fingerprint LIMIT 1
        ) AS k
        WHERE k.charged_at > clock_timestamp() - interval '24 hours' AND k.repeats < repeats_max
    )
    UPDATE keyproxy.idempotent_charges AS k SET repeats = k.repeats + f.covered
    FROM free AS f WHERE k.fingerprint = f.fingerprint AND k.fingerprint = ANY (fingerprints)
    RETURNING k.fingerprint, k.tokens, f.covered;
END
$$;

-- Delete at most `portion` expired charges; how many. A concurrent claim that waits for one inserts it again.
CREATE FUNCTION keyproxy.forget_charges(portion int) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    -- A variable: the index does not serve a comparison with clock_timestamp(), which is volatile.
    oldest timestamptz := clock_timestamp() - interval '24 hours';
    gone bigint;
BEGIN
    DELETE FROM keyproxy.idempotent_charges WHERE ctid = ANY (ARRAY(
        SELECT k.ctid FROM keyproxy.idempotent_charges AS k
        WHERE k.charged_at <= oldest
        LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END
$$;
