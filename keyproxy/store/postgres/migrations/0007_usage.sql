-- What was used, by whom: sums per day for bills and people, and an event per request for export. docs/usage.md says more.

CREATE TABLE keyproxy.usage (
    day              date NOT NULL,
    tenant_id        text NOT NULL,
    user_id          text NOT NULL,
    key_id           text NOT NULL,
    is_test          boolean NOT NULL,
    route            text NOT NULL,
    requests         bigint NOT NULL,
    refusals         bigint NOT NULL,
    tokens_in        bigint NOT NULL,
    tokens_out       bigint NOT NULL,
    tokens_estimated bigint NOT NULL,
    PRIMARY KEY (day, tenant_id, user_id, key_id, is_test, route)
) WITH (fillfactor = 70);
COMMENT ON COLUMN keyproxy.usage.day IS 'UTC; the day on which the request ended';
COMMENT ON COLUMN keyproxy.usage.requests IS 'requests that were sent upstream';
COMMENT ON COLUMN keyproxy.usage.refusals IS 'requests that were refused; nothing was charged for them';
COMMENT ON COLUMN keyproxy.usage.tokens_estimated IS
    'the part of tokens_in + tokens_out of which the upstream did not say what was used';
-- No foreign keys: usage outlives whom it is about. Only what no index holds is updated, so that updates stay on their page.
CREATE INDEX usage_tenant_id ON keyproxy.usage (tenant_id, day);
CREATE INDEX usage_user_id ON keyproxy.usage (user_id, day);
CREATE INDEX usage_key_id ON keyproxy.usage (key_id, day);

-- The last batch of each process that was written: a batch that is sent twice counts once.
CREATE TABLE keyproxy.usage_writers (
    process     text PRIMARY KEY,
    batch       bigint NOT NULL,
    written_at  timestamptz NOT NULL
) WITH (fillfactor = 60);

-- Events of one batch of one process, in one row: the same names again and again, which compression takes out.
-- day: when the batch was written, UTC. One partition per day, so that what is too old is dropped, not deleted.
CREATE SEQUENCE keyproxy.usage_event_serial;
CREATE TABLE keyproxy.usage_event_batches (
    serial  bigint NOT NULL DEFAULT nextval('keyproxy.usage_event_serial'),
    day     date NOT NULL,
    process text NOT NULL,
    batch   bigint NOT NULL,
    events  json NOT NULL,
    PRIMARY KEY (serial, day)
) PARTITION BY RANGE (day);
ALTER SEQUENCE keyproxy.usage_event_serial OWNED BY keyproxy.usage_event_batches.serial;
CREATE INDEX usage_event_batches_process ON keyproxy.usage_event_batches (process, batch);

CREATE VIEW keyproxy.usage_events AS
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
       (e.event ->> 5)::float8 / 1000000 AS duration_seconds
FROM keyproxy.usage_event_batches AS b
CROSS JOIN LATERAL json_array_elements(b.events) WITH ORDINALITY AS e (event, place);
COMMENT ON VIEW keyproxy.usage_events IS 'one row per request, as long as usage.event_days says; the id is stable';

-- Partitions for today and the two days after. Attached, not created in place: that would keep everybody out for a moment.
-- As its owner: whoever may write events may need the place for them.
CREATE FUNCTION keyproxy.make_event_days() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    today date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
    wanted date;
    name text;
BEGIN
    FOR ahead IN 0..2 LOOP
        wanted := today + ahead;
        name := 'usage_event_batches_' || to_char(wanted, 'YYYYMMDD');
        CONTINUE WHEN to_regclass('keyproxy.' || name) IS NOT NULL;
        PERFORM pg_advisory_xact_lock(hashtextextended('keyproxy.make_event_days', 0));
        CONTINUE WHEN to_regclass('keyproxy.' || name) IS NOT NULL;
        EXECUTE format('CREATE TABLE keyproxy.%I (LIKE keyproxy.usage_event_batches INCLUDING ALL)', name);
        EXECUTE format(
            'ALTER TABLE keyproxy.usage_event_batches ATTACH PARTITION keyproxy.%I FOR VALUES FROM (%L) TO (%L)',
            name, wanted, wanted + 1
        );
    END LOOP;
