-- All statements of the data plane and the control plane, by name. Parameters are asyncpg's.
--
-- name: identities_by_digest
-- The identities of the keys with the given digests, one row per known key, with the columns of access_token_identities. One
-- query serves a batch. The function is called for keys with roles or a ceiling only. Each lookup is a subquery of one row:
-- see acting_identities.
-- Needs: api_keys (digest), api_keys (replaces), users (id), tenants (id), plans (id), roles (id).
SELECT
    k.digest,
    k.id AS key_id,
    CASE WHEN k.roles = '{}' AND u.roles IS NULL AND t.roles IS NULL THEN k.scopes
         ELSE keyproxy.effective_scopes(k.scopes, k.roles, u.roles, t.roles) END AS scopes,
    k.is_test,
    k.acts_for = 'tenant' AS can_act,
    extract(epoch FROM k.expires_at)::float8 AS expires_wall_seconds,
    k.revoked_at IS NOT NULL AS is_revoked,
    k.suspended_at IS NOT NULL AS is_suspended,
    u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL AS is_disabled,
    u.id AS user_id,
    t.id AS tenant_id,
    coalesce(k.lineage, k.id) AS key_pool,
    k.expires_at IS NOT NULL AND EXISTS (SELECT FROM keyproxy.api_keys AS s WHERE s.replaces = k.id) AS is_retiring,
    (SELECT p.limits FROM keyproxy.plans AS p WHERE p.id = k.plan_id) AS key_limits,
    (SELECT p.limits FROM keyproxy.plans AS p
     WHERE p.id = CASE WHEN k.is_test THEN coalesce(u.test_plan_id, u.plan_id) ELSE u.plan_id END) AS user_limits,
    (SELECT p.limits FROM keyproxy.plans AS p
     WHERE p.id = CASE WHEN k.is_test THEN coalesce(t.test_plan_id, t.plan_id) ELSE t.plan_id END) AS tenant_limits,
    NULL::text AS oauth_client,
    NULL::text AS resource,
    NULL::bytea AS bound_to
FROM unnest((SELECT $1::bytea[])) AS w (digest)
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.api_keys AS x WHERE x.digest = w.digest LIMIT 1) AS k
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.users AS x WHERE x.id = k.user_id LIMIT 1) AS u
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.tenants AS x WHERE x.id = u.tenant_id LIMIT 1) AS t;

-- name: access_token_identities
-- The identities of the OAuth access tokens with the given digests, one row per known token. A token stands for its session,
-- draws on the pool of its grant, ends with its session, and is suspended with the key that its user signed in with. Each
-- lookup is a subquery of one row: see acting_identities.
-- Needs: oauth_access_tokens (digest), oauth_sessions (id), oauth_grants (id), oauth_clients (id), api_keys (id), users (id),
-- tenants (id), plans (id), roles (id).
SELECT
    a.digest,
    s.id AS key_id,
    CASE WHEN u.roles IS NULL AND t.roles IS NULL THEN a.scopes
         ELSE keyproxy.effective_scopes(a.scopes, '{}', u.roles, t.roles) END AS scopes,
    g.is_test,
    false AS can_act,
    extract(epoch FROM least(a.expires_at, s.expires_at))::float8 AS expires_wall_seconds,
    false AS is_revoked,
    s.via_key IS NOT NULL AND EXISTS (
        SELECT FROM keyproxy.api_keys AS k WHERE k.id = s.via_key AND k.suspended_at IS NOT NULL
    ) AS is_suspended,
    u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL OR c.disabled_at IS NOT NULL AS is_disabled,
    u.id AS user_id,
    t.id AS tenant_id,
    g.id AS key_pool,
    false AS is_retiring,
    (SELECT p.limits FROM keyproxy.plans AS p WHERE p.id = g.plan_id) AS key_limits,
    (SELECT p.limits FROM keyproxy.plans AS p
     WHERE p.id = CASE WHEN g.is_test THEN coalesce(u.test_plan_id, u.plan_id) ELSE u.plan_id END) AS user_limits,
    (SELECT p.limits FROM keyproxy.plans AS p
     WHERE p.id = CASE WHEN g.is_test THEN coalesce(t.test_plan_id, t.plan_id) ELSE t.plan_id END) AS tenant_limits,
    c.id AS oauth_client,
    g.resource,
    a.bound_to
FROM unnest((SELECT $1::bytea[])) AS w (digest)
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.oauth_access_tokens AS x WHERE x.digest = w.digest LIMIT 1) AS a
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.oauth_sessions AS x WHERE x.id = a.session_id LIMIT 1) AS s
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.oauth_grants AS x WHERE x.id = s.grant_id LIMIT 1) AS g
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.oauth_clients AS x WHERE x.id = g.client_id LIMIT 1) AS c
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.users AS x WHERE x.id = g.user_id LIMIT 1) AS u
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.tenants AS x WHERE x.id = u.tenant_id LIMIT 1) AS t;

-- name: acting_identities
-- The identities of the keys with the digests $1 that act for the users $2, one row per pair with a known key. `may_act`:
-- the key may act for this user now. An unknown user and one of another tenant take the same lookups. The row of a key is
-- the same with all of its users but for what depends on the user.
-- Each lookup is a subquery of one row, which PostgreSQL cannot turn into a join that reads a whole table. The number of
-- pairs is hidden from the planner, so that it never considers the plan worth compiling.
-- Needs: api_keys (digest), api_keys (replaces), users (id), tenants (id), plans (id), roles (id).
SELECT
    w.digest,
    w.user_id AS acting_for,
    k.id AS key_id,
    CASE WHEN k.roles = '{}' AND o.roles IS NULL AND t.roles IS NULL AND u.roles IS NULL THEN k.scopes
         ELSE keyproxy.effective_scopes(
             keyproxy.effective_scopes(k.scopes, k.roles, o.roles, t.roles), '{}', u.roles, NULL
         ) END AS scopes,
    k.is_test,
    k.acts_for = 'tenant' AS can_act,
    coalesce(k.acts_for = 'tenant' AND u.tenant_id = t.id AND u.disabled_at IS NULL, false) AS may_act,
    extract(epoch FROM k.expires_at)::float8 AS expires_wall_seconds,
    k.revoked_at IS NOT NULL AS is_revoked,
    k.suspended_at IS NOT NULL AS is_suspended,
    o.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL AS is_disabled,
    o.id AS owner_id,
    t.id AS tenant_id,
    coalesce(k.lineage, k.id) AS key_pool,
    k.expires_at IS NOT NULL AND EXISTS (SELECT FROM keyproxy.api_keys AS s WHERE s.replaces = k.id) AS is_retiring,
    (SELECT p.limits FROM keyproxy.plans AS p WHERE p.id = k.plan_id) AS key_limits,
    (SELECT p.limits FROM keyproxy.plans AS p
     WHERE p.id = CASE WHEN k.is_test THEN coalesce(u.test_plan_id, u.plan_id) ELSE u.plan_id END) AS user_limits,
    (SELECT p.limits FROM keyproxy.plans AS p
     WHERE p.id = CASE WHEN k.is_test THEN coalesce(t.test_plan_id, t.plan_id) ELSE t.plan_id END) AS tenant_limits
FROM unnest((SELECT $1::bytea[]), (SELECT $2::text[])) AS w (digest, user_id)
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.api_keys AS x WHERE x.digest = w.digest LIMIT 1) AS k
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.users AS x WHERE x.id = k.user_id LIMIT 1) AS o
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.tenants AS x WHERE x.id = o.tenant_id LIMIT 1) AS t
LEFT JOIN LATERAL (SELECT x.* FROM keyproxy.users AS x WHERE x.id = w.user_id LIMIT 1) AS u ON true;

-- name: agent_token_identities
-- The identities of the agent tokens with the digests $1, one row per known token. A token dies with its root key, its
-- ancestors, its user, and the owner of the key if it was minted while acting: o is the owner, u the user. `chain`: the
-- token and its ancestors, itself first. `is_intact`: all rows that it was cut from still belong together, and its root key
-- may still act. As in acting_identities, each lookup is a subquery of one row; the number of digests is hidden from the
-- planner, so that it never considers the plan worth compiling.
-- Needs: agent_tokens (digest), agent_tokens (id), agents (user_id, id), api_keys (id), users (id), tenants (id), plans (id),
-- roles (id).
SELECT
    w.digest,
    a.id AS token_id,
    k.id AS key_id,
    CASE WHEN k.roles = '{}' AND o.roles IS NULL AND t.roles IS NULL AND u.roles IS NULL THEN k.scopes
         ELSE keyproxy.effective_scopes(
             keyproxy.effective_scopes(k.scopes, k.roles, o.roles, t.roles), '{}', u.roles, NULL
         ) END AS key_scopes,
    k.is_test,
    extract(epoch FROM least(k.expires_at, c.expires_at))::float8 AS expires_wall_seconds,
    k.revoked_at IS NOT NULL OR c.is_revoked AS is_revoked,
    k.suspended_at IS NOT NULL AS is_suspended,
    u.disabled_at IS NOT NULL OR o.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL OR c.is_disabled AS is_disabled,
    c.is_intact AND CASE
        WHEN a.actor_user_id IS NULL THEN o.id = u.id
        ELSE o.id = a.actor_user_id AND o.tenant_id = u.tenant_id AND k.acts_for = 'tenant'
    END AS is_intact,
    u.id AS user_id,
    a.actor_user_id,
    o.id AS owner_id,
    t.id AS tenant_id,
    a.depth,
    c.steps AS chain,
    coalesce(k.lineage, k.id) AS key_pool,
    (SELECT p.limits FROM keyproxy.plans AS p WHERE p.id = k.plan_id) AS key_limits,
    (SELECT p.limits FROM keyproxy.plans AS p
     WHERE p.id = CASE WHEN k.is_test THEN coalesce(u.test_plan_id, u.plan_id) ELSE u.plan_id END) AS user_limits,
    (SELECT p.limits FROM keyproxy.plans AS p
     WHERE p.id = CASE WHEN k.is_test THEN coalesce(t.test_plan_id, t.plan_id) ELSE t.plan_id END) AS tenant_limits
FROM unnest((SELECT $1::bytea[])) AS w (digest)
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.agent_tokens AS x WHERE x.digest = w.digest LIMIT 1) AS a
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.api_keys AS x WHERE x.id = a.root_key_id LIMIT 1) AS k
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.users AS x WHERE x.id = k.user_id LIMIT 1) AS o
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.users AS x WHERE x.id = a.user_id LIMIT 1) AS u
CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.tenants AS x WHERE x.id = u.tenant_id LIMIT 1) AS t
CROSS JOIN LATERAL (
    WITH RECURSIVE cut AS (
        SELECT 0 AS place, a.id, a.parent_token_id, a.agent_id, a.scopes, a.token_budget, a.request_budget, a.expires_at,
               a.revoked_at, true AS is_ours
        UNION ALL
        SELECT cut.place + 1, p.id, p.parent_token_id, p.agent_id, p.scopes, p.token_budget, p.request_budget, p.expires_at,
               p.revoked_at, (p.root_key_id, p.user_id) = (a.root_key_id, a.user_id)
                   AND p.actor_user_id IS NOT DISTINCT FROM a.actor_user_id
        FROM cut
        CROSS JOIN LATERAL (SELECT x.* FROM keyproxy.agent_tokens AS x WHERE x.id = cut.parent_token_id LIMIT 1) AS p
        WHERE cut.place <= 3
    )
    SELECT min(cut.expires_at) AS expires_at,
           bool_or(cut.revoked_at IS NOT NULL) AS is_revoked,
           bool_or(g.disabled_at IS NOT NULL) AS is_disabled,
           bool_and(cut.is_ours) AND max(cut.place) = a.depth AS is_intact,
           jsonb_agg(jsonb_build_object(
               'token', cut.id, 'agent', cut.agent_id, 'scopes', cut.scopes,
               'token_budget', cut.token_budget, 'request_budget', cut.request_budget,
               'ceiling', keyproxy.scopes_of_roles(g.roles),
               'limits', (SELECT p.limits FROM keyproxy.plans AS p WHERE p.id = g.plan_id)
           ) ORDER BY cut.place) AS steps
    FROM cut
    CROSS JOIN LATERAL (
        SELECT x.* FROM keyproxy.agents AS x WHERE x.user_id = a.user_id AND x.id = cut.agent_id LIMIT 1
    ) AS g
) AS c;

-- name: owners_by_id
-- Whether the tenants $3 own the ids $2 of the kinds $1, and whether they own any id of that kind; one row for each. The
-- subqueries are no EXISTS, which PostgreSQL may answer from a hash of the whole table.
-- Needs: owned (kind, id), owned (tenant_id, kind, id).
SELECT w.kind, w.id, w.tenant_id,
       coalesce((SELECT o.tenant_id = w.tenant_id FROM keyproxy.owned AS o WHERE o.kind = w.kind AND o.id = w.id), false)
           AS is_owned,
       coalesce((
           SELECT true FROM keyproxy.owned AS o WHERE o.tenant_id = w.tenant_id AND o.kind = w.kind LIMIT 1
       ), false) AS owns_any
FROM unnest($1::text[], $2::text[], $3::text[]) AS w (kind, id, tenant_id);

-- name: provider_keys_of
-- The keys of the providers $1 and tenants $2, in pairs; an empty tenant: the shared ones. One row for each pair.
-- Needs: provider_keys (tenant_id, provider), provider_keys (provider) where shared.
SELECT w.provider, w.tenant_id, coalesce(k.keys, '[]') AS keys
FROM unnest($1::text[], $2::text[]) AS w (provider, tenant_id)
CROSS JOIN LATERAL (
    SELECT json_agg(json_build_object(
               'id', p.id, 'is_test', p.is_test, 'sealed', encode(p.sealed, 'hex'), 'sealed_with', p.sealed_with,
               'starts', extract(epoch FROM p.starts_at)::float8, 'ends', extract(epoch FROM p.ends_at)::float8,
               'is_revoked', p.revoked_at IS NOT NULL
           )) AS keys
    FROM (
        SELECT o.* FROM keyproxy.provider_keys AS o
        WHERE w.tenant_id <> '' AND o.tenant_id = w.tenant_id AND o.provider = w.provider
        UNION ALL
        SELECT s.* FROM keyproxy.provider_keys AS s
        WHERE w.tenant_id = '' AND s.tenant_id IS NULL AND s.provider = w.provider
    ) AS p
) AS k;

-- name: provider_key
SELECT p.*, CASE
           WHEN p.revoked_at IS NOT NULL THEN 'revoked'
           WHEN p.ends_at <= now() THEN 'ended'
           WHEN p.starts_at > now() THEN 'scheduled'
           WHEN p.ends_at IS NOT NULL THEN 'ending'
           ELSE 'active'
       END AS state
FROM keyproxy.provider_keys AS p
WHERE p.id = $1;

-- name: hold_provider_key
-- Locks the row until the transaction ends.
SELECT p.id FROM keyproxy.provider_keys AS p WHERE p.id = $1 FOR NO KEY UPDATE;

-- name: provider_keys
-- In the order of their ids, after $1, at most $2; only those of the provider $3 and the tenant $4, if not null.
-- Needs: provider_keys (id).
SELECT p.*, CASE
           WHEN p.revoked_at IS NOT NULL THEN 'revoked'
           WHEN p.ends_at <= now() THEN 'ended'
           WHEN p.starts_at > now() THEN 'scheduled'
           WHEN p.ends_at IS NOT NULL THEN 'ending'
           ELSE 'active'
       END AS state
FROM keyproxy.provider_keys AS p
WHERE p.id > $1 AND ($3::text IS NULL OR p.provider = $3) AND ($4::text IS NULL OR p.tenant_id = $4)
ORDER BY p.id
LIMIT $2;

-- name: add_provider_key
-- $8: the status of the response to a check, null if there was none.
INSERT INTO keyproxy.provider_keys
    (id, provider, tenant_id, is_test, sealed, sealed_with, hint, check_status, checked_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, CASE WHEN $8::integer IS NOT NULL THEN now() END);

-- name: end_provider_key
-- Let a row end after $2, unless it ends before.
UPDATE keyproxy.provider_keys AS p SET ends_at = least(p.ends_at, now() + $2::interval) WHERE p.id = $1
RETURNING p.ends_at;

-- name: revoke_provider_key
UPDATE keyproxy.provider_keys AS p SET revoked_at = now() WHERE p.id = $1 AND p.revoked_at IS NULL;

-- name: delete_provider_key
DELETE FROM keyproxy.provider_keys AS p WHERE p.id = $1;

-- name: provider_keys_to_reseal
-- Rows after $2 that another key than $1 has sealed, at most $3, locked. Needs: provider_keys (id).
SELECT p.*, '' AS state FROM keyproxy.provider_keys AS p
WHERE p.sealed_with <> $1 AND p.id > $2
ORDER BY p.id
LIMIT $3
FOR NO KEY UPDATE;

-- name: reseal_provider_key
UPDATE keyproxy.provider_keys AS p SET sealed = $2, sealed_with = $3 WHERE p.id = $1;

-- name: prompt_templates
-- All templates of instructions; at most 10,000.
SELECT t.digest, t.category, t.tenant_id FROM keyproxy.prompt_templates AS t;

-- name: prompt_templates_by_digest
-- The templates of the digests $1. Needs: prompt_templates (digest).
SELECT t.digest, t.category, t.tenant_id FROM keyproxy.prompt_templates AS t WHERE t.digest = ANY ($1::bytea[]);

-- name: signing_keys
-- The public halves of signing keys that have not been removed, at most $1: those that end last.
-- Needs: signing_keys (kid); the table is small.
SELECT s.kid, s.jwk, extract(epoch FROM s.ends_at)::float8 AS ends_wall_seconds
FROM keyproxy.signing_keys AS s
ORDER BY s.ends_at DESC, s.kid
LIMIT $1;

