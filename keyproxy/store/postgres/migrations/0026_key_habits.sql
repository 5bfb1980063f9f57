-- Suspended keys, the habits of keys, and signals that a key behaves unlike itself. And the client of a request, in its event.
--
-- Expand only. The previous release reads none of it: it serves suspended keys, whose digests are changes to it like any other.

ALTER TABLE keyproxy.api_keys ADD COLUMN suspended_at timestamptz, ADD COLUMN suspend_reason text;
-- Not validated, because all existing rows have nulls: that would lock the table while all of it is read.
ALTER TABLE keyproxy.api_keys
    ADD CONSTRAINT api_keys_suspend_reason_check CHECK (length(suspend_reason) <= 500) NOT VALID,
    ADD CONSTRAINT api_keys_suspension CHECK (suspend_reason IS NULL OR suspended_at IS NOT NULL) NOT VALID;
CREATE INDEX api_keys_lineage ON keyproxy.api_keys (lineage) WHERE lineage IS NOT NULL;
COMMENT ON COLUMN keyproxy.api_keys.suspended_at IS 'null: the key is not suspended; unlike a revocation, this can be undone';

-- As 0022_agents.sql has made it; a key that is suspended or resumed is a changed key, and so are the live tokens below it.
CREATE OR REPLACE FUNCTION keyproxy.note_key_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    of_kind text := 'key';
BEGIN
    IF TG_OP = 'UPDATE'
       AND (OLD.id, OLD.user_id, OLD.digest, OLD.scopes, OLD.roles, OLD.is_test, OLD.expires_at, OLD.revoked_at,
            OLD.acts_for, OLD.suspended_at IS NULL)
           IS NOT DISTINCT FROM
           (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.roles, NEW.is_test, NEW.expires_at, NEW.revoked_at,
            NEW.acts_for, NEW.suspended_at IS NULL) THEN
        of_kind := 'key_limits';
    END IF;
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_change(of_kind, encode(OLD.digest, 'hex'));
        PERFORM keyproxy.note_tokens_of_key(of_kind, OLD.id);
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.digest <> OLD.digest THEN
        PERFORM keyproxy.note_change('key', encode(NEW.digest, 'hex'));
    END IF;
    -- Replication and restores may bring tokens before their keys: those tokens are unknown until then.
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.id <> OLD.id THEN
        PERFORM keyproxy.note_tokens_of_key('key', NEW.id);
    END IF;
    -- A key that gets a successor, or loses one, keeps what it may do: only the field about its replacement changes.
    IF OLD.replaces IS DISTINCT FROM NEW.replaces THEN
        PERFORM keyproxy.note_change('key_limits', encode(k.digest, 'hex'))
        FROM keyproxy.api_keys AS k WHERE k.id IN (OLD.replaces, NEW.replaces);
    END IF;
    RETURN NULL;
END
$$;

DROP TRIGGER note_update ON keyproxy.api_keys;
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.api_keys FOR EACH ROW
    WHEN ((OLD.id, OLD.user_id, OLD.digest, OLD.scopes, OLD.roles, OLD.is_test, OLD.plan_id, OLD.expires_at,
           OLD.revoked_at, OLD.replaces, OLD.lineage, OLD.acts_for, OLD.suspended_at IS NULL)
          IS DISTINCT FROM
          (NEW.id, NEW.user_id, NEW.digest, NEW.scopes, NEW.roles, NEW.is_test, NEW.plan_id, NEW.expires_at,
           NEW.revoked_at, NEW.replaces, NEW.lineage, NEW.acts_for, NEW.suspended_at IS NULL))
    EXECUTE FUNCTION keyproxy.note_key_change();
ALTER TABLE keyproxy.api_keys ENABLE ALWAYS TRIGGER note_update;

-- As 0022_agents.sql has made it; a suspended key mints no tokens.
CREATE OR REPLACE FUNCTION keyproxy.minting_authority(
    key_id text, token_id text, for_user text, new_agent text, OUT refusal text, OUT user_id text, OUT tenant_id text,
    OUT actor_user_id text, OUT is_test boolean, OUT agents text[], OUT held text[], OUT grantable text[],
    OUT token_budget bigint, OUT request_budget bigint, OUT expires_at timestamptz, OUT is_agent_new boolean
) LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    right_now constant timestamptz := clock_timestamp();
    depth_max constant int := 3;
    effective_scopes_max constant int := 128;
    root record;
    principal record;
    link record;
    agent record;
    next_token text := token_id;
    ceiling text[];
