-- Every statement of the data plane and the control plane, by name. Parameters are asyncpg's.
--
-- name: identities_by_digest
-- What keys resolve to; unknown digests yield no row. One look-up serves many keys at once.
-- Needs: api_keys (digest), users (id), tenants (id).
SELECT
    k.digest,
    k.id AS key_id,
    k.scopes,
    k.is_test,
    extract(epoch FROM k.expires_at)::float8 AS expires_wall_seconds,
    k.revoked_at IS NOT NULL AS is_revoked,
    u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL AS is_disabled,
    u.id AS user_id,
    t.id AS tenant_id,
    coalesce(k.plan_id, '') AS key_plan_id,
    coalesce(u.plan_id, '') AS user_plan_id,
    coalesce(t.plan_id, '') AS tenant_plan_id
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
WHERE k.digest = ANY($1::bytea[]);

-- name: changes_since
-- The changes that are visible now and were not in the snapshot $1; null asks for the present snapshot alone.
-- One row at least, so that the snapshot is always told, and the history it belongs to: a table that was dropped and
-- restored is another one, although transaction numbers went on. Needs: changes (xid).
WITH here AS (
    SELECT pg_current_snapshot() AS snapshot
)
SELECT here.snapshot::text AS snapshot, 'keyproxy.changes'::regclass::oid::int8 AS history, found.kind, found.subject
FROM here
LEFT JOIN LATERAL (
    SELECT DISTINCT c.kind, c.subject
    FROM keyproxy.changes AS c
    WHERE c.xid >= pg_snapshot_xmin($1::text::pg_snapshot)
      AND NOT pg_visible_in_snapshot(c.xid, $1::text::pg_snapshot)
    LIMIT $2
) AS found ON true;

-- name: forget_changes
-- Removes changes that every living proxy has seen: their transactions had ended by the snapshot $1.
-- Needs: changes (xid).
DELETE FROM keyproxy.changes WHERE xid < pg_snapshot_xmin($1::text::pg_snapshot);

-- name: mark_used
-- Notes when keys were last used, ids $1 at times $2, to the minute: rows noted within the last minute are left alone, and
-- so are rows that somebody holds: a note is not worth a wait, nor a deadlock with another proxy. Needs: api_keys (id).
WITH free AS (
    SELECT k.id, used.at
    FROM keyproxy.api_keys AS k
    JOIN unnest($1::text[], $2::timestamptz[]) AS used (id, at) ON used.id = k.id
    WHERE k.last_used_at IS NULL OR k.last_used_at < used.at - interval '55 seconds'
    FOR NO KEY UPDATE OF k SKIP LOCKED
)
UPDATE keyproxy.api_keys AS k SET last_used_at = free.at FROM free WHERE k.id = free.id;

-- name: say_who_acts
-- For the audit log: who changes something in this transaction, and from where.
SELECT set_config('keyproxy.actor', $1, true), set_config('keyproxy.origin', $2, true);

-- name: create_tenant
-- The tenant; if it is there already, no row.
INSERT INTO keyproxy.tenants (id, name) VALUES ($1, $2)
ON CONFLICT (id) DO NOTHING
RETURNING id, name, plan_id, disabled_at, created_at;

-- name: tenant
SELECT t.id, t.name, t.plan_id, t.disabled_at, t.created_at,
       (SELECT count(*) FROM keyproxy.users AS u WHERE u.tenant_id = t.id) AS users
FROM keyproxy.tenants AS t
WHERE t.id = $1;

-- name: tenants
-- In the order of their ids, after $1, at most $2.
SELECT id, name, plan_id, disabled_at, created_at
FROM keyproxy.tenants
WHERE id > $1
ORDER BY id
LIMIT $2;

-- name: delete_tenant
DELETE FROM keyproxy.tenants WHERE id = $1 RETURNING id;

-- name: create_user
-- The user with its first key in one statement: both or neither, once, whatever order concurrent callers arrive in.
-- $3 null: no key. A user that is there already yields no row and gets no second key.
WITH made AS (
    INSERT INTO keyproxy.users (id, tenant_id) VALUES ($1, $2)
    ON CONFLICT (id) DO NOTHING
    RETURNING id, tenant_id, plan_id, disabled_at, created_at
), issued AS (
    INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at)
    SELECT $3, made.id, $4, $5, $6, $7, false, $8
    FROM made
    WHERE $3::text IS NOT NULL
)
SELECT id, tenant_id, plan_id, disabled_at, created_at FROM made;

-- name: user
SELECT u.id, u.tenant_id, u.plan_id, u.disabled_at, u.created_at,
       (SELECT count(*) FROM keyproxy.api_keys AS k WHERE k.user_id = u.id) AS keys
FROM keyproxy.users AS u
WHERE u.id = $1;

-- name: users
-- In the order of their ids, after $1, at most $2; of one tenant if $3 is not null. Needs: users (tenant_id).
SELECT id, tenant_id, plan_id, disabled_at, created_at
FROM keyproxy.users
WHERE id > $1 AND ($3::text IS NULL OR tenant_id = $3)
ORDER BY id
LIMIT $2;

-- name: delete_user
DELETE FROM keyproxy.users WHERE id = $1 RETURNING id;

-- name: issue_key
-- No row if there is no such user.
INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at)
SELECT $1, u.id, $3, $4, $5, $6, $7, $8
FROM keyproxy.users AS u
WHERE u.id = $2
RETURNING id, user_id, hint, name, scopes, is_test, plan_id, created_at, expires_at, revoked_at, revoke_reason,
          replaces, last_used_at;

-- name: key
SELECT k.id, k.user_id, u.tenant_id, k.hint, k.name, k.scopes, k.is_test, k.plan_id, k.created_at, k.expires_at,
       k.revoked_at, k.revoke_reason, k.replaces, k.last_used_at
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
WHERE k.id = $1;

-- name: keys
-- In the order of their ids, after $1, at most $2; of one user $3, of one tenant $4, where not null.
-- Needs: api_keys (user_id), users (tenant_id).
SELECT k.id, k.user_id, u.tenant_id, k.hint, k.name, k.scopes, k.is_test, k.plan_id, k.created_at, k.expires_at,
       k.revoked_at, k.revoke_reason, k.replaces, k.last_used_at
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
WHERE k.id > $1 AND ($3::text IS NULL OR k.user_id = $3) AND ($4::text IS NULL OR u.tenant_id = $4)
ORDER BY k.id
LIMIT $2;

-- name: revoke_key
-- Once: a key that is revoked already keeps its time and reason. Judged by the row it returns.
UPDATE keyproxy.api_keys
SET revoked_at = coalesce(revoked_at, now()),
    revoke_reason = CASE WHEN revoked_at IS NULL THEN nullif($2, '') ELSE revoke_reason END
WHERE id = $1
RETURNING id, user_id, revoked_at, revoke_reason;

-- name: delete_key
DELETE FROM keyproxy.api_keys WHERE id = $1 RETURNING id;
