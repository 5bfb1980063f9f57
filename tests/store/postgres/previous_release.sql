-- Statements as processes of the previous release send them while the schema is that of this one. test_upgrade.py runs them;
-- the program does not load this file.

-- name: sync_leases
SELECT * FROM keyproxy.sync_leases($1, $2, $3, (
    SELECT coalesce(array_agg(l::keyproxy.lease_line), '{}')
    FROM unnest(
        $4::int8[], $5::text[], $6::text[], $7::bool[], $8::text[], $9::int8[], $10::int8[], $11::float8[], $12::int8[],
        $13::int8[], $14::int8[], $15::int8[], $16::int8[], $17::bool[], $18::bool[]
    ) AS l (lease, pool_kind, pool_id, is_test, measure, starts, bound, interval_seconds, granted, used, returned, want,
            at_least, takes_all, is_closing)
));

-- name: end_holders
SELECT keyproxy.end_holders($1) AS ended;

-- name: reap_holders
SELECT keyproxy.reap_holders() AS done FROM set_config('keyproxy.portion', $1::int::text, true);

-- name: forget_holders
SELECT keyproxy.forget_holders($1) AS gone;

-- name: forget_windows
SELECT next, gone FROM keyproxy.forget_windows($1, $2);

-- name: windows_now
SELECT a.number, w.spent, w.held, w.forfeited,
       keyproxy.window_end(w.measure, w.starts) - extract(epoch FROM clock_timestamp())::float8 AS ends_seconds,
       greatest(0, w.theoretical - extract(epoch FROM clock_timestamp())::float8) AS ahead_seconds
FROM unnest($1::text[], $2::text[], $3::bool[], $4::text[])
    WITH ORDINALITY AS a (pool_kind, pool_id, is_test, measure, number)
JOIN keyproxy.windows AS w
  ON (w.pool_kind, w.pool_id, w.is_test, w.measure) = (a.pool_kind, a.pool_id, a.is_test, a.measure)
 AND w.starts = keyproxy.window_start(a.measure, extract(epoch FROM clock_timestamp())::float8);

-- name: claim_charges
SELECT is_first, charged FROM keyproxy.claim_charges($1, $2, $3::bytea[], $4::int8[], $5::int8[]);

-- name: charges_of
SELECT k.fingerprint, k.tokens FROM keyproxy.idempotent_charges AS k
WHERE k.fingerprint = ANY($1::bytea[]) AND k.charged_at > clock_timestamp() - interval '24 hours';

-- name: record_usage
SELECT keyproxy.record_usage(
    $1, $2, $3::date[], $4::text[], $5::text[], $6::text[], $7::bool[], $8::text[], $9::int8[], $10::int8[], $11::int8[],
    $12::int8[], $13::int8[], $14::text::json
) AS is_new;

-- name: tend_usage
SELECT keyproxy.tend_usage($1, $2, $3) AS is_more;

-- name: usage_by
SELECT CASE WHEN 'day' = ANY($1::text[]) THEN u.day END AS day,
       CASE WHEN 'tenant' = ANY($1) THEN u.tenant_id END AS tenant,
       CASE WHEN 'user' = ANY($1) THEN u.user_id END AS "user",
       CASE WHEN 'key' = ANY($1) THEN u.key_id END AS key,
       CASE WHEN 'mode' = ANY($1) THEN CASE WHEN u.is_test THEN 'test' ELSE 'live' END END AS mode,
       CASE WHEN 'route' = ANY($1) THEN u.route END AS route,
       sum(u.requests) AS requests, sum(u.refusals) AS refusals, sum(u.tokens_in) AS tokens_in,
       sum(u.tokens_out) AS tokens_out, sum(u.tokens_estimated) AS tokens_estimated
FROM keyproxy.usage AS u
WHERE ($2::text IS NULL OR u.tenant_id = $2)
  AND ($3::text IS NULL OR u.user_id = $3)
  AND ($4::text IS NULL OR u.key_id = $4)
  AND ($5::date IS NULL OR u.day >= $5)
  AND ($6::date IS NULL OR u.day < $6)
GROUP BY 1, 2, 3, 4, 5, 6
ORDER BY 1, 2, 3, 4, 5, 6
LIMIT $7;

-- name: usage_after
SELECT u.day, u.tenant_id AS tenant, u.user_id AS "user", u.key_id AS key,
       CASE WHEN u.is_test THEN 'test' ELSE 'live' END AS mode, u.route,
       u.requests, u.refusals, u.tokens_in, u.tokens_out, u.tokens_estimated
FROM keyproxy.usage AS u
WHERE (u.day, u.tenant_id, u.user_id, u.key_id, u.is_test, u.route)
      > ($1::date, $2::text, $3::text, $4::text, $5::bool, $6::text)
  AND ($7::text IS NULL OR u.tenant_id = $7)
  AND ($8::text IS NULL OR u.user_id = $8)
  AND ($9::text IS NULL OR u.key_id = $9)
  AND ($10::date IS NULL OR u.day >= $10)
  AND ($11::date IS NULL OR u.day < $11)
ORDER BY u.day, u.tenant_id, u.user_id, u.key_id, u.is_test, u.route
LIMIT $12;