BEGIN
    SELECT k.user_id, k.scopes, k.roles, k.is_test, k.expires_at, k.revoked_at, k.suspended_at, k.acts_for, u.tenant_id,
           u.roles AS user_roles, t.roles AS tenant_roles, coalesce(u.disabled_at, t.disabled_at) AS disabled_at
    INTO root
    FROM keyproxy.api_keys AS k
    JOIN keyproxy.users AS u ON u.id = k.user_id
    JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
    WHERE k.id = key_id;
    IF NOT FOUND THEN
        refusal := 'the key does not exist';
        RETURN;
    END IF;
    IF token_id IS NULL THEN
        user_id := coalesce(for_user, root.user_id);
        actor_user_id := CASE WHEN for_user IS NOT NULL THEN root.user_id END;
    ELSE
        SELECT t.user_id, t.actor_user_id INTO principal FROM keyproxy.agent_tokens AS t WHERE t.id = token_id;
        user_id := principal.user_id;
        actor_user_id := principal.actor_user_id;
    END IF;
    SELECT u.id, u.tenant_id, u.roles, u.disabled_at INTO principal FROM keyproxy.users AS u WHERE u.id = user_id;
    tenant_id := root.tenant_id;
    is_test := root.is_test;
    expires_at := root.expires_at;
    refusal := CASE
        WHEN root.revoked_at IS NOT NULL THEN 'the key is revoked'
        WHEN root.expires_at <= right_now THEN 'the key has expired'
        WHEN root.disabled_at IS NOT NULL THEN 'the owner or the tenant is disabled'
        WHEN root.suspended_at IS NOT NULL THEN 'the key is suspended'
        WHEN principal.id IS NULL THEN 'the user or the token does not exist'
        WHEN token_id IS NOT NULL AND for_user <> user_id THEN 'the token is of another user'
        WHEN principal.disabled_at IS NOT NULL THEN 'the user is disabled'
        WHEN principal.tenant_id <> root.tenant_id THEN 'the user is of another tenant'
        WHEN actor_user_id IS NULL AND user_id <> root.user_id OR actor_user_id <> root.user_id THEN 'the key has another owner'
        WHEN actor_user_id IS NOT NULL AND root.acts_for <> 'tenant' THEN 'the key acts for no other user'
    END;
    IF refusal IS NOT NULL THEN
        RETURN;
    END IF;
    held := keyproxy.effective_scopes(root.scopes, root.roles, root.user_roles, root.tenant_roles);
    IF cardinality(held) > effective_scopes_max THEN
        held := '{}';
    END IF;
    IF actor_user_id IS NOT NULL THEN
        ceiling := keyproxy.scopes_of_roles(principal.roles);
        held := ARRAY(SELECT s.scope FROM unnest(held) AS s (scope) WHERE ceiling IS NULL OR s.scope = ANY (ceiling));
    END IF;
    agents := '{}';
    WHILE next_token IS NOT NULL LOOP
        SELECT t.scopes, t.expires_at, t.revoked_at, t.token_budget, t.request_budget, t.parent_token_id, t.agent_id,
               t.user_id, t.actor_user_id, t.root_key_id, a.roles, a.disabled_at
        INTO link
        FROM keyproxy.agent_tokens AS t
        JOIN keyproxy.agents AS a ON a.user_id = t.user_id AND a.id = t.agent_id
        WHERE t.id = next_token;
        refusal := CASE
            WHEN link.root_key_id IS DISTINCT FROM key_id OR link.user_id <> user_id
                 OR link.actor_user_id IS DISTINCT FROM actor_user_id OR cardinality(agents) > depth_max
                THEN 'the token was not cut from this key'
            WHEN link.revoked_at IS NOT NULL THEN 'a token of the chain is revoked'
            WHEN link.expires_at <= right_now THEN 'a token of the chain has expired'
            WHEN link.disabled_at IS NOT NULL THEN 'an agent of the chain is disabled'
        END;
        IF refusal IS NOT NULL THEN
            RETURN;
        END IF;
        ceiling := keyproxy.scopes_of_roles(link.roles);
        held := ARRAY(
            SELECT s.scope FROM unnest(held) AS s (scope)
            WHERE s.scope = ANY (link.scopes) AND (ceiling IS NULL OR s.scope = ANY (ceiling))
        );
        agents := agents || link.agent_id;
        expires_at := least(expires_at, link.expires_at);
        token_budget := least(token_budget, link.token_budget);
        request_budget := least(request_budget, link.request_budget);
        next_token := link.parent_token_id;
    END LOOP;
    grantable := held;
    SELECT a.roles, a.disabled_at INTO agent FROM keyproxy.agents AS a WHERE a.user_id = principal.id AND a.id = new_agent;
    is_agent_new := NOT FOUND;
    IF is_agent_new THEN
        PERFORM FROM keyproxy.agents AS a WHERE a.user_id = principal.id OFFSET 999 LIMIT 1;
        IF FOUND THEN
            refusal := 'the user has 1000 agents already';
        END IF;
    ELSIF agent.disabled_at IS NOT NULL THEN
        refusal := 'the agent is disabled';
    ELSE
        ceiling := keyproxy.scopes_of_roles(agent.roles);
        grantable := ARRAY(SELECT s.scope FROM unnest(held) AS s (scope) WHERE ceiling IS NULL OR s.scope = ANY (ceiling));
    END IF;