-- name: publish_signing_key
-- Store the public half $2 of the key $1, unless it is stored. The times are those of the machine that signs.
INSERT INTO keyproxy.signing_keys (kid, jwk, created_at, ends_at)
VALUES ($1, $2::text::jsonb, to_timestamp($3::float8), to_timestamp($4::float8))
ON CONFLICT (kid) DO NOTHING;

-- name: cut_signing_key
-- Let the key $1 end at $2, unless it ends before.
UPDATE keyproxy.signing_keys AS s
SET ends_at = greatest(s.created_at, to_timestamp($2::float8))
WHERE s.kid = $1 AND s.ends_at > greatest(s.created_at, to_timestamp($2::float8));

-- name: changes_since
-- The changes that are visible now and were not in the snapshot $1; with null, only the present snapshot. Changes of
-- limits come last: if the last of the first $2 rows is one, all other changes are among them. The rows are not sorted
-- or made distinct: one statement of any client may have left millions of rows. Returns at least one row, since each
-- row contains the snapshot and the history that it belongs to. A table that was dropped and restored, a server that
-- was promoted and may lack the latest commits, and another cluster have another history, even if their transaction
-- numbers continue. The last rows are the leases of the holder $3 whose idle units are recalled, until it reports them.
-- Needs: changes (xid), leases (holder) where is_recalled.
WITH here AS (
    SELECT pg_current_snapshot() AS snapshot,
           concat_ws(
               '/', 'keyproxy.changes'::regclass::oid, (SELECT system_identifier FROM pg_control_system()),
               CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END
           ) AS history
)
SELECT here.snapshot::text AS snapshot, here.history, extract(epoch FROM clock_timestamp())::float8 AS server_seconds,
       found.kind, found.subject
FROM here
LEFT JOIN LATERAL (
    (
        SELECT c.kind, c.subject FROM keyproxy.changes AS c
        WHERE c.xid >= pg_snapshot_xmin($1::text::pg_snapshot)
          AND NOT pg_visible_in_snapshot(c.xid, $1::text::pg_snapshot)
          AND c.kind NOT IN ('plan', 'key_limits', 'user_limits', 'tenant_limits', 'window')
        LIMIT $2
    ) UNION ALL (
        SELECT c.kind, c.subject FROM keyproxy.changes AS c
        WHERE c.xid >= pg_snapshot_xmin($1::text::pg_snapshot)
          AND NOT pg_visible_in_snapshot(c.xid, $1::text::pg_snapshot)
          AND c.kind IN ('plan', 'key_limits', 'user_limits', 'tenant_limits', 'window')
        LIMIT $2
    ) UNION ALL (
        SELECT 'recall', r.lease::text FROM keyproxy.recalled_leases($3) AS r (lease)
    )
    LIMIT $2
) AS found ON true;

-- name: forget_changes
-- Deletes changes that every live proxy has read: their transactions had ended by the snapshot $1. At most $2 of them;
-- one row for each. Needs: changes (xid).
DELETE FROM keyproxy.changes WHERE ctid = ANY (ARRAY(
    SELECT c.ctid FROM keyproxy.changes AS c WHERE c.xid < pg_snapshot_xmin($1::text::pg_snapshot)
    ORDER BY c.xid LIMIT $2
)) RETURNING 1;

-- name: mark_used
-- Records when the keys and OAuth sessions $1 were last used, with their times as a JSON object $2 (Unix time by id), to the
-- minute: skips rows written within the last minute, and rows locked by another transaction, since a note is worth neither
-- a wait nor a deadlock with another proxy. Rejected: a join with the array, whose plan depends on statistics and takes
-- quadratic time if they were collected when the table was empty. Needs: api_keys (id), oauth_sessions (id).
WITH sessions AS (
    UPDATE keyproxy.oauth_sessions AS s
    SET last_used_at = to_timestamp(((SELECT $2::text::jsonb) ->> s.id)::float8)
    WHERE s.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.oauth_sessions AS o
        WHERE o.id = ANY ($1::text[]) AND o.id LIKE 'ses\_%'
          AND (o.last_used_at IS NULL
               OR o.last_used_at < to_timestamp(((SELECT $2::text::jsonb) ->> o.id)::float8) - interval '55 seconds')
        FOR NO KEY UPDATE SKIP LOCKED
    ))
)
UPDATE keyproxy.api_keys AS k
SET last_used_at = to_timestamp(((SELECT $2::text::jsonb) ->> k.id)::float8)
WHERE k.id = ANY (ARRAY(
    SELECT o.id FROM keyproxy.api_keys AS o
    WHERE o.id = ANY ($1::text[])
      AND (o.last_used_at IS NULL
           OR o.last_used_at < to_timestamp(((SELECT $2::text::jsonb) ->> o.id)::float8) - interval '55 seconds')
    FOR NO KEY UPDATE SKIP LOCKED
));

-- name: say_who_acts
-- Sets the actor and source of changes in this transaction, for the audit log.
SELECT set_config('keyproxy.actor', $1, true), set_config('keyproxy.origin', $2, true);

-- name: register_template
-- Returns the new template of instructions; no row if its digest is registered already.
INSERT INTO keyproxy.prompt_templates (digest, category, name, tenant_id) VALUES ($1, $2, $3, $4)
ON CONFLICT (digest) DO NOTHING
RETURNING digest;

-- name: template
SELECT t.digest, t.category, t.name, t.tenant_id, t.created_at FROM keyproxy.prompt_templates AS t WHERE t.digest = $1;

-- name: hold_template
-- Locks the template until the transaction ends.
SELECT t.digest, t.category, t.name, t.tenant_id, t.created_at
FROM keyproxy.prompt_templates AS t
WHERE t.digest = $1
FOR NO KEY UPDATE;

-- name: change_template
-- The name stays as it is if $3 is null.
UPDATE keyproxy.prompt_templates AS t
SET category = $2, name = coalesce($3, t.name)
WHERE t.digest = $1 AND (t.category, t.name) IS DISTINCT FROM ($2, coalesce($3, t.name));

-- name: templates
-- In the order of their digests, after $1, at most $2. Needs: prompt_templates (digest).
SELECT t.digest, t.category, t.name, t.tenant_id, t.created_at
FROM keyproxy.prompt_templates AS t
WHERE t.digest > $1
ORDER BY t.digest
LIMIT $2;

-- name: remove_template
DELETE FROM keyproxy.prompt_templates AS t WHERE t.digest = $1
RETURNING t.digest, t.category, t.name, t.tenant_id, t.created_at;

-- name: create_tenant
-- Returns the new tenant; no row if it exists already.
INSERT INTO keyproxy.tenants (id, name, plan_id) VALUES ($1, $2, $3)
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: tenant
-- Needs: users (tenant_id).
SELECT t.id, t.name, t.plan_id, t.test_plan_id, t.roles, t.disabled_at, t.created_at,
       (SELECT count(*) FROM keyproxy.users AS u WHERE u.tenant_id = t.id) AS users
FROM keyproxy.tenants AS t
WHERE t.id = $1;

-- name: tenants
-- In the order of their ids, after $1, at most $2. Needs: users (tenant_id).
SELECT t.id, t.name, t.plan_id, t.test_plan_id, t.roles, t.disabled_at, t.created_at,
       (SELECT count(*) FROM keyproxy.users AS u WHERE u.tenant_id = t.id) AS users
FROM keyproxy.tenants AS t
WHERE t.id > $1
ORDER BY t.id
LIMIT $2;

-- name: hold_tenant
-- Locks the tenant until the transaction ends.
SELECT id FROM keyproxy.tenants WHERE id = $1 FOR NO KEY UPDATE;

-- name: change_tenant
-- Changes the fields named in $2 only. Disabling again keeps the time of the first time.
UPDATE keyproxy.tenants AS t
SET name = CASE WHEN c.change ? 'name' THEN coalesce(c.change ->> 'name', '') ELSE t.name END,
    plan_id = CASE WHEN c.change ? 'plan' THEN c.change ->> 'plan' ELSE t.plan_id END,
    test_plan_id = CASE WHEN c.change ? 'test_plan' THEN c.change ->> 'test_plan' ELSE t.test_plan_id END,
    roles = CASE WHEN c.change ->> 'roles' IS NOT NULL THEN ARRAY(SELECT jsonb_array_elements_text(c.change -> 'roles'))
                 WHEN c.change ? 'roles' THEN NULL
                 ELSE t.roles END,
    disabled_at = CASE WHEN (c.change ->> 'disabled')::boolean THEN coalesce(t.disabled_at, now())
                       WHEN NOT (c.change ->> 'disabled')::boolean THEN NULL
                       ELSE t.disabled_at END
FROM (SELECT $2::text::jsonb AS change) AS c
WHERE t.id = $1;

-- name: delete_tenant
DELETE FROM keyproxy.tenants WHERE id = $1;

-- name: create_user
-- Creates the user with its first key in one statement: both or neither, and only once under concurrency.
-- $4 null: no key. A user that exists already yields no row and gets no second key.
WITH made AS (
    INSERT INTO keyproxy.users (id, tenant_id, plan_id) VALUES ($1, $2, $3)
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), issued AS (
    INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at, plan_id)
    SELECT $4, made.id, $5, $6, $7, $8, false, now() + $9::interval, $10
    FROM made
    WHERE $4::text IS NOT NULL
)
SELECT id FROM made;

-- name: user
-- Needs: api_keys (user_id).
SELECT u.id, u.tenant_id, u.plan_id, u.test_plan_id, u.roles, u.disabled_at, u.created_at,
       (SELECT count(*) FROM keyproxy.api_keys AS k WHERE k.user_id = u.id) AS keys
FROM keyproxy.users AS u
WHERE u.id = $1;

-- name: users
-- In the order of their ids, after $1, at most $2; of one tenant if $3 is not null.
-- Needs: users (tenant_id), api_keys (user_id).
SELECT u.id, u.tenant_id, u.plan_id, u.test_plan_id, u.roles, u.disabled_at, u.created_at,
       (SELECT count(*) FROM keyproxy.api_keys AS k WHERE k.user_id = u.id) AS keys
FROM keyproxy.users AS u
WHERE u.id > $1 AND ($3::text IS NULL OR u.tenant_id = $3)
ORDER BY u.id
LIMIT $2;

-- name: hold_user
SELECT id FROM keyproxy.users WHERE id = $1 FOR NO KEY UPDATE;

-- name: change_user
-- As change_tenant.
UPDATE keyproxy.users AS u
SET plan_id = CASE WHEN c.change ? 'plan' THEN c.change ->> 'plan' ELSE u.plan_id END,
    test_plan_id = CASE WHEN c.change ? 'test_plan' THEN c.change ->> 'test_plan' ELSE u.test_plan_id END,
    roles = CASE WHEN c.change ->> 'roles' IS NOT NULL THEN ARRAY(SELECT jsonb_array_elements_text(c.change -> 'roles'))
                 WHEN c.change ? 'roles' THEN NULL
                 ELSE u.roles END,
    disabled_at = CASE WHEN (c.change ->> 'disabled')::boolean THEN coalesce(u.disabled_at, now())
                       WHEN NOT (c.change ->> 'disabled')::boolean THEN NULL
                       ELSE u.disabled_at END
FROM (SELECT $2::text::jsonb AS change) AS c
WHERE u.id = $1;

-- name: delete_user
DELETE FROM keyproxy.users WHERE id = $1;

-- name: issue_key
-- No row if the user does not exist.
INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at, plan_id, roles, acts_for)
SELECT $1, u.id, $3, $4, $5, $6, $7, now() + $8::interval, $9, $10, $11
FROM keyproxy.users AS u
WHERE u.id = $2
RETURNING id;

-- name: issue_keys
-- Creates many keys in one statement, described by the JSON array $1; only for users of tenant $2, if not null. A user
-- with a working key of that name and mode gets no other, so that an interrupted run can be repeated. One row for each
-- new key. Users, wishes and the keys in their way are found by their text in JSON objects, without a join, for the reason
-- that mark_used gives. Needs: users (id), api_keys (user_id).
WITH wishes AS MATERIALIZED (
    SELECT w.*, jsonb_build_array(w.user_id, w.name, w.is_test)::text AS wish
    FROM jsonb_to_recordset($1::text::jsonb) AS w (
        id text, user_id text, digest text, hint text, name text, scopes text[], is_test boolean, life_seconds float8,
        plan text, roles text[], acts_for text
    )
), wanted AS MATERIALIZED (
    SELECT array_agg(DISTINCT user_id) AS users, jsonb_object_agg(wish, true) AS wishes FROM wishes
), owners AS MATERIALIZED (
    SELECT coalesce(jsonb_object_agg(u.id, true), '{}') AS users
    FROM keyproxy.users AS u
    WHERE u.id = ANY ((SELECT users FROM wanted)::text[]) AND ($2::text IS NULL OR u.tenant_id = $2)
), taken AS MATERIALIZED (
    SELECT coalesce(jsonb_object_agg(k.wish, true), '{}') AS wishes
    FROM (
        SELECT jsonb_build_array(i.user_id, i.name, i.is_test)::text AS wish
        FROM keyproxy.api_keys AS i
        WHERE i.user_id = ANY ((SELECT users FROM wanted)::text[])
          AND i.revoked_at IS NULL AND (i.expires_at IS NULL OR i.expires_at > now())
    ) AS k
    WHERE (SELECT wishes FROM wanted) ? k.wish
)
INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at, plan_id, roles, acts_for)
SELECT w.id, w.user_id, decode(w.digest, 'hex'), w.hint, w.name, w.scopes, w.is_test,
       now() + make_interval(secs => w.life_seconds), w.plan, w.roles, coalesce(w.acts_for, 'none')
FROM wishes AS w
WHERE (SELECT users FROM owners) ? w.user_id AND NOT (SELECT wishes FROM taken) ? w.wish
RETURNING id, user_id, name, expires_at;

-- name: revoke_unseen
-- Before issue_keys, with the same $1: revokes, for the reason $2, the working keys that it would find in the way, if each
-- of them is as the wish describes it, was issued and not rotated or imported, and was never used. One row for each.
-- A wish is found by the text of user, name and mode, without a join, for the reason that mark_used gives.
-- Needs: api_keys (id), api_keys (user_id), api_keys (replaces), usage (key_id), foreign_hashes (key_id).
UPDATE keyproxy.api_keys AS k
SET revoked_at = now(), revoke_reason = $2
WHERE k.id = ANY (ARRAY(
    WITH wanted AS MATERIALIZED (
        SELECT array_agg(DISTINCT w.user_id) AS users,
               jsonb_object_agg(
                   jsonb_build_array(w.user_id, w.name, w.is_test)::text,
                   jsonb_build_object('scopes', w.scopes, 'plan', w.plan, 'roles', w.roles,
                                      'acts_for', coalesce(w.acts_for, 'none'))
               ) AS wishes
        FROM jsonb_to_recordset($1::text::jsonb) AS w (
            user_id text, name text, scopes text[], is_test boolean, plan text, roles text[], acts_for text
        )
    )
    SELECT unnest(array_agg(o.id))
    FROM (
        SELECT i.*, (SELECT wishes FROM wanted) -> jsonb_build_array(i.user_id, i.name, i.is_test)::text AS wish
        FROM keyproxy.api_keys AS i
        WHERE i.user_id = ANY ((SELECT users FROM wanted)::text[])
          AND i.revoked_at IS NULL AND (i.expires_at IS NULL OR i.expires_at > now())
    ) AS o
    WHERE o.wish IS NOT NULL
    GROUP BY o.user_id, o.name, o.is_test
    HAVING bool_and(
        to_jsonb(o.scopes) = o.wish -> 'scopes' AND to_jsonb(o.roles) = o.wish -> 'roles' AND o.plan_id IS NOT DISTINCT FROM o.wish ->> 'plan'
        AND o.acts_for = o.wish ->> 'acts_for' AND o.last_used_at IS NULL AND o.replaces IS NULL
        AND NOT EXISTS (SELECT FROM keyproxy.api_keys AS s WHERE s.replaces = o.id)
        AND NOT EXISTS (SELECT FROM keyproxy.usage AS g WHERE g.key_id = o.id)
        AND NOT EXISTS (SELECT FROM keyproxy.foreign_hashes AS f WHERE f.key_id = o.id)
    )
))
RETURNING k.id, k.user_id, k.name, k.is_test;

-- name: hold_users
-- Locks the existing users of $1 in the order of their ids, so that concurrent calls do not deadlock.
SELECT id, tenant_id FROM keyproxy.users WHERE id = ANY($1::text[]) ORDER BY id FOR NO KEY UPDATE;

-- name: key
-- Needs: api_keys (replaces).
SELECT k.id, k.user_id, u.tenant_id, k.hint, k.name, k.scopes, k.roles, k.acts_for, k.is_test, k.plan_id, k.created_at,
       k.expires_at, k.revoked_at, k.revoke_reason, k.suspended_at, k.suspend_reason, k.replaces, s.id AS replaced_by,
       k.last_used_at,
       CASE WHEN k.revoked_at IS NOT NULL THEN 'revoked'
            WHEN k.expires_at <= now() THEN 'expired'
            WHEN u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL THEN 'disabled'
            WHEN k.suspended_at IS NOT NULL THEN 'suspended'
            WHEN s.id IS NOT NULL THEN 'retiring'
            ELSE 'active' END AS state
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
LEFT JOIN LATERAL (
    SELECT s.id FROM keyproxy.api_keys AS s WHERE s.replaces = k.id ORDER BY s.created_at DESC, s.id LIMIT 1
) AS s ON true
WHERE k.id = $1;