END
$$;

-- One batch of a process: counted once, however often it is sent. Whether it was counted now. Columns go together.
-- Rows in the order of their key, so that two processes do not wait for each other.
CREATE FUNCTION keyproxy.record_usage(
    writer text, number bigint, days date[], tenants text[], users text[], keys text[], tests boolean[], routes text[],
    requests bigint[], refusals bigint[], tokens_in bigint[], tokens_out bigint[], tokens_estimated bigint[], events json
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
    INSERT INTO keyproxy.usage AS u
    SELECT l.day, l.tenant_id, l.user_id, l.key_id, l.is_test, l.route, sum(l.requests), sum(l.refusals),
           sum(l.tokens_in), sum(l.tokens_out), sum(l.tokens_estimated)
    FROM unnest(days, tenants, users, keys, tests, routes, requests, refusals, tokens_in, tokens_out, tokens_estimated)
        AS l (day, tenant_id, user_id, key_id, is_test, route, requests, refusals, tokens_in, tokens_out, tokens_estimated)
    GROUP BY 1, 2, 3, 4, 5, 6
    ORDER BY 1, 2, 3, 4, 5, 6
    ON CONFLICT (day, tenant_id, user_id, key_id, is_test, route) DO UPDATE
    SET requests = u.requests + excluded.requests,
        refusals = u.refusals + excluded.refusals,
        tokens_in = u.tokens_in + excluded.tokens_in,
        tokens_out = u.tokens_out + excluded.tokens_out,
        tokens_estimated = u.tokens_estimated + excluded.tokens_estimated;
    IF events IS NOT NULL THEN
        IF to_regclass('keyproxy.usage_event_batches_' || to_char(today, 'YYYYMMDD')) IS NULL THEN
            PERFORM keyproxy.make_event_days();
        END IF;
        INSERT INTO keyproxy.usage_event_batches (day, process, batch, events) VALUES (today, writer, number, events);
    END IF;
    RETURN true;
END
$$;

-- Make place for what comes, and let go of what is older than asked for: events, sums, and windows that nobody can draw on.
-- A portion at a time; whether there is more. One at a time: who comes second finds nothing to do.
-- As its owner, who alone may drop what it owns; and so not for everybody.
CREATE FUNCTION keyproxy.tend_usage(event_days int, usage_days int, portion int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '250ms' AS $$
DECLARE
    today date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
    old_partition text;
    gone bigint;
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
        ORDER BY 1
    LOOP
        BEGIN
            EXECUTE format('DROP TABLE keyproxy.%I', old_partition);
        EXCEPTION WHEN lock_not_available THEN
            NULL;  -- Somebody reads it: it goes the next time. Waiting here would hold up those who write.
        END;
    END LOOP;
    DELETE FROM keyproxy.usage WHERE ctid = ANY (ARRAY(
        SELECT u.ctid FROM keyproxy.usage AS u WHERE u.day < today - usage_days LIMIT portion
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    is_more := gone >= portion;
    DELETE FROM keyproxy.windows WHERE id = ANY (ARRAY(
        SELECT w.id FROM keyproxy.windows AS w
        WHERE w.starts > 0 AND w.starts < extract(epoch FROM clock_timestamp()) - 62 * 86400 AND w.held = 0
          AND NOT EXISTS (SELECT FROM keyproxy.leases AS x WHERE x.window_id = w.id)
        LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    is_more := is_more OR gone >= portion;
    DELETE FROM keyproxy.usage_writers WHERE written_at < clock_timestamp() - interval '30 days';
    RETURN is_more;
END
$$;
REVOKE EXECUTE ON FUNCTION keyproxy.tend_usage(int, int, int) FROM PUBLIC;