END
$$;

-- The models and networks that a key was used with. `kind` is the signal that a further value raises. The value `many` stands
-- for all networks beyond the number that proxies learn.
CREATE TABLE keyproxy.key_habits (
    key_id        text NOT NULL REFERENCES keyproxy.api_keys (id) ON UPDATE CASCADE ON DELETE CASCADE,
    kind          text NOT NULL CHECK (kind IN ('new_model', 'new_network')),
    value         text NOT NULL CHECK (length(value) BETWEEN 1 AND 256),
    first_seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (key_id, kind, value)
);

-- What was reported, so that each signal of a key or network with one value is reported once in an hour (UTC). Deleted after
-- two days. The subject is the id of a key, or a network.
CREATE TABLE keyproxy.anomalies (
    kind    text NOT NULL CHECK (kind IN ('new_model', 'new_network', 'velocity', 'burst', 'probing', 'failures')),
    subject text NOT NULL,
    value   text NOT NULL,
    hour    timestamptz NOT NULL,
    PRIMARY KEY (hour, kind, subject, value)
);

-- The suspensions by signals: they are counted, and a signal does not suspend a key again soon after an operator has resumed
-- it. Without a foreign key, so that deleting a key does not make room for another suspension. Deleted after two days.
CREATE TABLE keyproxy.key_suspensions (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key_id       text NOT NULL,
    kind         text NOT NULL,
    suspended_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    resumed_at   timestamptz
);
CREATE INDEX key_suspensions_suspended_at ON keyproxy.key_suspensions (suspended_at);
CREATE INDEX key_suspensions_key_id ON keyproxy.key_suspensions (key_id);

-- A key as events show it.
CREATE FUNCTION keyproxy.shown_key(wanted text) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object('key', k.id, 'hint', k.hint, 'user', k.user_id, 'tenant', u.tenant_id, 'is_test', k.is_test)
    FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id WHERE k.id = wanted
$$;