-- name: keys
-- In the order of their ids, after $1, at most $2; of one user $3, of one tenant $4, of one mode $5, in one state $6,
-- older than $7, not used for $8, expiring within $9, where not null. Needs: api_keys (user_id), users (tenant_id).
SELECT listed.*
FROM (
    SELECT k.id, k.user_id, u.tenant_id, k.hint, k.name, k.scopes, k.roles, k.acts_for, k.is_test, k.plan_id, k.created_at,
           k.expires_at, k.revoked_at, k.revoke_reason, k.suspended_at, k.suspend_reason, k.replaces, s.id AS replaced_by,
       k.last_used_at,
           CASE WHEN k.revoked_at IS NOT NULL THEN 'revoked'
                WHEN k.expires_at <= now() THEN 'expired'
                WHEN u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL THEN 'disabled'
                WHEN k.suspended_at IS NOT NULL THEN 'suspended'
                WHEN s.id IS NOT NULL THEN 'retiring'
                ELSE 'active' END AS state
    FROM keyproxy.api_keys AS k
    JOIN keyproxy.users AS u ON u.id = k.user_id
    JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
    LEFT JOIN LATERAL (
        SELECT s.id FROM keyproxy.api_keys AS s WHERE s.replaces = k.id ORDER BY s.created_at DESC, s.id LIMIT 1
    ) AS s ON true
    WHERE k.id > $1
) AS listed
WHERE ($3::text IS NULL OR listed.user_id = $3)
  AND ($4::text IS NULL OR listed.tenant_id = $4)
  AND ($5::boolean IS NULL OR listed.is_test = $5)
  AND ($6::text IS NULL OR listed.state = $6)
  AND ($7::interval IS NULL OR listed.created_at < now() - $7)
  AND ($8::interval IS NULL OR coalesce(listed.last_used_at, listed.created_at) < now() - $8)
  AND ($9::interval IS NULL OR listed.expires_at < now() + $9)
ORDER BY listed.id
LIMIT $2;

-- name: keys_by_time
-- As keys, in the order of the time $10 (created, used, expires). After the key $1 at the time $11.
SELECT timed.*, timed.at::text AS cursor
FROM (
    SELECT listed.*, CASE $10::text WHEN 'created' THEN listed.created_at
                                    WHEN 'used' THEN coalesce(listed.last_used_at, '-infinity')
                                    WHEN 'expires' THEN coalesce(listed.expires_at, 'infinity') END AS at
    FROM (
        SELECT k.id, k.user_id, u.tenant_id, k.hint, k.name, k.scopes, k.roles, k.acts_for, k.is_test, k.plan_id, k.created_at,
               k.expires_at, k.revoked_at, k.revoke_reason, k.suspended_at, k.suspend_reason, k.replaces, s.id AS replaced_by,
       k.last_used_at,
               CASE WHEN k.revoked_at IS NOT NULL THEN 'revoked'
                    WHEN k.expires_at <= now() THEN 'expired'
                    WHEN u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL THEN 'disabled'
                    WHEN k.suspended_at IS NOT NULL THEN 'suspended'
                    WHEN s.id IS NOT NULL THEN 'retiring'
                    ELSE 'active' END AS state
        FROM keyproxy.api_keys AS k
        JOIN keyproxy.users AS u ON u.id = k.user_id
        JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
        LEFT JOIN LATERAL (
            SELECT s.id FROM keyproxy.api_keys AS s WHERE s.replaces = k.id ORDER BY s.created_at DESC, s.id LIMIT 1
        ) AS s ON true
    ) AS listed
    WHERE ($3::text IS NULL OR listed.user_id = $3)
      AND ($4::text IS NULL OR listed.tenant_id = $4)
      AND ($5::boolean IS NULL OR listed.is_test = $5)
      AND ($6::text IS NULL OR listed.state = $6)
      AND ($7::interval IS NULL OR listed.created_at < now() - $7)
      AND ($8::interval IS NULL OR coalesce(listed.last_used_at, listed.created_at) < now() - $8)
      AND ($9::interval IS NULL OR listed.expires_at < now() + $9)
) AS timed
WHERE (timed.at, timed.id) > ($11::text::timestamptz, $1)
ORDER BY timed.at, timed.id
LIMIT $2;

-- name: hold_key
-- Locks the key, its owner first: the same order as deleting the owner, to avoid deadlocks.
WITH owner AS MATERIALIZED (
    SELECT u.id
    FROM keyproxy.api_keys AS k
    JOIN keyproxy.users AS u ON u.id = k.user_id
    WHERE k.id = $1
    FOR KEY SHARE OF u
)
SELECT k.id FROM keyproxy.api_keys AS k JOIN owner ON owner.id = k.user_id WHERE k.id = $1 FOR NO KEY UPDATE OF k;

-- name: change_key
-- As change_tenant.
UPDATE keyproxy.api_keys AS k
SET name = CASE WHEN c.change ? 'name' THEN coalesce(c.change ->> 'name', '') ELSE k.name END,
    plan_id = CASE WHEN c.change ? 'plan' THEN c.change ->> 'plan' ELSE k.plan_id END,
    scopes = CASE WHEN c.change ? 'scopes' THEN ARRAY(SELECT jsonb_array_elements_text(c.change -> 'scopes'))
                  ELSE k.scopes END,
    roles = CASE WHEN c.change ? 'roles' THEN ARRAY(SELECT jsonb_array_elements_text(c.change -> 'roles'))
                 ELSE k.roles END,
    acts_for = coalesce(c.change ->> 'acts_for', k.acts_for)
FROM (SELECT $2::text::jsonb AS change) AS c
WHERE k.id = $1;

-- name: successor_of_key
-- The working key that replaces this one, if any. Needs: api_keys (replaces).
SELECT id
FROM keyproxy.api_keys
WHERE replaces = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
LIMIT 1;

-- name: replace_key
-- Creates a key with the user, scopes, roles, mode, plan, name and right to act of $1; it expires after $5, or never if
-- that is null. A trigger fills in the lineage.
INSERT INTO keyproxy.api_keys (
    id, user_id, digest, hint, name, scopes, roles, acts_for, is_test, plan_id, expires_at, replaces
)
SELECT $2, k.user_id, $3, $4, k.name, k.scopes, k.roles, k.acts_for, k.is_test, k.plan_id, now() + $5::interval, k.id
FROM keyproxy.api_keys AS k
WHERE k.id = $1
RETURNING id;

-- name: retire_key
-- Makes the key $1 expire after $2, unless it expires earlier.
UPDATE keyproxy.api_keys SET expires_at = least(expires_at, now() + $2::interval) WHERE id = $1
RETURNING expires_at;

-- name: revoke_key
-- A key that is revoked already keeps its time and reason.
UPDATE keyproxy.api_keys
SET revoked_at = now(), revoke_reason = nullif($2, '')
WHERE id = $1 AND revoked_at IS NULL
RETURNING id;

-- name: suspend_key
-- A key that is suspended already keeps its time and reason.
UPDATE keyproxy.api_keys
SET suspended_at = now(), suspend_reason = nullif($2, '')
WHERE id = $1 AND suspended_at IS NULL
RETURNING id;

-- name: resume_key
UPDATE keyproxy.api_keys SET suspended_at = NULL, suspend_reason = NULL WHERE id = $1 AND suspended_at IS NOT NULL
RETURNING id;

-- name: revoke_keys
-- The next $2 keys after $1 that are not revoked, in the order of their ids: of one user $4, of one tenant $5, older than
-- $6, not used for $7, where not null. Judged by the rows it returns; what is revoked already is passed over, so that it
-- can be run again. Without a join of the two steps, as mark_used. Needs: api_keys (id), (user_id), users (tenant_id).
UPDATE keyproxy.api_keys AS k
SET revoked_at = now(), revoke_reason = nullif($3, '')
WHERE k.id = ANY (ARRAY(
    SELECT o.id
    FROM keyproxy.api_keys AS o
    JOIN keyproxy.users AS u ON u.id = o.user_id
    WHERE o.id > $1 AND o.revoked_at IS NULL
      AND ($4::text IS NULL OR o.user_id = $4)
      AND ($5::text IS NULL OR u.tenant_id = $5)
      AND ($6::interval IS NULL OR o.created_at < now() - $6)
      AND ($7::interval IS NULL OR coalesce(o.last_used_at, o.created_at) < now() - $7)
    ORDER BY o.id
    LIMIT $2
    FOR NO KEY UPDATE OF o
))
RETURNING k.id;

-- name: count_to_revoke
-- How many keys revoke_keys would revoke. Same parameters, without the first three.
SELECT count(*) AS keys
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
WHERE k.revoked_at IS NULL
  AND ($1::text IS NULL OR k.user_id = $1)
  AND ($2::text IS NULL OR u.tenant_id = $2)
  AND ($3::interval IS NULL OR k.created_at < now() - $3)
  AND ($4::interval IS NULL OR coalesce(k.last_used_at, k.created_at) < now() - $4);

-- name: key_of_digest
SELECT id FROM keyproxy.api_keys WHERE digest = $1;

-- name: keys_of_digests
-- The keys with one of the digests $1; of one tenant $2, if not null. Needs: api_keys (digest).
SELECT k.id, k.digest
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
WHERE k.digest = ANY($1::bytea[]) AND ($2::text IS NULL OR u.tenant_id = $2);

-- name: keys_matching
-- Keys with the id, name or hint $1, or with a hint that begins with $2 and ends with $3 if one of these is not empty;
-- of one tenant $4, if not null. At most $5, in the order of their ids. Reads the whole table, since only operators run
-- this, and rarely.
SELECT k.id
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
WHERE ($4::text IS NULL OR u.tenant_id = $4)
  AND (k.id = $1 OR k.name = $1 OR k.hint = $1
       OR ($2::text <> '' OR $3::text <> '') AND starts_with(k.hint, $2) AND right(k.hint, length($3)) = $3)
ORDER BY k.id
LIMIT $5;

-- name: revoke_leaked
-- Revokes the keys $1 for the reason $2; of one tenant $3, if not null. One row for each that was not revoked before.
-- Without a join of the two steps, as mark_used. Needs: api_keys (id).
UPDATE keyproxy.api_keys AS k
SET revoked_at = now(), revoke_reason = nullif($2, '')
WHERE k.id = ANY (ARRAY(
    SELECT o.id
    FROM keyproxy.api_keys AS o
    JOIN keyproxy.users AS u ON u.id = o.user_id
    WHERE o.id = ANY ($1::text[]) AND o.revoked_at IS NULL AND ($3::text IS NULL OR u.tenant_id = $3)
    ORDER BY o.id
    FOR NO KEY UPDATE OF o
))
RETURNING k.id;

-- name: foreign_prefixes
-- Those of the prefixes $1 with an imported key that has not been used yet; of one tenant $2, if not null.
-- Needs: foreign_hashes (prefix), api_keys (id).
SELECT f.prefix
FROM keyproxy.foreign_hashes AS f
JOIN keyproxy.api_keys AS k ON k.id = f.key_id
JOIN keyproxy.users AS u ON u.id = k.user_id
WHERE f.prefix = ANY($1::text[]) AND f.hashed IS NOT NULL AND ($2::text IS NULL OR u.tenant_id = $2);

-- name: delete_key
DELETE FROM keyproxy.api_keys WHERE id = $1;

-- name: agent
-- The agent $2 of the user $1, with the number of its live tokens. Needs: agents (user_id, id), agent_tokens (user_id,
-- agent_id).
SELECT a.user_id, a.id, u.tenant_id, a.roles, a.plan_id, a.disabled_at, a.created_at,
       (SELECT count(*) FROM keyproxy.agent_tokens AS t
        WHERE t.user_id = a.user_id AND t.agent_id = a.id AND t.revoked_at IS NULL AND t.expires_at > now()) AS tokens
FROM keyproxy.agents AS a
JOIN keyproxy.users AS u ON u.id = a.user_id
WHERE a.user_id = $1 AND a.id = $2;

-- name: agents
-- The agents of the user $1 in the order of their ids, after $2, at most $3. As agent.
SELECT a.user_id, a.id, u.tenant_id, a.roles, a.plan_id, a.disabled_at, a.created_at,
       (SELECT count(*) FROM keyproxy.agent_tokens AS t
        WHERE t.user_id = a.user_id AND t.agent_id = a.id AND t.revoked_at IS NULL AND t.expires_at > now()) AS tokens
FROM keyproxy.agents AS a
JOIN keyproxy.users AS u ON u.id = a.user_id
WHERE a.user_id = $1 AND a.id > $2
ORDER BY a.id
LIMIT $3;

-- name: hold_agent
-- Locks the agent, its user first: the same order as deleting the user, to avoid deadlocks.
WITH owner AS MATERIALIZED (
    SELECT u.id FROM keyproxy.users AS u WHERE u.id = $1 FOR KEY SHARE OF u
)
SELECT a.id
FROM keyproxy.agents AS a
JOIN owner ON owner.id = a.user_id
WHERE a.user_id = $1 AND a.id = $2
FOR NO KEY UPDATE OF a;

-- name: change_agent
-- As change_tenant.
UPDATE keyproxy.agents AS a
SET plan_id = CASE WHEN c.change ? 'plan' THEN c.change ->> 'plan' ELSE a.plan_id END,
    roles = CASE WHEN c.change ->> 'roles' IS NOT NULL THEN ARRAY(SELECT jsonb_array_elements_text(c.change -> 'roles'))
                 WHEN c.change ? 'roles' THEN NULL
                 ELSE a.roles END,
    disabled_at = CASE WHEN (c.change ->> 'disabled')::boolean THEN coalesce(a.disabled_at, now())
                       WHEN NOT (c.change ->> 'disabled')::boolean THEN NULL
                       ELSE a.disabled_at END
FROM (SELECT $3::text::jsonb AS change) AS c
WHERE a.user_id = $1 AND a.id = $2;

-- name: revoke_tokens_of_agent
-- Revokes, for the reason $3, the live tokens of the agent $2 of the user $1. One row for each. Tokens minted from them end
-- with them. Without a join of the two steps, as mark_used. Needs: agent_tokens (user_id, agent_id), agent_tokens (id).
UPDATE keyproxy.agent_tokens AS t
SET revoked_at = now(), revoke_reason = nullif($3, '')
WHERE t.id = ANY (ARRAY(
    SELECT o.id
    FROM keyproxy.agent_tokens AS o
    WHERE o.user_id = $1 AND o.agent_id = $2 AND o.revoked_at IS NULL AND o.expires_at > now()
    ORDER BY o.id
    FOR NO KEY UPDATE OF o
))
RETURNING t.id;

-- name: agent_token
-- Needs: agent_tokens (id), users (id), api_keys (id).
SELECT t.id, t.agent_id, t.user_id, u.tenant_id, t.root_key_id, t.actor_user_id, t.parent_token_id, t.scopes, t.audience,
       t.token_budget, t.request_budget, t.depth, k.is_test, t.created_at, t.expires_at, t.revoked_at, t.revoke_reason
FROM keyproxy.agent_tokens AS t
JOIN keyproxy.users AS u ON u.id = t.user_id
JOIN keyproxy.api_keys AS k ON k.id = t.root_key_id
WHERE t.id = $1;

-- name: hold_agent_token
-- Locks the token; its user first, as hold_agent.
WITH owner AS MATERIALIZED (
    SELECT u.id
    FROM keyproxy.agent_tokens AS t
    JOIN keyproxy.users AS u ON u.id = t.user_id
    WHERE t.id = $1
    FOR KEY SHARE OF u
)
SELECT t.id
FROM keyproxy.agent_tokens AS t
JOIN owner ON owner.id = t.user_id
WHERE t.id = $1
FOR NO KEY UPDATE OF t;

-- name: revoke_agent_token
-- A token that is revoked already keeps its time and reason.
UPDATE keyproxy.agent_tokens
SET revoked_at = now(), revoke_reason = nullif($2, '')
WHERE id = $1 AND revoked_at IS NULL
RETURNING id;

-- name: agent_tokens_of_digests
-- The agent tokens with one of the digests $1; of one tenant $2, if not null. Needs: agent_tokens (digest).
SELECT t.id, t.digest
FROM keyproxy.agent_tokens AS t
JOIN keyproxy.users AS u ON u.id = t.user_id
WHERE t.digest = ANY($1::bytea[]) AND ($2::text IS NULL OR u.tenant_id = $2);

-- name: revoke_leaked_tokens
-- As revoke_leaked, for the agent tokens $1. Needs: agent_tokens (id).
UPDATE keyproxy.agent_tokens AS t
SET revoked_at = now(), revoke_reason = nullif($2, '')
WHERE t.id = ANY (ARRAY(
    SELECT o.id
    FROM keyproxy.agent_tokens AS o
    JOIN keyproxy.users AS u ON u.id = o.user_id
    WHERE o.id = ANY ($1::text[]) AND o.revoked_at IS NULL AND ($3::text IS NULL OR u.tenant_id = $3)
    ORDER BY o.id
    FOR NO KEY UPDATE OF o
))
RETURNING t.id;

-- name: create_plan
-- No row if a plan of this name exists.
INSERT INTO keyproxy.plans (id, limits) VALUES ($1, $2::text::jsonb) ON CONFLICT (id) DO NOTHING RETURNING id;

-- name: set_plan
-- Replaces all limits of the plan by $2.
UPDATE keyproxy.plans SET limits = $2::text::jsonb WHERE id = $1;

-- name: plan
-- The plan with the numbers of tenants, users, keys, agents and grants that have it. Needs: the plan_id indexes.
SELECT p.id, p.limits::text AS limits, p.created_at,
       (SELECT count(*) FROM keyproxy.tenants AS t WHERE p.id IN (t.plan_id, t.test_plan_id)) AS tenants,
       (SELECT count(*) FROM keyproxy.users AS u WHERE p.id IN (u.plan_id, u.test_plan_id)) AS users,
       (SELECT count(*) FROM keyproxy.api_keys AS k WHERE k.plan_id = p.id) AS keys,
       (SELECT count(*) FROM keyproxy.agents AS a WHERE a.plan_id = p.id) AS agents,
       (SELECT count(*) FROM keyproxy.oauth_grants AS g WHERE g.plan_id = p.id) AS grants
