-- The actor, the agent and the agent token of a request, in its event. Daily sums are still by the principal, which is the
-- user that a request concerns, and the key.

-- They stand behind what belongs to models, in events of requests that have any of them. The previous release writes events
-- without them, and skips them when it reads.
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
       (e.event -> 2 ->> 13)::bigint AS cost_micros,
       e.event -> 2 ->> 14 AS actor_user_id,
       e.event -> 2 ->> 15 AS agent_id,
       e.event -> 2 ->> 16 AS agent_token_id
FROM keyproxy.usage_event_batches AS b
CROSS JOIN LATERAL json_array_elements(b.events) WITH ORDINALITY AS e (event, place);