-- Any suspension is an event, also one by an operator or by SQL. Messages are not worth sending after a day.
CREATE FUNCTION keyproxy.note_suspension() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.suspended_at IS NOT NULL THEN
        PERFORM keyproxy.note_event(
            'key.suspended',
            keyproxy.shown_key(NEW.id) || jsonb_build_object(
                'reason', NEW.suspend_reason, 'by', keyproxy.actor(),
                'suspended_at', to_char(NEW.suspended_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
            ),
            clock_timestamp() + interval '24 hours'
        );
    ELSE
        UPDATE keyproxy.key_suspensions AS s SET resumed_at = clock_timestamp()
        WHERE s.key_id = OLD.id AND s.resumed_at IS NULL;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER suspension AFTER UPDATE ON keyproxy.api_keys FOR EACH ROW
    WHEN ((OLD.suspended_at IS NULL) <> (NEW.suspended_at IS NULL)) EXECUTE FUNCTION keyproxy.note_suspension();

-- Suspend a key because of a signal, which proxies may do by this function only. `hourly_max`: suspensions by signals in any
-- hour, exact over all proxies, since only one of them counts at a time. Returns `suspended`; `unchanged`: it does not exist,
-- or does not work anyway; or `withheld`: too many are suspended already, or it was resumed after this signal within an hour.
CREATE FUNCTION keyproxy.suspend_key(of_key text, of_kind text, because text, hourly_max int) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '900ms' AS $$
DECLARE
    hour_ago timestamptz;
BEGIN
    IF of_kind NOT IN ('new_model', 'new_network', 'velocity', 'burst') THEN
        RAISE EXCEPTION 'the signal % suspends no key', of_kind USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('keyproxy.suspend_key', 0));
    PERFORM FROM keyproxy.api_keys AS k
    WHERE k.id = of_key AND k.suspended_at IS NULL AND k.revoked_at IS NULL
      AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'unchanged';
    END IF;
    hour_ago := clock_timestamp() - interval '1 hour';
    IF EXISTS (SELECT FROM keyproxy.key_suspensions AS s
               WHERE s.key_id = of_key AND s.kind = of_kind AND s.resumed_at > hour_ago)
       OR (SELECT count(*) FROM keyproxy.key_suspensions AS s WHERE s.suspended_at > hour_ago) >= hourly_max THEN
        RETURN 'withheld';
    END IF;
    INSERT INTO keyproxy.key_suspensions (key_id, kind) VALUES (of_key, of_kind);
    UPDATE keyproxy.api_keys AS k SET suspended_at = clock_timestamp(), suspend_reason = left(because, 500)
    WHERE k.id = of_key;
    RETURN 'suspended';
END
$$;