FROM keyproxy.plans AS p
WHERE p.id = $1;

-- name: plans
-- In the order of their names, after $1, at most $2.
SELECT p.id, p.limits::text AS limits, p.created_at,
       (SELECT count(*) FROM keyproxy.tenants AS t WHERE p.id IN (t.plan_id, t.test_plan_id)) AS tenants,
       (SELECT count(*) FROM keyproxy.users AS u WHERE p.id IN (u.plan_id, u.test_plan_id)) AS users,
       (SELECT count(*) FROM keyproxy.api_keys AS k WHERE k.plan_id = p.id) AS keys,
       (SELECT count(*) FROM keyproxy.agents AS a WHERE a.plan_id = p.id) AS agents,
       (SELECT count(*) FROM keyproxy.oauth_grants AS g WHERE g.plan_id = p.id) AS grants
FROM keyproxy.plans AS p
WHERE p.id > $1
ORDER BY p.id
LIMIT $2;

-- name: hold_plan
SELECT id FROM keyproxy.plans WHERE id = $1 FOR UPDATE;

-- name: delete_plan
DELETE FROM keyproxy.plans WHERE id = $1;

-- name: create_role
-- No row if a role of this name exists.
INSERT INTO keyproxy.roles (id, scopes) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING RETURNING id;

-- name: set_role
UPDATE keyproxy.roles SET scopes = $2 WHERE id = $1;

-- name: role
-- The role with the numbers of tenants, users, keys and agents that have it. Needs: the roles indexes.
SELECT r.id, r.scopes, r.created_at,
       (SELECT count(*) FROM keyproxy.tenants AS t WHERE t.roles IS NOT NULL AND t.roles @> ARRAY[r.id]) AS tenants,
       (SELECT count(*) FROM keyproxy.users AS u WHERE u.roles IS NOT NULL AND u.roles @> ARRAY[r.id]) AS users,
       (SELECT count(*) FROM keyproxy.api_keys AS k WHERE k.roles <> '{}' AND k.roles @> ARRAY[r.id]) AS keys,
       (SELECT count(*) FROM keyproxy.agents AS a WHERE a.roles IS NOT NULL AND a.roles @> ARRAY[r.id]) AS agents
FROM keyproxy.roles AS r
WHERE r.id = $1;

-- name: roles
-- In the order of their names, after $1, at most $2. As role.
SELECT r.id, r.scopes, r.created_at,
       (SELECT count(*) FROM keyproxy.tenants AS t WHERE t.roles IS NOT NULL AND t.roles @> ARRAY[r.id]) AS tenants,
       (SELECT count(*) FROM keyproxy.users AS u WHERE u.roles IS NOT NULL AND u.roles @> ARRAY[r.id]) AS users,
       (SELECT count(*) FROM keyproxy.api_keys AS k WHERE k.roles <> '{}' AND k.roles @> ARRAY[r.id]) AS keys,
       (SELECT count(*) FROM keyproxy.agents AS a WHERE a.roles IS NOT NULL AND a.roles @> ARRAY[r.id]) AS agents
FROM keyproxy.roles AS r
WHERE r.id > $1
ORDER BY r.id
LIMIT $2;

-- name: hold_role
SELECT id FROM keyproxy.roles WHERE id = $1 FOR UPDATE;

-- name: hold_roles
-- Locks the existing roles of $1 against changes, in the order of their ids, so that concurrent calls do not deadlock.
SELECT id FROM keyproxy.roles WHERE id = ANY($1::text[]) ORDER BY id FOR SHARE;

-- name: delete_role
DELETE FROM keyproxy.roles WHERE id = $1;

-- name: key_with_too_many_scopes
-- The first key with more than $5 effective scopes: among the keys $1, those of the user $2, of the tenant $3, and those that
-- the role $4 concerns, also as a ceiling; where not null. A key without roles has at most 64. The first condition does not
-- depend on a row: nothing else is read while all roles together have no more than 64. Needs: api_keys (id), (user_id).
SELECT c.id, c.scopes
FROM (
    SELECT k.id, cardinality(keyproxy.effective_scopes(k.scopes, k.roles, u.roles, t.roles)) AS scopes
    FROM keyproxy.api_keys AS k
    JOIN keyproxy.users AS u ON u.id = k.user_id
    JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
    WHERE (SELECT count(DISTINCT s.scope) FROM keyproxy.roles AS r CROSS JOIN unnest(r.scopes) AS s (scope)) > 64
      AND k.roles <> '{}'
      AND ($1::text[] IS NULL OR k.id = ANY ($1))
      AND ($2::text IS NULL OR k.user_id = $2)
      AND ($3::text IS NULL OR u.tenant_id = $3)
      AND ($4::text IS NULL OR k.roles @> ARRAY[$4] OR u.roles @> ARRAY[$4] OR t.roles @> ARRAY[$4])
) AS c
WHERE c.scopes > $5::int
ORDER BY c.id
LIMIT 1;

-- name: scopes_above_ceilings
-- The scopes of the keys $1 that a ceiling of their user or tenant excludes, at most 100. Needs: api_keys (id).
SELECT DISTINCT c.kind, c.owner, s.scope
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
CROSS JOIN LATERAL (VALUES ('user', u.id, u.roles), ('tenant', t.id, t.roles)) AS c (kind, owner, roles)
CROSS JOIN LATERAL (
    SELECT unnest(keyproxy.effective_scopes(k.scopes, k.roles, NULL, NULL)) AS scope
    EXCEPT
    SELECT unnest(keyproxy.scopes_of_roles(c.roles))
) AS s
WHERE k.id = ANY ($1::text[]) AND c.roles IS NOT NULL
ORDER BY 1, 2, 3
LIMIT 100;

-- name: acting_without_plan
-- The tenants of those of the keys $1 that act for users of their tenant while neither the key nor the tenant has a plan.
-- Needs: api_keys (id).
SELECT DISTINCT t.id
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
WHERE k.id = ANY ($1::text[]) AND k.acts_for <> 'none' AND k.plan_id IS NULL
  AND CASE WHEN k.is_test THEN coalesce(t.test_plan_id, t.plan_id) ELSE t.plan_id END IS NULL
ORDER BY t.id;

-- name: authority_of_key
-- What the key or OAuth session $1 has, and what the ceilings of its user and tenant allow; null: there is no ceiling.
SELECT k.scopes AS key_scopes, k.roles, keyproxy.scopes_of_roles(u.roles) AS user_ceiling,
       keyproxy.scopes_of_roles(t.roles) AS tenant_ceiling
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
WHERE k.id = $1
UNION ALL
SELECT s.scopes, '{}', keyproxy.scopes_of_roles(u.roles), keyproxy.scopes_of_roles(t.roles)
FROM keyproxy.oauth_sessions AS s
JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
WHERE s.id = $1;

-- name: add_owned
-- No row if the id has an owner.
INSERT INTO keyproxy.owned (kind, id, tenant_id) VALUES ($1, $2, $3) ON CONFLICT (kind, id) DO NOTHING RETURNING id;

-- name: owned
SELECT o.kind, o.id, o.tenant_id, o.created_at FROM keyproxy.owned AS o WHERE o.kind = $1 AND o.id = $2;

-- name: hold_owned
-- As owned; locks the row until the transaction ends.
SELECT o.kind, o.id, o.tenant_id, o.created_at FROM keyproxy.owned AS o WHERE o.kind = $1 AND o.id = $2 FOR UPDATE;

-- name: remove_owned
DELETE FROM keyproxy.owned WHERE kind = $1 AND id = $2;

-- name: owned_ids
-- In the order of kind and id, after the kind $1 and id $2, at most $3; of one kind $4, of one tenant $5, where not null.
-- Needs: owned (kind, id), owned (tenant_id, kind, id).
SELECT o.kind, o.id, o.tenant_id, o.created_at
FROM keyproxy.owned AS o
WHERE (o.kind, o.id) > ($1, $2) AND ($4::text IS NULL OR o.kind = $4) AND ($5::text IS NULL OR o.tenant_id = $5)
ORDER BY o.kind, o.id
LIMIT $3;

-- name: audit
-- Rows after $1, at most $2, in the order in which they were written; of one entity type $3, one entity $4, one tenant
-- $5; by one actor $6; of one action $7; from $8 until before $9; by one login role $10, where not null. None after $11.
-- Needs: audit_log (id), (entity, entity_id, id), (tenant_id, id).
SELECT id, at, actor, origin, action, entity, entity_id, tenant_id, db_role, before::text AS before, after::text AS after
FROM keyproxy.audit_log
WHERE id > $1 AND id <= $11
  AND ($3::text IS NULL OR entity = $3)
  AND ($4::text IS NULL OR entity_id = $4)
  AND ($5::text IS NULL OR tenant_id = $5)
  AND ($6::text IS NULL OR actor = $6)
  AND ($7::text IS NULL OR action = $7)
  AND ($8::timestamptz IS NULL OR at >= $8)
  AND ($9::timestamptz IS NULL OR at < $9)
  AND ($10::text IS NULL OR db_role = $10)
ORDER BY id
LIMIT $2;

-- name: audit_newest
-- As audit, backwards: rows before $1.
SELECT id, at, actor, origin, action, entity, entity_id, tenant_id, db_role, before::text AS before, after::text AS after
FROM keyproxy.audit_log
WHERE id < $1
  AND ($3::text IS NULL OR entity = $3)
  AND ($4::text IS NULL OR entity_id = $4)
  AND ($5::text IS NULL OR tenant_id = $5)
  AND ($6::text IS NULL OR actor = $6)
  AND ($7::text IS NULL OR action = $7)
  AND ($8::timestamptz IS NULL OR at >= $8)
  AND ($9::timestamptz IS NULL OR at < $9)
  AND ($10::text IS NULL OR db_role = $10)
ORDER BY id DESC
LIMIT $2;

-- name: audit_horizon
-- The newest serial number of the audit log, and the first transaction that has not begun. Once all earlier
-- transactions have ended, the rows up to this number are complete.
SELECT (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM keyproxy.audit_log_id_seq) AS newest,
       pg_snapshot_xmax(pg_current_snapshot())::text AS not_begun;

-- name: have_all_ended
-- Whether all transactions before $1 have ended.
SELECT pg_snapshot_xmin(pg_current_snapshot()) >= $1::text::xid8 AS have_ended;

-- name: import_users
-- Creates the users $1 of tenants $2 that do not exist yet.
INSERT INTO keyproxy.users (id, tenant_id)
SELECT DISTINCT ON (w.id) w.id, w.tenant_id
FROM unnest($1::text[], $2::text[]) AS w (id, tenant_id)
JOIN keyproxy.tenants AS t ON t.id = w.tenant_id
ORDER BY w.id
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: plans_there
SELECT id FROM keyproxy.plans WHERE id = ANY($1::text[]);

-- name: imported_already
-- Those of the digests $1, prefixes $2 and ids $3 that exist, with the owners of their keys.
-- Needs: api_keys (digest), api_keys (id), foreign_hashes (prefix).
SELECT 'digest' AS known_by, encode(k.digest, 'hex') AS value, k.user_id
FROM keyproxy.api_keys AS k WHERE k.digest = ANY($1::bytea[])
UNION ALL
SELECT 'prefix', p.prefix, k.user_id
FROM keyproxy.foreign_hashes AS p JOIN keyproxy.api_keys AS k ON k.id = p.key_id WHERE p.prefix = ANY($2::text[])
UNION ALL
SELECT 'id', k.id, k.user_id FROM keyproxy.api_keys AS k WHERE k.id = ANY($3::text[]);

-- name: import_keys
-- Imports keys that another program issued, described by the JSON array $1. A key of a foreign format has no digest
-- yet: until its first use the column contains a value that matches no key. Needs: api_keys (digest).
WITH wanted AS MATERIALIZED (
    SELECT * FROM jsonb_to_recordset($1::text::jsonb) AS w (
        id text, user_id text, digest text, hint text, name text, scopes text[], is_test boolean, plan text,
        created_at timestamptz, expires_at timestamptz, is_revoked boolean, prefix text, hashed text, roles text[],
        acts_for text
    )
), made AS (
    INSERT INTO keyproxy.api_keys (
        id, user_id, digest, hint, name, scopes, is_test, plan_id, created_at, expires_at, revoked_at, revoke_reason,
        roles, acts_for
    )
    SELECT w.id, w.user_id, decode(w.digest, 'hex'), w.hint, w.name, w.scopes, w.is_test, w.plan,
           coalesce(w.created_at, now()), w.expires_at, CASE WHEN w.is_revoked THEN now() END,
           CASE WHEN w.is_revoked THEN 'revoked before it was imported' END, w.roles, coalesce(w.acts_for, 'none')
    FROM wanted AS w
    RETURNING id
), hashes AS (
    INSERT INTO keyproxy.foreign_hashes (prefix, key_id, hashed)
    SELECT w.prefix, made.id, w.hashed FROM wanted AS w JOIN made ON made.id = w.id WHERE w.prefix IS NOT NULL
)
SELECT id FROM made;

-- name: foreign_recipe
-- The hash parameters of the foreign key with this prefix: algorithm, rounds and salt, without the hash. No row: no
-- such key.
SELECT recipe FROM keyproxy.foreign_recipe($1) AS recipe WHERE recipe IS NOT NULL;

-- name: adopt_foreign
-- Stores the digest $3 of the key with the prefix $1, if $2 is its hash. Returns its id; otherwise no row.
SELECT key_id FROM keyproxy.adopt_foreign($1, $2, $3) AS key_id WHERE key_id IS NOT NULL;

-- name: key_of_foreign
-- The key with the prefix $1, if $2 is its hash.
SELECT key_id AS id FROM keyproxy.foreign_hashes WHERE prefix = $1 AND hashed = $2;

-- name: sync_leases
-- One message of a holder to the ledger, by the rules of limits/ledger/rules.py. $1 holder, $2 serial, $3 lease
-- seconds, $4 the percentages of alerts, then the lines by column.
SELECT * FROM keyproxy.sync_leases($1, $2, $3, (
    SELECT coalesce(array_agg(l::keyproxy.lease_report), '{}')
    FROM unnest(
        $5::int8[], $6::text[], $7::text[], $8::bool[], $9::text[], $10::text[], $11::int8[], $12::int8[], $13::float8[],
        $14::int8[], $15::int8[], $16::int8[], $17::int8[], $18::int8[], $19::int8[], $20::bool[], $21::float8[]
    ) AS l (lease, pool_kind, pool_id, is_test, measure, selector, starts, bound, interval_seconds, granted, used, returned,
            want, at_least, most, is_closing, granted_at)
), $4::int[]);

-- name: end_holders
SELECT keyproxy.end_holders($1) AS ended;

-- name: reap_holders
-- Ends expired holders and charges at most $1 of their leases; returns 0 when nothing is left to do.
SELECT keyproxy.reap_holders() AS done FROM set_config('keyproxy.portion', $1::int::text, true);

-- name: forget_holders
-- Deletes holders that ended long ago, at most $1. Needs: lease_holders (ended_at).
SELECT keyproxy.forget_holders($1) AS gone;

-- name: forget_windows
-- Deletes unused rates and slots among the next $2 windows after $1: see the function. Needs: windows (id).
SELECT next, gone FROM keyproxy.forget_windows($1, $2);

-- name: ledger_id
-- The id of this ledger.
SELECT id FROM keyproxy.ledger;

-- name: windows_now
-- The state of the current windows by pool kind $1, id $2, mode $3, measure $4 and selector $5; unused windows yield no
-- row. Needs: windows (pool_kind, pool_id, is_test, measure, starts, selector).
SELECT a.number, w.spent, w.held, w.forfeited,
       keyproxy.window_end(w.measure, w.starts) - extract(epoch FROM clock_timestamp())::float8 AS ends_seconds,
       greatest(0, w.theoretical - extract(epoch FROM clock_timestamp())::float8) AS ahead_seconds,
       w.credited
FROM unnest($1::text[], $2::text[], $3::bool[], $4::text[], $5::text[])
    WITH ORDINALITY AS a (pool_kind, pool_id, is_test, measure, selector, number)
JOIN keyproxy.windows AS w
  ON (w.pool_kind, w.pool_id, w.is_test, w.measure, w.selector) = (a.pool_kind, a.pool_id, a.is_test, a.measure, a.selector)
 AND w.starts = keyproxy.window_start(a.measure, extract(epoch FROM clock_timestamp())::float8);

-- name: credit_window
-- Changes the limit of the current window of a pool: see the function. $1 to $5 pool kind, id, mode, measure and selector,
-- $6 the plan's limit, $7 the amount, $8 the reason.
SELECT c.id, c.credited, c.spent, c.held, to_timestamp(c.starts) AS window_starts,
       to_timestamp(keyproxy.window_end($4::text, c.starts)) AS window_ends
FROM keyproxy.credit_window($1, $2, $3, $4, $5, $6, $7, $8) AS c;

-- name: limits_of_tenant_pool
-- The pool of the tenant $1, for test traffic if $2, with the limits of its plan. No row: no such tenant.
SELECT t.id AS pool_id, t.id AS tenant_id, $2::bool AS is_test, p.limits
FROM keyproxy.tenants AS t
LEFT JOIN keyproxy.plans AS p ON p.id = CASE WHEN $2 THEN coalesce(t.test_plan_id, t.plan_id) ELSE t.plan_id END
WHERE t.id = $1;

-- name: limits_of_user_pool
-- As limits_of_tenant_pool, of the user $1.
SELECT u.id AS pool_id, u.tenant_id, $2::bool AS is_test, p.limits
FROM keyproxy.users AS u
LEFT JOIN keyproxy.plans AS p ON p.id = CASE WHEN $2 THEN coalesce(u.test_plan_id, u.plan_id) ELSE u.plan_id END
WHERE u.id = $1;

