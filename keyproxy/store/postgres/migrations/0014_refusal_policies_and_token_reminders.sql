-- The limit that refused a request, in its event; and reminders of tokens of the admin API that expire soon.

-- The policy is the last part of what events have in common, and missing where no limit refused. Columns are added at the
-- end alone: a view keeps the order of those it has.
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
       e.event -> 2 ->> 8 AS policy
FROM keyproxy.usage_event_batches AS b
CROSS JOIN LATERAL json_array_elements(b.events) WITH ORDINALITY AS e (event, place);

-- A reminder is of a key or of a token. A program that knows keys alone leaves those of tokens where they are.
ALTER TABLE keyproxy.reminders
    ALTER COLUMN key_id DROP NOT NULL,
    ADD COLUMN token_id text REFERENCES keyproxy.admin_tokens (id) ON UPDATE CASCADE ON DELETE CASCADE,
    ADD CONSTRAINT reminders_subject CHECK (num_nonnulls(key_id, token_id) = 1),
    ADD CONSTRAINT reminders_token UNIQUE (token_id, expires_at, before_days);

-- Tokens that work and end some day. What replaces one is not known: an old token is revoked once it is not in use.
CREATE VIEW keyproxy.expiring_admin_tokens AS
SELECT a.id, a.tenant_id, a.hint, a.name, a.created_at, a.expires_at
FROM keyproxy.admin_tokens AS a
LEFT JOIN keyproxy.tenants AS t ON t.id = a.tenant_id
WHERE a.revoked_at IS NULL AND a.expires_at > now() AND t.disabled_at IS NULL;