-- Report a signal: an event and a row of the audit log, once for each key or network, value and hour. `of_key` null: the
-- signal is about a network. `hourly_max` null: the signal only reports. `shared_since`: it does not suspend the key either if
-- another one of its rotations was used since then, because they share limits; null: that does not matter.
-- `baseline`: no signal if the key has sent that many requests or more since yesterday; null: any number.
-- Returns `known`: it was reported before, `none`: there is no such key, or the requests explain it; `reported`; `suspended`;
-- or `withheld`.
CREATE FUNCTION keyproxy.note_anomaly(
    of_kind text, of_key text, of_network text, of_value text, of_client text, observed jsonb, hourly_max int,
    shared_since timestamptz, baseline bigint
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '900ms' AS $$
DECLARE
    right_now constant timestamptz := clock_timestamp();
    shown jsonb := jsonb_build_object('key', NULL, 'hint', NULL, 'user', NULL, 'tenant', NULL, 'is_test', NULL);
    because text;
    outcome text := 'reported';
BEGIN
    IF of_key IS NOT NULL THEN
        shown := keyproxy.shown_key(of_key);
        IF shown IS NULL THEN
            RETURN 'none';
        END IF;
    END IF;
    IF baseline IS NOT NULL AND baseline <= (
        SELECT sum(u.requests) FROM keyproxy.usage AS u
        WHERE u.key_id = of_key AND u.day >= (right_now AT TIME ZONE 'UTC')::date - 1
    ) THEN
        RETURN 'none';
    END IF;
    INSERT INTO keyproxy.anomalies (kind, subject, value, hour)
    VALUES (of_kind, coalesce(of_key, of_network), of_value, date_trunc('hour', right_now, 'UTC'))
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN 'known';
    END IF;
    PERFORM set_config('keyproxy.actor', 'signal:' || of_kind, true);
    IF of_key IS NOT NULL AND hourly_max IS NOT NULL AND NOT EXISTS (
        SELECT FROM keyproxy.api_keys AS k
        JOIN keyproxy.api_keys AS o ON o.id <> k.id AND (o.id = k.lineage OR o.lineage = coalesce(k.lineage, k.id))
        WHERE k.id = of_key AND o.last_used_at >= shared_since
    ) THEN
        because := 'signal ' || of_kind || CASE WHEN of_value = '' THEN '' ELSE ': ' || of_value END;
        outcome := keyproxy.suspend_key(of_key, of_kind, because, hourly_max);
        IF outcome = 'unchanged' THEN
            outcome := 'reported';
        END IF;
    END IF;
    shown := shown || jsonb_build_object(
        'signal', of_kind, 'value', nullif(of_value, ''), 'network', of_network, 'client', of_client, 'observed', observed,
        'suspended', outcome = 'suspended',
        'at', to_char(right_now AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
    );
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, after)
    VALUES (
        keyproxy.actor(), keyproxy.origin(), 'anomaly', CASE WHEN of_key IS NULL THEN 'network' ELSE 'key' END,
        coalesce(of_key, of_network), shown ->> 'tenant', shown
    );
    PERFORM keyproxy.note_event('key.anomaly', shown, right_now + interval '24 hours');
    RETURN outcome;
END
$$;

-- Learn habits of keys: each value with its outcome. `known`; `learned`: within the first 24 hours of its kind; `new`: after
-- that; `many`: the key has as many networks as are learned, which is reported once as `many_new`; `none`: there is no such key.
CREATE FUNCTION keyproxy.learn_habits(keys text[], kinds text[], habits text[], networks_max int)
RETURNS TABLE (place int, outcome text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '900ms' AS $$
DECLARE
    one record;
    learned text;
BEGIN
    -- In one order in all proxies, which lock the keys.
    FOR one IN
        SELECT h.key, h.kind, h.habit, h.place::int AS place
        FROM unnest(keys, kinds, habits) WITH ORDINALITY AS h (key, kind, habit, place) ORDER BY h.key, h.place
    LOOP
        place := one.place;
        learned := one.habit;
        outcome := 'known';
        IF NOT EXISTS (SELECT FROM keyproxy.key_habits AS h
                       WHERE h.key_id = one.key AND h.kind = one.kind AND h.value = one.habit) THEN
            IF one.kind = 'new_network' THEN
                PERFORM pg_advisory_xact_lock(hashtextextended('keyproxy.learn_habits ' || one.key, 0));
                IF networks_max <= (SELECT count(*) FROM keyproxy.key_habits AS h
                                    WHERE h.key_id = one.key AND h.kind = one.kind AND h.value <> 'many') THEN
                    learned := 'many';
                    outcome := 'many';
                END IF;
            END IF;
            INSERT INTO keyproxy.key_habits (key_id, kind, value)
            SELECT k.id, one.kind, learned FROM keyproxy.api_keys AS k WHERE k.id = one.key
            ON CONFLICT DO NOTHING;
            IF FOUND THEN
                SELECT CASE WHEN min(h.first_seen_at) > clock_timestamp() - interval '24 hours'
                            THEN CASE outcome WHEN 'many' THEN 'many' ELSE 'learned' END
                            ELSE CASE outcome WHEN 'many' THEN 'many_new' ELSE 'new' END END
                INTO outcome
                FROM keyproxy.key_habits AS h WHERE h.key_id = one.key AND h.kind = one.kind;
            ELSIF NOT EXISTS (SELECT FROM keyproxy.api_keys AS k WHERE k.id = one.key) THEN
                outcome := 'none';
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Delete what is no longer needed to report once, to count, or to spare a resumed key. Whether there may be more.
CREATE FUNCTION keyproxy.tend_anomalies(portion int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '250ms' AS $$
DECLARE
    long_ago constant timestamptz := clock_timestamp() - interval '48 hours';
    gone bigint;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('keyproxy.tend_anomalies', 0)) THEN
        RETURN false;
    END IF;
    DELETE FROM keyproxy.key_suspensions AS s WHERE s.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.key_suspensions AS o
        WHERE o.suspended_at < long_ago AND (o.resumed_at < long_ago
              OR NOT EXISTS (SELECT FROM keyproxy.api_keys AS k WHERE k.id = o.key_id AND k.suspended_at IS NOT NULL))
        ORDER BY o.suspended_at LIMIT portion
    ));
    DELETE FROM keyproxy.anomalies AS a WHERE (a.hour, a.kind, a.subject, a.value) IN (
        SELECT o.hour, o.kind, o.subject, o.value FROM keyproxy.anomalies AS o
        WHERE o.hour < long_ago ORDER BY o.hour LIMIT portion
    );
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone >= portion;
END
$$;

REVOKE EXECUTE ON FUNCTION keyproxy.suspend_key(text, text, text, int),
    keyproxy.note_anomaly(text, text, text, text, text, jsonb, int, timestamptz, bigint), keyproxy.tend_anomalies(int)
    FROM PUBLIC;

-- The client stands behind what belongs to agents. The previous release writes events without it, and skips it when it reads.
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
       e.event -> 2 ->> 16 AS agent_token_id,
       e.event -> 2 ->> 17 AS client
FROM keyproxy.usage_event_batches AS b
CROSS JOIN LATERAL json_array_elements(b.events) WITH ORDINALITY AS e (event, place);