-- name: limits_of_key_pool
-- As limits_of_tenant_pool, of the key $1, which shares its pool with the keys that it replaces, or of the OAuth grant or
-- session $1. $2 has no effect: each has one mode. Needs: api_keys (id), oauth_grants (id), oauth_sessions (id).
SELECT coalesce(k.lineage, k.id) AS pool_id, u.tenant_id, k.is_test, p.limits
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
LEFT JOIN keyproxy.plans AS p ON p.id = k.plan_id
WHERE k.id = $1 AND $2::bool IS NOT NULL
UNION ALL
SELECT g.id, u.tenant_id, g.is_test, p.limits
FROM keyproxy.oauth_grants AS g
JOIN keyproxy.users AS u ON u.id = g.user_id
LEFT JOIN keyproxy.plans AS p ON p.id = g.plan_id
WHERE g.id = coalesce((SELECT s.grant_id FROM keyproxy.oauth_sessions AS s WHERE s.id = $1), $1);

-- name: create_admin_token
INSERT INTO keyproxy.admin_tokens (id, digest, hint, name, scopes, tenant_id, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, now() + $7::interval)
RETURNING id;

-- name: admin_tokens
-- In the order of their ids, after $1, at most $2; only $3 if that is not null.
SELECT a.id, a.hint, a.name, a.scopes, a.tenant_id, a.created_at, a.expires_at, a.revoked_at, a.last_used_at,
       CASE WHEN a.revoked_at IS NOT NULL THEN 'revoked'
            WHEN a.expires_at <= now() THEN 'expired'
            WHEN t.disabled_at IS NOT NULL THEN 'disabled'
            ELSE 'active' END AS state
FROM keyproxy.admin_tokens AS a
LEFT JOIN keyproxy.tenants AS t ON t.id = a.tenant_id
WHERE a.id > $1 AND ($3::text IS NULL OR a.id = $3)
ORDER BY a.id
LIMIT $2;

-- name: present_admin_token
-- The permissions of the token with the digest $1; no row if there is none. Records to the minute when it was last
-- used.
WITH noted AS (
    UPDATE keyproxy.admin_tokens AS a SET last_used_at = now()
    WHERE a.digest = $1 AND a.revoked_at IS NULL AND (a.expires_at IS NULL OR a.expires_at > now())
      AND (a.last_used_at IS NULL OR a.last_used_at < now() - interval '1 minute')
)
SELECT a.id, a.hint, a.name, a.scopes, a.tenant_id, a.created_at, a.expires_at, a.revoked_at, a.last_used_at,
       CASE WHEN a.revoked_at IS NOT NULL THEN 'revoked'
            WHEN a.expires_at <= now() THEN 'expired'
            WHEN t.disabled_at IS NOT NULL THEN 'disabled'
            ELSE 'active' END AS state
FROM keyproxy.admin_tokens AS a
LEFT JOIN keyproxy.tenants AS t ON t.id = a.tenant_id
WHERE a.digest = $1;

-- name: revoke_admin_token
-- Revokes the token permanently. No row: no such token.
UPDATE keyproxy.admin_tokens SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1
RETURNING id;

-- name: is_there_a_working_admin_token
SELECT EXISTS (
    SELECT FROM keyproxy.admin_tokens
    WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
) AS is_there;

-- name: claim_request
-- Takes a lock on the request $1 (64 bits of its key); false if another transaction has it.
SELECT pg_try_advisory_xact_lock($1::int8) AS is_claimed;

-- name: answered_request
-- The stored response to the request with the key $2 of the token $1. Needs: answered_requests (token_id, request_key).
SELECT fingerprint, answer::text AS answer FROM keyproxy.answered_requests WHERE token_id = $1 AND request_key = $2;

-- name: keep_answer
INSERT INTO keyproxy.answered_requests (token_id, request_key, fingerprint, answer)
VALUES ($1, $2, $3, $4::text::jsonb);

-- name: forget_answers
-- Deletes a few responses older than $1: each stored one removes more than it adds.
-- Needs: answered_requests (at).
DELETE FROM keyproxy.answered_requests AS a
USING (
    SELECT token_id, request_key FROM keyproxy.answered_requests WHERE at < now() - $1::interval
    ORDER BY at LIMIT 10 FOR UPDATE SKIP LOCKED
) AS old
WHERE (a.token_id, a.request_key) = (old.token_id, old.request_key);

-- name: claim_charges
-- Applies a batch of claims exactly once: see the function. $1 process, $2 batch, the claims by column, and $6 how many
-- repeats a charge covers.
SELECT is_first, charged FROM keyproxy.claim_charges($1, $2, $3::bytea[], $4::int8[], $5::int8[], $6);

-- name: cover_repeats
-- Those of the fingerprints $1, one for each request, that a charge of the last 24 hours covers, if each covers $2
-- repeats: see the function. Needs: idempotent_charges (fingerprint).
SELECT fingerprint, tokens, covered FROM keyproxy.cover_repeats($1::bytea[], $2);

-- name: forget_charges
-- Deletes at most $1 expired charges: see the function. Needs: idempotent_charges (charged_at).
SELECT keyproxy.forget_charges($1) AS gone;

-- name: forget_claim_batches
-- Deletes the last results of at most $1 processes that have not sent a batch for a day; one row for each. No index:
-- the table has one row per process of the last day, and every batch changes told_at.
DELETE FROM keyproxy.claim_batches WHERE ctid = ANY (ARRAY(
    SELECT b.ctid FROM keyproxy.claim_batches AS b WHERE b.told_at < clock_timestamp() - interval '1 day'
    LIMIT $1 FOR UPDATE SKIP LOCKED
)) RETURNING 1;

-- name: record_usage
-- Writes a batch of usage exactly once: see the function. $1 process, $2 batch, then the sums by column, each an array as
-- text, and events as JSON.
SELECT keyproxy.record_usage(
    $1, $2, $3::text::date[], $4::text::text[], $5::text::text[], $6::text::text[], $7::text::bool[], $8::text::text[],
    $9::text::text[], $10::text::int8[], $11::text::int8[], $12::text::int8[], $13::text::int8[], $14::text::int8[],
    $15::text::int8[], $16::text::int8[], $17::text::int8[], $18::text::int8[], $19::text::json
) AS is_new;

-- name: tend_usage
-- Deletes events after $1 days and sums after $2; at most $3 rows per call.
SELECT keyproxy.tend_usage($1, $2, $3) AS is_more;

-- name: usage_by
-- Sums grouped by the dimensions $1, of one tenant $2, user $3, key $4, from the day $5 until before $6, where not
-- null; at most $7 rows. See the function.
SELECT * FROM keyproxy.usage_by($1::text[], $2::text, $3::text, $4::text, $5::date, $6::date, $7::int);

-- name: usage_after
-- Rows after the one with the key $1 to $7, at most $13; $8 to $12 are the filters $2 to $6 of usage_by. See the function.
SELECT * FROM keyproxy.usage_after(
    $1::date, $2::text, $3::text, $4::text, $5::bool, $6::text, $7::text, $8::text, $9::text, $10::text, $11::date, $12::date,
    $13::int
);

-- name: event_batches
-- Batches of events after the serial $1 and up to $2, written on the day $3 or later, at most $4.
-- Needs: usage_event_batches (serial, day), in each partition.
SELECT b.serial, b.process, b.batch, b.events::text AS events
FROM keyproxy.usage_event_batches AS b
WHERE b.serial > $1 AND b.serial <= $2 AND b.day >= $3
ORDER BY b.serial
LIMIT $4;

-- name: event_batch_serial
-- Needs: usage_event_batches (process, batch), in each partition.
SELECT b.serial FROM keyproxy.usage_event_batches AS b WHERE b.process = $1 AND b.batch = $2;

-- name: event_horizon
-- The newest serial, and the first transaction that has not begun: see audit_horizon.
SELECT (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM keyproxy.usage_event_serial) AS newest,
       pg_snapshot_xmax(pg_current_snapshot())::text AS not_begun;

-- name: digest_of_key
-- The digest of a key, or of the newest access token of an OAuth session: the parameter of identities_by_digest or access_token_identities.
-- Needs: api_keys (id), oauth_access_tokens (session_id, expires_at).
SELECT k.digest FROM keyproxy.api_keys AS k WHERE k.id = $1
UNION ALL (
    SELECT a.digest FROM keyproxy.oauth_access_tokens AS a WHERE a.session_id = $1 ORDER BY a.expires_at DESC LIMIT 1
);

-- name: digest_of_agent_token
-- The digest of an agent token, the parameter of agent_token_identities.
SELECT t.digest FROM keyproxy.agent_tokens AS t WHERE t.id = $1;

-- name: ceiling_of_user
-- What the ceiling of the user $1 allows; null: there is no ceiling.
SELECT keyproxy.scopes_of_roles(u.roles) AS ceiling FROM keyproxy.users AS u WHERE u.id = $1;

-- name: limits_of_user
-- The limits of the user $1 and of its tenant, for test traffic if $2.
SELECT u.id AS user_id, t.id AS tenant_id, up.limits AS user_limits, tp.limits AS tenant_limits
FROM keyproxy.users AS u
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
LEFT JOIN keyproxy.plans AS up ON up.id = CASE WHEN $2 THEN coalesce(u.test_plan_id, u.plan_id) ELSE u.plan_id END
LEFT JOIN keyproxy.plans AS tp ON tp.id = CASE WHEN $2 THEN coalesce(t.test_plan_id, t.plan_id) ELSE t.plan_id END
WHERE u.id = $1;

-- name: pools_of_agents
-- The pools of the agents with a plan and of the live tokens with a budget of the user $1, for test traffic if $2; of tokens
-- those that expire last, at most $3. Needs: agents (user_id, id); agent_tokens (user_id, agent_id).
(
    SELECT 'agent' AS kind, a.user_id || '/' || a.id AS owner, p.limits, NULL::bigint AS token_budget,
           NULL::bigint AS request_budget
    FROM keyproxy.agents AS a JOIN keyproxy.plans AS p ON p.id = a.plan_id
    WHERE a.user_id = $1 ORDER BY a.id
) UNION ALL (
    SELECT 'token', t.id, NULL, t.token_budget, t.request_budget
    FROM keyproxy.agent_tokens AS t JOIN keyproxy.api_keys AS k ON k.id = t.root_key_id
    WHERE t.user_id = $1 AND k.is_test = $2 AND t.expires_at > now() AND t.revoked_at IS NULL
      AND num_nonnulls(t.token_budget, t.request_budget) > 0
    ORDER BY t.expires_at DESC, t.id LIMIT $3
);

-- name: count_expiring_keys
-- How many keys expire within each of the days $1, by mode. Needs: api_keys (expires_at), (replaces).
SELECT d.days, m.is_test, count(k.id) AS keys
FROM unnest($1::int[]) AS d (days)
CROSS JOIN (VALUES (false), (true)) AS m (is_test)
LEFT JOIN (
    SELECT e.id, e.is_test, e.expires_at FROM keyproxy.expiring_keys AS e
    WHERE e.expires_at <= now() + (SELECT max(days) FROM unnest($1::int[]) AS days) * interval '24 hours'
) AS k ON k.is_test = m.is_test AND k.expires_at <= now() + d.days * interval '24 hours'
GROUP BY d.days, m.is_test
ORDER BY d.days, m.is_test;

-- name: reminders_due
-- The keys with a reminder that is due and not written, at most $2, for the thresholds $1. A threshold applies to keys
-- that were issued for longer than that. Of several passed thresholds only the one nearest to the expiry applies, so
-- that one key gets no burst of reminders after a pause. Needs: api_keys (expires_at), (replaces); reminders (key_id,
-- expires_at, before_days).
SELECT e.id AS key_id, e.user_id, e.tenant_id, e.hint, e.name, e.is_test, e.expires_at, due.before_days
FROM keyproxy.expiring_keys AS e
CROSS JOIN LATERAL (
    SELECT min(days) AS before_days FROM unnest($1::int[]) AS days
    WHERE e.expires_at <= now() + days * interval '24 hours' AND e.created_at < e.expires_at - days * interval '24 hours'
) AS due
WHERE e.expires_at <= now() + (SELECT max(days) FROM unnest($1::int[]) AS days) * interval '24 hours'
  AND due.before_days IS NOT NULL
  AND NOT EXISTS (
      SELECT FROM keyproxy.reminders AS r
      WHERE r.key_id = e.id AND r.expires_at = e.expires_at AND r.before_days <= due.before_days
  )
ORDER BY e.expires_at, e.id
LIMIT $2;

-- name: write_reminders
-- Writes reminders of the keys $1 that expire at $2, for the thresholds $3. Skips those that a concurrent run has
-- written. The id is derived from these three, so that it is the same in a database that was restored from a backup.
INSERT INTO keyproxy.reminders (id, key_id, expires_at, before_days)
SELECT 'rem_' || left(encode(sha256(convert_to(
           w.key_id || ' ' || extract(epoch FROM w.expires_at)::text || ' ' || w.before_days, 'UTF8'
       )), 'hex'), 32), w.key_id, w.expires_at, w.before_days
FROM unnest($1::text[], $2::timestamptz[], $3::int[]) AS w (key_id, expires_at, before_days)
JOIN keyproxy.api_keys AS k ON k.id = w.key_id
ON CONFLICT (key_id, expires_at, before_days) DO NOTHING
RETURNING id;

-- name: token_reminders_due
-- As reminders_due, for tokens of the admin API, which are few. Needs: reminders (token_id, expires_at, before_days).
SELECT e.id AS token_id, e.tenant_id, e.hint, e.name, e.expires_at, due.before_days
FROM keyproxy.expiring_admin_tokens AS e
CROSS JOIN LATERAL (
    SELECT min(days) AS before_days FROM unnest($1::int[]) AS days
    WHERE e.expires_at <= now() + days * interval '24 hours' AND e.created_at < e.expires_at - days * interval '24 hours'
) AS due
WHERE due.before_days IS NOT NULL
  AND NOT EXISTS (
      SELECT FROM keyproxy.reminders AS r
      WHERE r.token_id = e.id AND r.expires_at = e.expires_at AND r.before_days <= due.before_days
  )
ORDER BY e.expires_at, e.id
LIMIT $2;

-- name: write_token_reminders
-- As write_reminders, for tokens of the admin API.
INSERT INTO keyproxy.reminders (id, token_id, expires_at, before_days)
SELECT 'rem_' || left(encode(sha256(convert_to(
           w.token_id || ' ' || extract(epoch FROM w.expires_at)::text || ' ' || w.before_days, 'UTF8'
       )), 'hex'), 32), w.token_id, w.expires_at, w.before_days
FROM unnest($1::text[], $2::timestamptz[], $3::int[]) AS w (token_id, expires_at, before_days)
JOIN keyproxy.admin_tokens AS a ON a.id = w.token_id
ON CONFLICT (token_id, expires_at, before_days) DO NOTHING
RETURNING id;

-- name: count_expiring_tokens
-- How many tokens of the admin API expire within each of the days $1.
SELECT d.days, count(e.id) AS tokens
FROM unnest($1::int[]) AS d (days)
LEFT JOIN keyproxy.expiring_admin_tokens AS e ON e.expires_at <= now() + d.days * interval '24 hours'
GROUP BY d.days
ORDER BY d.days;

-- name: next_tokens_to_expire
-- At most $1 tokens of the admin API that expire soonest, in Unix time.
SELECT e.id, extract(epoch FROM e.expires_at)::float8 AS expires_at
FROM keyproxy.expiring_admin_tokens AS e
WHERE isfinite(e.expires_at)
ORDER BY e.expires_at, e.id
LIMIT $1;

-- name: claim_reminders
-- Claims at most $1 due reminders; each goes to one caller, which has $2 to send it and record the outcome. Skips
-- reminders of keys and tokens that were revoked, replaced or disabled, or have another expiry now. Needs: reminders
-- (next_at).
WITH free AS (
    SELECT r.id, e.user_id, coalesce(e.tenant_id, t.tenant_id) AS tenant_id, coalesce(e.hint, t.hint) AS hint,
           coalesce(e.name, t.name) AS name, e.is_test
    FROM keyproxy.reminders AS r
    LEFT JOIN keyproxy.expiring_keys AS e ON e.id = r.key_id AND e.expires_at = r.expires_at
    LEFT JOIN keyproxy.expiring_admin_tokens AS t ON t.id = r.token_id AND t.expires_at = r.expires_at
    WHERE r.sent_at IS NULL AND r.given_up_at IS NULL AND r.next_at <= now() AND num_nonnulls(e.id, t.id) = 1
    ORDER BY r.next_at, r.id
    LIMIT $1
    FOR NO KEY UPDATE OF r SKIP LOCKED
)
UPDATE keyproxy.reminders AS r SET next_at = now() + $2::interval, attempts = r.attempts + 1
FROM free
WHERE r.id = free.id
RETURNING r.id, r.key_id, r.token_id, r.expires_at, r.before_days, r.created_at, r.attempts, r.last_error,
          free.user_id, free.tenant_id, free.hint, free.name, free.is_test;

-- name: reminder_sent
UPDATE keyproxy.reminders SET sent_at = now(), given_up_at = NULL, last_error = NULL WHERE id = $1 AND sent_at IS NULL;

-- name: reminder_failed
-- Records that the attempt $2 of $1 failed for the reason $3; the next one is after $4, or never if that is null. Has
-- no effect if a later attempt has begun.
UPDATE keyproxy.reminders
SET last_error = $3, next_at = now() + coalesce($4::interval, interval '0'),
    given_up_at = CASE WHEN $4::interval IS NULL THEN now() END
WHERE id = $1 AND attempts = $2 AND sent_at IS NULL AND given_up_at IS NULL;

-- name: give_up_late_reminders
-- Gives up reminders of keys and tokens that have expired before a delivery. Excludes reminders that were not needed.
UPDATE keyproxy.reminders AS r SET given_up_at = now()
WHERE r.sent_at IS NULL AND r.given_up_at IS NULL AND r.expires_at <= now() AND r.attempts > 0
  AND (
      EXISTS (
          SELECT FROM keyproxy.api_keys AS k
          WHERE k.id = r.key_id AND k.expires_at = r.expires_at AND k.revoked_at IS NULL
      )
      OR EXISTS (
          SELECT FROM keyproxy.admin_tokens AS a
          WHERE a.id = r.token_id AND a.expires_at = r.expires_at AND a.revoked_at IS NULL
      )
  )
RETURNING r.id, r.key_id, r.token_id, r.last_error;

-- name: forget_reminders
-- Deletes a few reminders of keys that expired longer ago than $1. Needs: reminders (expires_at).
DELETE FROM keyproxy.reminders AS r
USING (
    SELECT id FROM keyproxy.reminders WHERE expires_at < now() - $1::interval ORDER BY expires_at LIMIT 1000
    FOR UPDATE SKIP LOCKED
) AS old
WHERE r.id = old.id;

-- name: reminders_waiting
-- Reminders that are to be sent, now or later, at most $1. Needs: reminders (next_at).
SELECT r.id, r.key_id, r.token_id, r.expires_at, r.before_days, r.attempts, r.last_error, e.user_id,
       coalesce(e.tenant_id, t.tenant_id) AS tenant_id, coalesce(e.hint, t.hint) AS hint, coalesce(e.name, t.name) AS name,
       e.is_test
FROM keyproxy.reminders AS r
LEFT JOIN keyproxy.expiring_keys AS e ON e.id = r.key_id AND e.expires_at = r.expires_at
LEFT JOIN keyproxy.expiring_admin_tokens AS t ON t.id = r.token_id AND t.expires_at = r.expires_at
WHERE r.sent_at IS NULL AND r.given_up_at IS NULL AND num_nonnulls(e.id, t.id) = 1
ORDER BY r.next_at, r.id
LIMIT $1;

-- name: count_reminders_waiting
SELECT count(*) AS waiting
FROM keyproxy.reminders AS r
LEFT JOIN keyproxy.expiring_keys AS e ON e.id = r.key_id AND e.expires_at = r.expires_at
LEFT JOIN keyproxy.expiring_admin_tokens AS t ON t.id = r.token_id AND t.expires_at = r.expires_at
WHERE r.sent_at IS NULL AND r.given_up_at IS NULL AND num_nonnulls(e.id, t.id) = 1;

-- name: claim_alerts
-- Claims at most $1 due alerts of limits; each goes to one caller, which has $2 to send it and record the outcome.
-- Needs: limit_alerts (next_at); windows (id).
WITH free AS (
    SELECT a.window_id, a.percentage FROM keyproxy.limit_alerts AS a
    WHERE a.delivered_at IS NULL AND a.given_up_at IS NULL AND a.next_at <= now()
    ORDER BY a.next_at, a.message_id
    LIMIT $1
    FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE keyproxy.limit_alerts AS a SET next_at = now() + $2::interval, attempts = a.attempts + 1
    FROM free
    WHERE a.window_id = free.window_id AND a.percentage = free.percentage
    RETURNING a.*
)
SELECT c.message_id, c.percentage, c.amount, c.spent, c.created_at, c.attempts, c.last_error, w.pool_kind, w.pool_id,
       w.is_test, w.measure, w.selector, keyproxy.tenant_of_pool(w.pool_kind, w.pool_id) AS tenant_id,
       to_timestamp(w.starts) AS window_starts, to_timestamp(keyproxy.window_end(w.measure, w.starts)) AS window_ends
FROM claimed AS c JOIN keyproxy.windows AS w ON w.id = c.window_id
ORDER BY c.created_at, c.message_id;

-- name: alert_delivered
UPDATE keyproxy.limit_alerts SET delivered_at = now(), given_up_at = NULL, last_error = NULL
WHERE message_id = $1 AND delivered_at IS NULL;

-- name: alert_failed
-- Records that the attempt $2 of $1 failed for the reason $3; the next one is after $4, or never if that is null. Has
-- no effect if a later attempt has begun.
UPDATE keyproxy.limit_alerts
SET last_error = $3, next_at = now() + coalesce($4::interval, interval '0'),
    given_up_at = CASE WHEN $4::interval IS NULL THEN now() END
WHERE message_id = $1 AND attempts = $2 AND delivered_at IS NULL AND given_up_at IS NULL;

-- name: give_up_late_alerts
-- Gives up alerts that nothing has tried to deliver for $1, and returns their number. Needs: limit_alerts (next_at).
WITH late AS (
    UPDATE keyproxy.limit_alerts AS a SET given_up_at = now()
    WHERE a.delivered_at IS NULL AND a.given_up_at IS NULL AND a.attempts = 0 AND a.next_at < now() - $1::interval
    RETURNING 1
)
SELECT count(*) AS alerts FROM late;

-- name: count_alerts_waiting
-- Needs: limit_alerts (next_at).
SELECT count(*) AS waiting FROM keyproxy.limit_alerts WHERE delivered_at IS NULL AND given_up_at IS NULL;

-- name: minting_authority
-- What the key $1, or the token $2 cut from it, may grant to the agent $4; $3: the user that the key acts for. The scopes of
-- the role $5; null: there is no such role. See the function. Needs: api_keys (id), agent_tokens (id), agents (user_id, id).
SELECT a.refusal, a.user_id, a.tenant_id, a.actor_user_id, a.is_test, a.agents, a.held, a.grantable, a.token_budget,
       a.request_budget, extract(epoch FROM a.expires_at)::float8 AS expires_wall_seconds,
       extract(epoch FROM clock_timestamp())::float8 AS server_seconds,
       (SELECT r.scopes FROM keyproxy.roles AS r WHERE r.id = $5) AS role_scopes
FROM keyproxy.minting_authority($1, $2, $3, $4) AS a;

-- name: mint_agent_token
-- Inserts a token if every bound holds: see the function. Needs: agent_tokens (root_key_id, expires_at).
SELECT m.outcome, m.reset_seconds
FROM keyproxy.mint_agent_token($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) AS m;

-- name: tend_agent_tokens
-- Deletes tokens and signing keys that ended a day ago, $1 of each at most: see the function.
-- Needs: agent_tokens (expires_at), signing_keys (ends_at), windows (pool_kind, pool_id …).
SELECT keyproxy.tend_agent_tokens($1) AS is_more;

-- name: learn_habits
-- Learns the habits $3 of the kinds $2 of the keys $1, with at most $4 networks of each key. `place`: counted from 1.
-- Needs: key_habits (key_id, kind, value), api_keys (id).
SELECT place, outcome FROM keyproxy.learn_habits($1::text[], $2::text[], $3::text[], $4::int);

-- name: note_anomaly
-- Reports the signal $1 of the key $2 or the network $3 with the value $4: see the migration that created the function.
SELECT keyproxy.note_anomaly(
    $1, $2, $3, $4, $5, $6::text::jsonb, $7::int, to_timestamp($8::float8), $9::bigint
) AS outcome;

-- name: tend_anomalies
SELECT keyproxy.tend_anomalies($1::int) AS is_more;

-- name: claim_approval
-- Uses the approval of the call with the digest $2, or reports why it cannot be used, or requests one: see the function.
-- Needs: approvals (call_digest), approvals (claim), approvals (user_id, expires_at) of pending ones.
SELECT c.outcome, c.approval_id, c.expires_at, c.waited_seconds
FROM keyproxy.claim_approval($1, $2, $3, $4, $5, $6, $7, $8, $9::text::jsonb, $10, $11, $12, $13) AS c;

-- name: release_approval
-- Gives the approval back that the claim $1 uses; $2: the digest of the call if the reply to the claim was lost. See the
-- function. Needs: approvals (claim), approvals (call_digest).
SELECT r.outcome FROM keyproxy.release_approval($1, $2) AS r;

-- name: tend_approvals
-- Marks expired approvals, and deletes what ended a month ago, $1 of each at most: see the function.
-- Needs: approvals (expires_at), consents (least(expires_at, revoked_at)), events (expires_at).
SELECT keyproxy.tend_approvals($1) AS is_more;

-- name: consents_of_users
-- The live consents of the users $1, one row each, as a JSON array of tool, agent and expiry in Unix time. The number of users
-- is hidden from the planner, so that it never considers the plan worth compiling. Needs: consents (user_id).
SELECT w.user_id, coalesce((
    SELECT jsonb_agg(jsonb_build_array(c.tool, c.agent_id, extract(epoch FROM c.expires_at)::float8))
    FROM keyproxy.consents AS c
    WHERE c.user_id = w.user_id AND c.revoked_at IS NULL AND c.expires_at > now()
), '[]')::text AS consents
FROM unnest((SELECT $1::text[])) AS w (user_id);

-- name: approval
-- Its state as of now: a row that has expired may not be marked yet. Needs: approvals (id).
SELECT a.id, a.tenant_id, a.user_id, a.key_id, a.agent_id, a.kind, a.tool, a.call_digest, a.summary, a.client,
       CASE WHEN a.state <> 'used' AND a.expires_at <= clock_timestamp() THEN 'expired' ELSE a.state END AS state,
       a.created_at, a.expires_at, a.decided_at, a.decided_by, a.reason, a.used_at
FROM keyproxy.approvals AS a
WHERE a.id = $1;

-- name: approvals_newest
-- The newest first, made before the time $1 or then with an id below $2, at most $3. Of the state $4, the user $5, the tenant
-- $6, if not null. Needs: approvals (created_at, id), (user_id, created_at, id), (tenant_id, created_at, id).
SELECT a.id, a.tenant_id, a.user_id, a.key_id, a.agent_id, a.kind, a.tool, a.call_digest, a.summary, a.client, s.state,
       a.created_at, a.expires_at, a.decided_at, a.decided_by, a.reason, a.used_at
FROM keyproxy.approvals AS a
CROSS JOIN LATERAL (
    SELECT CASE WHEN a.state <> 'used' AND a.expires_at <= now() THEN 'expired' ELSE a.state END AS state
) AS s
WHERE (a.created_at, a.id) < ($1, $2)
  AND ($4::text IS NULL OR s.state = $4) AND ($5::text IS NULL OR a.user_id = $5) AND ($6::text IS NULL OR a.tenant_id = $6)
ORDER BY a.created_at DESC, a.id DESC
LIMIT $3;

-- name: hold_approval
-- Locks the approval; its user first, in the order of claim_approval.
WITH owner AS MATERIALIZED (
    SELECT u.id
    FROM keyproxy.approvals AS a
    JOIN keyproxy.users AS u ON u.id = a.user_id
    WHERE a.id = $1
    FOR NO KEY UPDATE OF u
)
SELECT a.id
FROM keyproxy.approvals AS a
JOIN owner ON owner.id = a.user_id
WHERE a.id = $1
FOR NO KEY UPDATE OF a;

-- name: decide_approval
-- Gives the approval $1 the state $2, by $3 for the reason $4, for the next $5 seconds. No row if it is not in one of the
-- states $6 or has expired.
UPDATE keyproxy.approvals AS a
SET state = $2, decided_by = $3, reason = nullif($4, ''), decided_at = clock_timestamp(),
    expires_at = clock_timestamp() + make_interval(secs => $5::float8)
WHERE a.id = $1 AND a.state = ANY ($6::text[]) AND a.expires_at > clock_timestamp()
RETURNING a.id;

-- name: grant_consent
-- The consent $1 of the user $2 to the tool $3, for the agent $4 or any, by $5, for $6 seconds.
INSERT INTO keyproxy.consents (id, user_id, tool, agent_id, granted_by, expires_at)
VALUES ($1, $2, $3, $4, $5, now() + make_interval(secs => $6::float8));

-- name: end_consents
-- Revokes the live consents of the user $1 to the tool $2 for exactly the agent $3, null: any. Needs: consents (user_id).
UPDATE keyproxy.consents AS c SET revoked_at = now()
WHERE c.user_id = $1 AND c.tool = $2 AND c.agent_id IS NOT DISTINCT FROM $3
  AND c.revoked_at IS NULL AND c.expires_at > now();

-- name: consent
-- Needs: consents (id), users (id).
SELECT c.id, u.tenant_id, c.user_id, c.tool, c.agent_id, c.granted_by, c.created_at, c.expires_at, c.revoked_at,
       CASE WHEN c.revoked_at IS NOT NULL THEN 'revoked' WHEN c.expires_at <= clock_timestamp() THEN 'expired'
            ELSE 'live' END AS state
FROM keyproxy.consents AS c
JOIN keyproxy.users AS u ON u.id = c.user_id
WHERE c.id = $1;

-- name: consents_newest
-- The newest first, made before the time $1 or then with an id below $2, at most $3. Of the state $4, the user $5, the tenant
-- $6, the tool $7, if not null. Needs: consents (created_at, id), (user_id, created_at, id), users (id).
SELECT c.id, u.tenant_id, c.user_id, c.tool, c.agent_id, c.granted_by, c.created_at, c.expires_at, c.revoked_at, s.state
FROM keyproxy.consents AS c
JOIN keyproxy.users AS u ON u.id = c.user_id
CROSS JOIN LATERAL (
    SELECT CASE WHEN c.revoked_at IS NOT NULL THEN 'revoked' WHEN c.expires_at <= now() THEN 'expired' ELSE 'live' END
        AS state
) AS s
WHERE (c.created_at, c.id) < ($1, $2)
  AND ($4::text IS NULL OR s.state = $4) AND ($5::text IS NULL OR c.user_id = $5) AND ($6::text IS NULL OR u.tenant_id = $6)
  AND ($7::text IS NULL OR c.tool = $7)
ORDER BY c.created_at DESC, c.id DESC
LIMIT $3;

-- name: hold_consent
-- Locks the consent; its user first, in the order of grants.
WITH owner AS MATERIALIZED (
    SELECT u.id
    FROM keyproxy.consents AS c
    JOIN keyproxy.users AS u ON u.id = c.user_id
    WHERE c.id = $1
    FOR NO KEY UPDATE OF u
)
SELECT c.id
FROM keyproxy.consents AS c
JOIN owner ON owner.id = c.user_id
WHERE c.id = $1
FOR NO KEY UPDATE OF c;

-- name: revoke_consent
-- A consent that is revoked already keeps its time.
UPDATE keyproxy.consents SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL;

-- name: claim_events
-- Claims at most $1 due events whose kind starts with $3; each goes to one caller, which has $2 to send it and record the
-- outcome. First attempts come first, so that retries do not delay them. Needs: events (next_at).
WITH free AS (
    SELECT e.id FROM keyproxy.events AS e
    WHERE e.sent_at IS NULL AND e.given_up_at IS NULL AND e.next_at <= now() AND e.expires_at > now()
      AND starts_with(e.kind, $3)
    ORDER BY e.attempts > 0, e.next_at, e.id
    LIMIT $1
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE keyproxy.events AS e SET next_at = now() + $2::interval, attempts = e.attempts + 1
FROM free
WHERE e.id = free.id
RETURNING e.id, e.kind, e.payload, e.created_at, e.attempts;

-- name: event_sent
UPDATE keyproxy.events SET sent_at = now(), given_up_at = NULL, last_error = NULL WHERE id = $1 AND sent_at IS NULL;

-- name: event_failed
-- Records that the attempt $2 of $1 failed for the reason $3; the next one is after $4, or never if that is null. Has
-- no effect if a later attempt has begun.
UPDATE keyproxy.events
SET last_error = $3, next_at = now() + coalesce($4::interval, interval '0'),
    given_up_at = CASE WHEN $4::interval IS NULL THEN now() END
WHERE id = $1 AND attempts = $2 AND sent_at IS NULL AND given_up_at IS NULL;

-- name: give_up_late_events
-- Gives up events that have expired before a delivery and whose kind starts with $1, at most 1000. Needs: events (next_at).
UPDATE keyproxy.events AS e SET given_up_at = now()
WHERE e.id = ANY (ARRAY(
    SELECT o.id FROM keyproxy.events AS o
    WHERE o.sent_at IS NULL AND o.given_up_at IS NULL AND o.expires_at <= now() AND starts_with(o.kind, $1)
    LIMIT 1000
    FOR NO KEY UPDATE SKIP LOCKED
))
RETURNING e.id, e.kind, e.attempts, e.last_error;

-- name: count_events_waiting
-- Needs: events (next_at).
SELECT count(*) AS waiting FROM keyproxy.events AS e
WHERE e.sent_at IS NULL AND e.given_up_at IS NULL AND e.expires_at > now() AND starts_with(e.kind, $1);

-- name: login_key
-- The key with the digest $1 and its user, for a login. `state`: that of the key; `disabled` if its user or tenant is.
-- Needs: api_keys (digest), users (id), tenants (id), roles (id).
SELECT k.id AS key_id, u.id AS user_id, t.id AS tenant_id, k.is_test,
       keyproxy.effective_scopes(k.scopes, k.roles, u.roles, t.roles) AS scopes,
       CASE WHEN k.revoked_at IS NOT NULL THEN 'revoked' WHEN k.expires_at <= clock_timestamp() THEN 'expired'
            WHEN u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL THEN 'disabled'
            WHEN k.suspended_at IS NOT NULL THEN 'suspended' ELSE 'active' END AS state
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
WHERE k.digest = $1;

-- name: hold_login_key
-- Locks the key $1 of a sign-in against a change until the end of the transaction. Needs: api_keys (id).
SELECT keyproxy.hold_login_key($1);

-- name: hold_login_subject
-- Locks the subject $2 of the issuer $1 against a change until the end of the transaction.
-- Needs: oauth_subjects (issuer, subject).
SELECT s.user_id FROM keyproxy.oauth_subjects AS s WHERE s.issuer = $1 AND s.subject = $2 FOR SHARE;

-- name: consenting_user
-- Whether the user $1 is enabled, and what the login permits now: the key $2, or the subject $4 at the issuer $3, where not
-- null. `scopes`: those of the key; null without one.
-- Needs: users (id), tenants (id), api_keys (id), oauth_subjects (issuer, subject), roles (id).
SELECT u.disabled_at IS NULL AND t.disabled_at IS NULL AS is_enabled,
       CASE WHEN $2::text IS NOT NULL THEN
                k.id IS NOT NULL AND k.revoked_at IS NULL AND k.suspended_at IS NULL
                AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())
            WHEN $3::text IS NOT NULL THEN
                EXISTS (SELECT FROM keyproxy.oauth_subjects AS s
                        WHERE s.issuer = $3 AND s.subject = $4 AND s.user_id = u.id)
            ELSE true END AS is_login_good,
       CASE WHEN k.id IS NOT NULL THEN keyproxy.effective_scopes(k.scopes, k.roles, u.roles, t.roles) END AS scopes
FROM keyproxy.users AS u
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
LEFT JOIN keyproxy.api_keys AS k ON k.id = $2 AND k.user_id = u.id
WHERE u.id = $1;

-- name: keep_oauth_client
-- Enters a client with its metadata, or updates those that have changed. No row: there is nothing to change.
-- `is_new`: the client had no row. Needs: oauth_clients (id).
INSERT INTO keyproxy.oauth_clients AS c (id, client_id, kind, name, redirect_uris, auth_method, jwks)
VALUES ($1, $2, $3, $4, $5, $6, $7::jsonb)
ON CONFLICT (id) DO UPDATE
SET kind = excluded.kind, name = excluded.name, redirect_uris = excluded.redirect_uris,
    auth_method = excluded.auth_method, jwks = excluded.jwks
WHERE c.kind <> 'registered'
  AND (c.kind, c.name, c.redirect_uris, c.auth_method, c.jwks)
      IS DISTINCT FROM (excluded.kind, excluded.name, excluded.redirect_uris, excluded.auth_method, excluded.jwks)
RETURNING xmax = 0 AS is_new;

-- name: hold_oauth_client
-- Locks the client $1 against a change until the end of the transaction. Needs: oauth_clients (id).
SELECT c.disabled_at IS NOT NULL AS is_disabled FROM keyproxy.oauth_clients AS c WHERE c.id = $1 FOR SHARE;

-- name: keep_oauth_grant
-- Grants the client $3 of the user $2 the scopes $5 for the resource $4, in addition to those that the grant has; beyond 128,
-- earlier ones go. A grant without a plan gets that of the key $8, if not null: a program gets no more than the key of the
-- sign-in has. $1: the id of a new grant. No row: the grant is that of a service, which an operator decides about.
-- Needs: oauth_grants (user_id, client_id, resource), api_keys (id).
INSERT INTO keyproxy.oauth_grants AS g (id, user_id, client_id, resource, scopes, is_test, granted_at, plan_id)
VALUES ($1, $2, $3, $4, $5, $6, coalesce($7::timestamptz, clock_timestamp()),
        (SELECT k.plan_id FROM keyproxy.api_keys AS k WHERE k.id = $8))
ON CONFLICT (user_id, client_id, resource) DO UPDATE
SET scopes = ARRAY(
        SELECT kept.scope
        FROM (SELECT DISTINCT s.scope COLLATE "C" AS scope, s.scope = ANY (excluded.scopes) AS is_new
              FROM unnest(g.scopes || excluded.scopes) AS s (scope)
              ORDER BY is_new DESC, scope
              LIMIT 128) AS kept
        ORDER BY kept.scope
    ),
    is_test = excluded.is_test, granted_at = excluded.granted_at, plan_id = coalesce(g.plan_id, excluded.plan_id)
WHERE NOT g.is_service
RETURNING g.id;

-- name: add_oauth_code
-- Adds an authorization code that is good for $10 seconds from $11, null: now.
INSERT INTO keyproxy.oauth_codes (
    digest, grant_id, client_id, redirect_uri, challenge, scopes, via_key, via_issuer, via_subject, expires_at
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, coalesce($11::timestamptz, clock_timestamp()) + make_interval(secs => $10));

-- name: connections_of_user
-- The programs that the user $1 has connected and their devices, the newest first, at most $3 rows. Of the mode $2, if not
-- null. `last_token_at`: when the device last got a token; null columns of a session: the program has no device.
-- Needs: oauth_grants (user_id, client_id, resource), oauth_sessions (grant_id), oauth_refresh_tokens (session_id, issued_at),
-- oauth_clients (id).
SELECT g.id AS grant_id, c.name, c.client_id, c.kind, g.resource, g.is_test, g.scopes, g.granted_at,
       s.id AS session_id, s.created_at, s.last_used_at,
       (SELECT r.issued_at FROM keyproxy.oauth_refresh_tokens AS r WHERE r.session_id = s.id
        ORDER BY r.issued_at DESC LIMIT 1) AS last_token_at
FROM keyproxy.oauth_grants AS g
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id
LEFT JOIN keyproxy.oauth_sessions AS s ON s.grant_id = g.id AND s.expires_at > clock_timestamp()
WHERE g.user_id = $1 AND NOT g.is_service AND ($2::boolean IS NULL OR g.is_test = $2)
ORDER BY g.granted_at DESC, g.id, s.created_at DESC, s.id
LIMIT $3;

-- name: end_oauth_session_of_user
-- Needs: oauth_sessions (id), oauth_grants (id).
DELETE FROM keyproxy.oauth_sessions AS s USING keyproxy.oauth_grants AS g
WHERE g.id = s.grant_id AND s.id = $3 AND g.user_id = $1 AND NOT g.is_service AND ($2::boolean IS NULL OR g.is_test = $2)
RETURNING s.id;

-- name: end_oauth_grants_of_user
-- Ends the grant $3 of the user $1, or all grants if that is null; of the mode $2, if not null. Returns how many sessions end.
-- Needs: oauth_grants (user_id, client_id, resource), oauth_sessions (grant_id).
WITH ended AS (
    DELETE FROM keyproxy.oauth_grants AS g WHERE g.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.oauth_grants AS o
        WHERE o.user_id = $1 AND NOT o.is_service AND ($2::boolean IS NULL OR o.is_test = $2)
          AND ($3::text IS NULL OR o.id = $3)
        ORDER BY o.id FOR UPDATE
    ))
    RETURNING g.id
)
SELECT (SELECT count(*) FROM ended)::int AS grants,
       (SELECT count(*) FROM keyproxy.oauth_sessions AS s WHERE s.grant_id IN (SELECT e.id FROM ended AS e))::int AS sessions;
-- name: client
-- The client with the number of its grants and the users of its service grants. Needs: oauth_clients (id), oauth_grants
-- (client_id).
SELECT c.id, c.client_id, c.kind, c.name, c.redirect_uris, c.auth_method, c.jwks::text AS jwks, c.tls_subject, c.created_at,
       c.disabled_at,
       (SELECT count(*) FROM keyproxy.oauth_grants AS g WHERE g.client_id = c.id) AS grants,
       ARRAY(SELECT g.user_id FROM keyproxy.oauth_grants AS g WHERE g.client_id = c.id AND g.is_service ORDER BY g.user_id)
           AS users
FROM keyproxy.oauth_clients AS c
WHERE c.id = $1;

-- name: clients
-- As client, in the order of ids, after $1, at most $2; of one kind $3, if not null.
SELECT c.id, c.client_id, c.kind, c.name, c.redirect_uris, c.auth_method, c.jwks::text AS jwks, c.tls_subject, c.created_at,
       c.disabled_at,
       (SELECT count(*) FROM keyproxy.oauth_grants AS g WHERE g.client_id = c.id) AS grants,
       ARRAY(SELECT g.user_id FROM keyproxy.oauth_grants AS g WHERE g.client_id = c.id AND g.is_service ORDER BY g.user_id)
           AS users
FROM keyproxy.oauth_clients AS c
WHERE c.id > $1 AND ($3::text IS NULL OR c.kind = $3)
ORDER BY c.id
LIMIT $2;

-- name: hold_client
SELECT c.id FROM keyproxy.oauth_clients AS c WHERE c.id = $1 FOR NO KEY UPDATE;

-- name: add_client
-- No row if there is one with this id. $3: the kind, $6: how it authenticates.
INSERT INTO keyproxy.oauth_clients
    (id, client_id, kind, name, redirect_uris, auth_method, secret_digest, jwks, tls_subject)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8::text::jsonb, $9)
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: change_client
-- As change_tenant.
UPDATE keyproxy.oauth_clients AS c
SET disabled_at = CASE
        WHEN w.change -> 'disabled' = 'true' THEN coalesce(c.disabled_at, now())
        WHEN w.change -> 'disabled' = 'false' THEN NULL
        ELSE c.disabled_at
    END
FROM (SELECT $2::text::jsonb AS change) AS w
WHERE c.id = $1;

-- name: delete_client
DELETE FROM keyproxy.oauth_clients WHERE id = $1;

-- name: add_service_grant
-- The grant $1 with which the client $3 gets tokens for the user $2 by itself.
INSERT INTO keyproxy.oauth_grants (id, user_id, client_id, resource, scopes, is_test, is_service)
VALUES ($1, $2, $3, $4, $5, $6, true);

-- name: grant
-- Needs: oauth_grants (id), users (id), oauth_clients (id), oauth_sessions (grant_id).
SELECT g.id, g.user_id, u.tenant_id, g.client_id, c.name AS client_name, g.resource, g.scopes, g.is_test, g.is_service,
       g.plan_id, g.granted_at,
       (SELECT count(*) FROM keyproxy.oauth_sessions AS s WHERE s.grant_id = g.id) AS sessions
FROM keyproxy.oauth_grants AS g
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id
WHERE g.id = $1;

-- name: grants
-- As grant, in the order of ids, after $1, at most $2; of one tenant $3, if not null.
SELECT g.id, g.user_id, u.tenant_id, g.client_id, c.name AS client_name, g.resource, g.scopes, g.is_test, g.is_service,
       g.plan_id, g.granted_at,
       (SELECT count(*) FROM keyproxy.oauth_sessions AS s WHERE s.grant_id = g.id) AS sessions
FROM keyproxy.oauth_grants AS g
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id
WHERE g.id > $1 AND ($3::text IS NULL OR u.tenant_id = $3)
ORDER BY g.id
LIMIT $2;

-- name: grants_of_user
-- As grant, those of the user $1 in the order of ids, after $2, at most $3. Needs: oauth_grants (user_id).
SELECT g.id, g.user_id, u.tenant_id, g.client_id, c.name AS client_name, g.resource, g.scopes, g.is_test, g.is_service,
       g.plan_id, g.granted_at,
       (SELECT count(*) FROM keyproxy.oauth_sessions AS s WHERE s.grant_id = g.id) AS sessions
FROM keyproxy.oauth_grants AS g
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id
WHERE g.user_id = $1 AND g.id > $2
ORDER BY g.id
LIMIT $3;

-- name: hold_grant
SELECT g.id FROM keyproxy.oauth_grants AS g WHERE g.id = $1 FOR NO KEY UPDATE;

-- name: change_grant
-- As change_tenant.
UPDATE keyproxy.oauth_grants AS g
SET plan_id = CASE WHEN w.change ? 'plan' THEN w.change ->> 'plan' ELSE g.plan_id END
FROM (SELECT $2::text::jsonb AS change) AS w
WHERE g.id = $1;

-- name: delete_grant
DELETE FROM keyproxy.oauth_grants WHERE id = $1;

-- name: delete_grants_of_user
-- At most $2. Needs: oauth_grants (user_id).
DELETE FROM keyproxy.oauth_grants AS g
WHERE g.id = ANY (ARRAY(
    SELECT o.id FROM keyproxy.oauth_grants AS o WHERE o.user_id = $1 ORDER BY o.id LIMIT $2 FOR UPDATE
))
RETURNING g.id;

-- name: count_grants_of_user
-- Needs: oauth_grants (user_id).
SELECT count(*) AS grants FROM keyproxy.oauth_grants AS g WHERE g.user_id = $1;

-- name: session
-- Needs: oauth_sessions (id), oauth_grants (id), users (id), oauth_clients (id).
SELECT s.id, s.grant_id, g.user_id, u.tenant_id, g.client_id, c.name AS client_name, s.presented_as, s.scopes, g.is_test,
       s.via_key, s.via_issuer, s.via_subject, s.created_at, s.expires_at, s.last_used_at
FROM keyproxy.oauth_sessions AS s
JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id
WHERE s.id = $1;

-- name: sessions
-- As session, in the order of ids, after $1, at most $2; of one tenant $3, if not null.
SELECT s.id, s.grant_id, g.user_id, u.tenant_id, g.client_id, c.name AS client_name, s.presented_as, s.scopes, g.is_test,
       s.via_key, s.via_issuer, s.via_subject, s.created_at, s.expires_at, s.last_used_at
FROM keyproxy.oauth_sessions AS s
JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id
WHERE s.id > $1 AND ($3::text IS NULL OR u.tenant_id = $3)
ORDER BY s.id
LIMIT $2;

-- name: sessions_of_user
-- As session, those of the user $1 in the order of ids, after $2, at most $3. Needs: oauth_grants (user_id),
-- oauth_sessions (grant_id).
SELECT s.id, s.grant_id, g.user_id, u.tenant_id, g.client_id, c.name AS client_name, s.presented_as, s.scopes, g.is_test,
       s.via_key, s.via_issuer, s.via_subject, s.created_at, s.expires_at, s.last_used_at
FROM keyproxy.oauth_sessions AS s
JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id
WHERE g.user_id = $1 AND s.id > $2
ORDER BY s.id
LIMIT $3;

-- name: hold_session
SELECT s.id FROM keyproxy.oauth_sessions AS s WHERE s.id = $1 FOR NO KEY UPDATE;

-- name: delete_session
DELETE FROM keyproxy.oauth_sessions WHERE id = $1;

-- name: delete_sessions
-- Of the user $1, the tenant $2, where not null; at most $3. Needs: oauth_sessions (id); for a user: oauth_grants
-- (user_id), oauth_sessions (grant_id).
DELETE FROM keyproxy.oauth_sessions AS s
WHERE s.id = ANY (ARRAY(
    SELECT o.id
    FROM keyproxy.oauth_sessions AS o
    JOIN keyproxy.oauth_grants AS g ON g.id = o.grant_id
    JOIN keyproxy.users AS u ON u.id = g.user_id
    WHERE ($1::text IS NULL OR g.user_id = $1) AND ($2::text IS NULL OR u.tenant_id = $2)
    ORDER BY o.id
    LIMIT $3
    FOR UPDATE OF o
))
RETURNING s.id;

-- name: count_sessions
-- As delete_sessions; of more than 10,000 only these are counted, because each portion of a large number counts again.
SELECT count(*) AS sessions
FROM (
    SELECT
    FROM keyproxy.oauth_sessions AS s
    JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id
    JOIN keyproxy.users AS u ON u.id = g.user_id
    WHERE ($1::text IS NULL OR g.user_id = $1) AND ($2::text IS NULL OR u.tenant_id = $2)
    LIMIT 10000
) AS found;

-- name: sessions_of_secrets
-- The sessions of the access and refresh tokens with one of the digests $1; of one tenant $2, if not null. Also of tokens that
-- have expired or were used: they show which session has leaked.
-- Needs: oauth_access_tokens (digest), oauth_refresh_tokens (digest), oauth_sessions (id), oauth_grants (id), users (id).
SELECT t.digest, s.id
FROM (
    SELECT a.digest, a.session_id FROM keyproxy.oauth_access_tokens AS a WHERE a.digest = ANY($1::bytea[])
    UNION ALL
    SELECT r.digest, r.session_id FROM keyproxy.oauth_refresh_tokens AS r WHERE r.digest = ANY($1::bytea[])
) AS t
JOIN keyproxy.oauth_sessions AS s ON s.id = t.session_id
JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id
JOIN keyproxy.users AS u ON u.id = g.user_id
WHERE $2::text IS NULL OR u.tenant_id = $2
ORDER BY s.id;

-- name: clients_of_secrets
-- The clients whose secret has one of the digests $1, with the user of a service grant; of one tenant $2, if not null. Reads
-- all clients, since only operators run this, and rarely. Needs: oauth_grants (client_id), users (id).
SELECT DISTINCT ON (c.id) c.secret_digest AS digest, c.id, g.user_id, u.tenant_id
FROM keyproxy.oauth_clients AS c
LEFT JOIN keyproxy.oauth_grants AS g ON g.client_id = c.id AND g.is_service
LEFT JOIN keyproxy.users AS u ON u.id = g.user_id
WHERE c.secret_digest = ANY($1::bytea[]) AND ($2::text IS NULL OR u.tenant_id = $2)
ORDER BY c.id, g.resource;

-- name: add_subject
-- Links the subject $2 of the issuer $1 to the user $3. No row if it is linked.
INSERT INTO keyproxy.oauth_subjects (issuer, subject, user_id) VALUES ($1, $2, $3)
ON CONFLICT (issuer, subject) DO NOTHING
RETURNING subject;

-- name: subject
-- Needs: oauth_subjects (issuer, subject), users (id).
SELECT o.issuer, o.subject, o.user_id, u.tenant_id, o.created_at
FROM keyproxy.oauth_subjects AS o
JOIN keyproxy.users AS u ON u.id = o.user_id
WHERE o.issuer = $1 AND o.subject = $2;

-- name: hold_subject
SELECT o.subject FROM keyproxy.oauth_subjects AS o WHERE o.issuer = $1 AND o.subject = $2 FOR UPDATE;

-- name: subjects
-- In the order of issuer and subject, after the issuer $1 and subject $2, at most $3; of one tenant $4, if not null.
-- Needs: oauth_subjects (issuer, subject).
SELECT o.issuer, o.subject, o.user_id, u.tenant_id, o.created_at
FROM keyproxy.oauth_subjects AS o
JOIN keyproxy.users AS u ON u.id = o.user_id
WHERE (o.issuer, o.subject) > ($1, $2) AND ($4::text IS NULL OR u.tenant_id = $4)
ORDER BY o.issuer, o.subject
LIMIT $3;

-- name: subjects_of_user
-- As subjects, those of the user $4. Needs: oauth_subjects (user_id).
SELECT o.issuer, o.subject, o.user_id, u.tenant_id, o.created_at
FROM keyproxy.oauth_subjects AS o
JOIN keyproxy.users AS u ON u.id = o.user_id
WHERE o.user_id = $4 AND (o.issuer, o.subject) > ($1, $2)
ORDER BY o.issuer, o.subject
LIMIT $3;

-- name: delete_subject
DELETE FROM keyproxy.oauth_subjects WHERE issuer = $1 AND subject = $2;

-- name: hold_oauth_code
-- Locks the authorization code with the digest $1. First what its session will refer to, in the order in which a deletion
-- of the user reaches it: the key or subject of the login, the grant.
-- Needs: oauth_codes (digest), api_keys (id), oauth_subjects (issuer, subject), oauth_grants (id).
WITH code AS MATERIALIZED (
    SELECT c.grant_id, c.via_key, c.via_issuer, c.via_subject FROM keyproxy.oauth_codes AS c WHERE c.digest = $1
), login_key AS MATERIALIZED (
    SELECT keyproxy.hold_login_key(code.via_key) FROM code WHERE code.via_key IS NOT NULL
), login_subject AS MATERIALIZED (
    SELECT s.user_id
    FROM keyproxy.oauth_subjects AS s
    WHERE s.issuer = (SELECT code.via_issuer FROM code) AND s.subject = (SELECT code.via_subject FROM code)
      AND (SELECT count(*) FROM login_key) >= 0
    FOR SHARE OF s
), parent AS MATERIALIZED (
    SELECT g.id
    FROM keyproxy.oauth_grants AS g
    WHERE g.id = (SELECT code.grant_id FROM code) AND (SELECT count(*) FROM login_subject) >= 0
    FOR KEY SHARE OF g
)
SELECT c.digest
FROM keyproxy.oauth_codes AS c
WHERE c.digest = $1 AND c.grant_id = (SELECT parent.id FROM parent)
FOR UPDATE OF c;

-- name: oauth_code
-- The code with the digest $1, which is locked, as of $2, null: now. `is_disabled`: its user or tenant is, or the key that
-- the user has signed in by does not work. Needs: oauth_codes (digest), oauth_grants (id), users (id), tenants (id),
-- api_keys (id).
SELECT m.now, c.client_id AS presented_as, c.redirect_uri, c.challenge, c.session_id,
       c.redeemed_at IS NOT NULL AS is_redeemed, c.expires_at <= m.now AS is_expired, c.scopes AS session_scopes,
       c.grant_id, g.client_id AS client_row, g.user_id, g.resource, g.scopes AS grant_scopes,
       u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL OR k.revoked_at IS NOT NULL OR k.suspended_at IS NOT NULL
           OR coalesce(k.expires_at <= m.now, false) AS is_disabled
FROM (SELECT coalesce($2::timestamptz, clock_timestamp()) AS now) AS m
JOIN keyproxy.oauth_codes AS c ON c.digest = $1
JOIN keyproxy.oauth_grants AS g ON g.id = c.grant_id
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
LEFT JOIN keyproxy.api_keys AS k ON k.id = c.via_key;

-- name: redeem_oauth_code
-- Opens the session $2 of the code with the digest $1 at $3, for $4 seconds or, if a key has signed in, until it expires: see
-- the trigger. Needs: oauth_codes (digest).
WITH opened AS (
    INSERT INTO keyproxy.oauth_sessions (
        id, grant_id, presented_as, scopes, created_at, expires_at, via_key, via_issuer, via_subject
    )
    SELECT $2, c.grant_id, c.client_id, c.scopes, $3::timestamptz, $3::timestamptz + make_interval(secs => $4),
           c.via_key, c.via_issuer, c.via_subject
    FROM keyproxy.oauth_codes AS c
    WHERE c.digest = $1
    RETURNING id
)
UPDATE keyproxy.oauth_codes AS c SET redeemed_at = $3, session_id = opened.id
FROM opened
WHERE c.digest = $1;

-- name: issue_oauth_tokens
-- Issues the access token with the digest $2 for the session $1, with the scopes $3, at $4, for at most $5 seconds, bound to
-- $6 if not null; and the refresh token $7, if not null, that follows $8, for at most $9 seconds. Deletes the oldest access
-- tokens of the session, so that at most $10 that have not expired are left. The session is locked.
-- Needs: oauth_sessions (id), oauth_access_tokens (session_id, expires_at).
WITH session AS (
    SELECT s.id, s.expires_at FROM keyproxy.oauth_sessions AS s WHERE s.id = $1
), refresh AS (
    INSERT INTO keyproxy.oauth_refresh_tokens (digest, session_id, follows, issued_at, expires_at)
    SELECT $7::bytea, s.id, $8::bytea, $4::timestamptz, least($4::timestamptz + make_interval(secs => $9), s.expires_at)
    FROM session AS s
    WHERE $7::bytea IS NOT NULL
), oldest AS (
    DELETE FROM keyproxy.oauth_access_tokens AS a
    WHERE a.digest = ANY (ARRAY(
        SELECT o.digest FROM keyproxy.oauth_access_tokens AS o
        WHERE o.session_id = $1 AND o.expires_at > $4::timestamptz
        ORDER BY o.expires_at, o.issued_at, o.digest
        LIMIT (
            SELECT greatest(0, count(*) - $10::int + 1) FROM keyproxy.oauth_access_tokens AS n
            WHERE n.session_id = $1 AND n.expires_at > $4::timestamptz
        )
    ))
)
INSERT INTO keyproxy.oauth_access_tokens AS a (digest, session_id, scopes, issued_at, expires_at, bound_to)
SELECT $2, s.id, $3, $4::timestamptz, least($4::timestamptz + make_interval(secs => $5), s.expires_at), $6
FROM session AS s
RETURNING floor(extract(epoch FROM a.expires_at - a.issued_at))::int AS expires_in;

-- name: hold_refreshed_session
-- Locks the session of the refresh token with the digest $1, so that its uses are judged one after another.
-- Needs: oauth_refresh_tokens (digest), oauth_sessions (id).
SELECT s.id
FROM keyproxy.oauth_sessions AS s
WHERE s.id = (SELECT r.session_id FROM keyproxy.oauth_refresh_tokens AS r WHERE r.digest = $1)
FOR NO KEY UPDATE OF s;

-- name: oauth_refresh
-- The refresh token with the digest $1, whose session is locked, as of $2, null: now. `is_past_grace`: it was used more than
-- $3 seconds ago. `is_disabled`: as in oauth_code. Needs: oauth_refresh_tokens (digest), oauth_refresh_tokens (session_id),
-- oauth_sessions (id), oauth_grants (id), users (id), tenants (id), api_keys (id).
SELECT m.now, s.id AS session_id, s.presented_as, s.scopes AS session_scopes,
       r.expires_at <= m.now OR s.expires_at <= m.now AS is_expired, g.client_id AS client_row, g.user_id, g.resource, g.scopes AS grant_scopes,
       r.replaced_at IS NOT NULL AS is_replaced, r.used_at IS NOT NULL AS is_used,
       coalesce(r.used_at < m.now - make_interval(secs => $3), false) AS is_past_grace,
       f.successors, f.has_used_successor,
       u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL OR k.revoked_at IS NOT NULL OR k.suspended_at IS NOT NULL
           OR coalesce(k.expires_at <= m.now, false) AS is_disabled
FROM (SELECT coalesce($2::timestamptz, clock_timestamp()) AS now) AS m
JOIN keyproxy.oauth_refresh_tokens AS r ON r.digest = $1
JOIN keyproxy.oauth_sessions AS s ON s.id = r.session_id
JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
LEFT JOIN keyproxy.api_keys AS k ON k.id = s.via_key
CROSS JOIN LATERAL (
    SELECT count(*)::int AS successors, count(n.used_at) > 0 AS has_used_successor
    FROM keyproxy.oauth_refresh_tokens AS n
    WHERE n.session_id = s.id AND n.follows = r.digest
) AS f;

-- name: use_refresh_token
-- Records that the refresh token with the digest $1 of the session $2 is used at $3, and replaces its successors.
-- Needs: oauth_refresh_tokens (digest), oauth_refresh_tokens (session_id).
WITH replaced AS (
    UPDATE keyproxy.oauth_refresh_tokens AS n SET replaced_at = $3
    WHERE n.session_id = $2 AND n.follows = $1 AND n.replaced_at IS NULL
)
UPDATE keyproxy.oauth_refresh_tokens AS r SET used_at = $3 WHERE r.digest = $1;

-- name: end_oauth_session
-- Ends the session $1. No row: there is none. Needs: oauth_sessions (id).
DELETE FROM keyproxy.oauth_sessions AS s WHERE s.id = $1 RETURNING s.id;

-- name: hold_service_grant
-- Locks the grant of the client $1 to itself, for the resource $2 if not null, else preferably for $3.
-- Needs: oauth_grants (client_id, resource) of service grants.
SELECT g.id
FROM keyproxy.oauth_grants AS g
WHERE g.client_id = $1 AND g.is_service AND ($2::text IS NULL OR g.resource = $2)
ORDER BY g.resource = $3 DESC, g.resource
LIMIT 1
FOR NO KEY UPDATE OF g;

-- name: service_grant
-- The service grant $1, which is locked, as of $2, null: now, with its session if it has one.
-- Needs: oauth_grants (id), users (id), tenants (id), oauth_sessions (grant_id).
SELECT m.now, g.id AS grant_id, g.user_id, g.resource, g.scopes AS grant_scopes,
       u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL AS is_disabled, s.id AS session_id
FROM (SELECT coalesce($2::timestamptz, clock_timestamp()) AS now) AS m
JOIN keyproxy.oauth_grants AS g ON g.id = $1
JOIN keyproxy.users AS u ON u.id = g.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
LEFT JOIN LATERAL (
    SELECT o.id FROM keyproxy.oauth_sessions AS o
    WHERE o.grant_id = g.id AND o.expires_at > m.now
    ORDER BY o.created_at DESC, o.id
    LIMIT 1
) AS s ON true;

-- name: open_service_session
-- Opens the session $2 of the service grant $1 for the client that presented $3, with the scopes $4, at $5 for $6 seconds.
INSERT INTO keyproxy.oauth_sessions (id, grant_id, presented_as, scopes, created_at, expires_at)
VALUES ($2, $1, $3, $4, $5, $5::timestamptz + make_interval(secs => $6));

-- name: keep_service_session
-- Gives the session $1 the scopes $2, and $4 seconds from $3; not more often than necessary, since each change is recorded.
-- Needs: oauth_sessions (id).
UPDATE keyproxy.oauth_sessions AS s
SET scopes = $2, expires_at = greatest(s.expires_at, $3::timestamptz + make_interval(secs => $4))
WHERE s.id = $1 AND (s.scopes <> $2 OR s.expires_at < $3::timestamptz + make_interval(secs => $4 / 2));

-- name: has_service_grant
-- Whether the client $1 has a grant to itself. Needs: oauth_grants (client_id, resource) of service grants.
SELECT EXISTS (
    SELECT FROM keyproxy.oauth_grants AS g WHERE g.client_id = $1 AND g.is_service
) AS has_one;

-- name: revoke_refresh_token
-- Ends the session of the refresh token with the digest $1, if it is of the client $2.
-- Needs: oauth_refresh_tokens (digest), oauth_sessions (id), oauth_grants (id).
DELETE FROM keyproxy.oauth_sessions AS s
USING keyproxy.oauth_refresh_tokens AS r, keyproxy.oauth_grants AS g
WHERE r.digest = $1 AND s.id = r.session_id AND g.id = s.grant_id AND g.client_id = $2
RETURNING g.user_id;

-- name: revoke_access_token
-- Deletes the access token with the digest $1, if it is of the client $2.
-- Needs: oauth_access_tokens (digest), oauth_sessions (id), oauth_grants (id).
DELETE FROM keyproxy.oauth_access_tokens AS a
USING keyproxy.oauth_sessions AS s, keyproxy.oauth_grants AS g
WHERE a.digest = $1 AND s.id = a.session_id AND g.id = s.grant_id AND g.client_id = $2
RETURNING g.user_id;

-- name: oauth_access_token
-- The access token with the digest $1, if it works as of $2, null: now, as the proxy judges it. $3: the resource of live
-- traffic, then that of test traffic. Of the client $4, the tenant $5, if not null. Times that an SQL client has made infinite
-- are shown as far ones.
-- Needs: oauth_access_tokens (digest), oauth_sessions (id), oauth_grants (id), oauth_clients (id), users (id), tenants (id),
-- api_keys (id), roles (id).
SELECT keyproxy.effective_scopes(a.scopes, '{}', u.roles, t.roles) AS scopes, s.presented_as, g.user_id, g.resource,
       greatest(a.issued_at, timestamptz 'epoch') AS issued_at,
       least(a.expires_at, s.expires_at, m.now + interval '100 years') AS expires_at, a.bound_to
FROM (SELECT coalesce($2::timestamptz, clock_timestamp()) AS now) AS m
JOIN keyproxy.oauth_access_tokens AS a ON a.digest = $1 AND a.expires_at > m.now
JOIN keyproxy.oauth_sessions AS s ON s.id = a.session_id AND s.expires_at > m.now
JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id AND g.resource = ($3::text[])[CASE WHEN g.is_test THEN 2 ELSE 1 END]
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id AND c.disabled_at IS NULL
JOIN keyproxy.users AS u ON u.id = g.user_id AND u.disabled_at IS NULL
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id AND t.disabled_at IS NULL
WHERE ($4::text IS NULL OR c.id = $4) AND ($5::text IS NULL OR t.id = $5)
  AND NOT EXISTS (SELECT FROM keyproxy.api_keys AS k WHERE k.id = s.via_key AND k.suspended_at IS NOT NULL);

-- name: use_oauth_assertion
-- Records the use of the assertion with the digest $1, which expires at $2. No row: it was used before.
-- Needs: oauth_assertions (digest).
INSERT INTO keyproxy.oauth_assertions (digest, expires_at) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING digest;

-- name: responds
-- Whether the store responds, for the readiness of processes without a query of their own.
SELECT true AS responds;

-- name: oauth_subject_user
-- The user that the subject $2 of the issuer $1 is linked to. Needs: oauth_subjects (issuer, subject).
SELECT u.id AS user_id, u.tenant_id, u.disabled_at IS NOT NULL OR t.disabled_at IS NOT NULL AS is_disabled
FROM keyproxy.oauth_subjects AS s
JOIN keyproxy.users AS u ON u.id = s.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
WHERE s.issuer = $1 AND s.subject = $2;

-- name: oauth_create_user
-- Creates the user $1 of the tenant $2, if that exists and has not been disabled.
INSERT INTO keyproxy.users (id, tenant_id)
SELECT $1, t.id FROM keyproxy.tenants AS t WHERE t.id = $2 AND t.disabled_at IS NULL
ON CONFLICT (id) DO NOTHING;

-- name: oauth_link_subject
-- Links the subject $2 of the issuer $1 to the user $3, if that is one of the tenant $4. An existing link stays.
INSERT INTO keyproxy.oauth_subjects (issuer, subject, user_id)
SELECT $1, $2, u.id FROM keyproxy.users AS u WHERE u.id = $3 AND u.tenant_id = $4
ON CONFLICT (issuer, subject) DO NOTHING;

-- name: oauth_clients_by_id
-- The OAuth clients with the ids $1. Needs: oauth_clients (id).
SELECT c.id, c.client_id, c.kind, c.name, c.redirect_uris, c.auth_method, c.secret_digest, c.jwks::text AS jwks,
    c.tls_subject, c.disabled_at
FROM keyproxy.oauth_clients AS c
WHERE c.id = ANY ($1::text[]);

-- name: oauth_client_of_credential
-- The OAuth client that presented itself as $1 and was issued the code or token with the digest $2.
-- Needs: oauth_codes (digest), oauth_refresh_tokens (digest), oauth_access_tokens (digest).
SELECT c.id, c.client_id, c.kind, c.name, c.redirect_uris, c.auth_method, c.secret_digest, c.jwks::text AS jwks,
    c.tls_subject, c.disabled_at
FROM (
    SELECT o.grant_id FROM keyproxy.oauth_codes AS o WHERE o.digest = $2 AND o.client_id = $1
    UNION ALL
    SELECT s.grant_id FROM keyproxy.oauth_refresh_tokens AS r
    JOIN keyproxy.oauth_sessions AS s ON s.id = r.session_id
    WHERE r.digest = $2 AND s.presented_as = $1
    UNION ALL
    SELECT s.grant_id FROM keyproxy.oauth_access_tokens AS a
    JOIN keyproxy.oauth_sessions AS s ON s.id = a.session_id
    WHERE a.digest = $2 AND s.presented_as = $1
) AS issued
JOIN keyproxy.oauth_grants AS g ON g.id = issued.grant_id
JOIN keyproxy.oauth_clients AS c ON c.id = g.client_id
LIMIT 1;

-- name: tend_oauth
-- Deletes what has ended, at most $1 rows of each table: see the function. $2: the days of a grant without a session; $3: where
-- the previous call has stopped; $4: the time, null: now.
SELECT t.next, t.is_more, t.sessions
FROM keyproxy.tend_oauth($1, $2, $3, coalesce($4::timestamptz, clock_timestamp())) AS t;
