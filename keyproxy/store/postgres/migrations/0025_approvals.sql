-- Approvals of calls, consents of users, and the outbox of events that webhooks receive.
--
-- Expand only. The previous release reads none of it, and treats the new kinds of changes as a change of every key.

-- An approval of one call. The lifecycle: pending -> approved | denied; approved -> denied | used; used -> approved, if it is
-- given back; all of pending, approved and denied -> expired. At `expires_at` a row is no longer live, whatever its state.
--
-- `claim`: the random value that the proxy chose which uses the approval; it authorises giving the approval back.
CREATE TABLE keyproxy.approvals (
    id          text PRIMARY KEY CHECK (id ~ '^apr_[0-9A-Za-z]{22}$'),
    tenant_id   text NOT NULL REFERENCES keyproxy.tenants (id) ON UPDATE CASCADE ON DELETE CASCADE,
    user_id     text NOT NULL REFERENCES keyproxy.users (id) ON UPDATE CASCADE ON DELETE CASCADE,
    key_id      text NOT NULL,
    agent_id    text,
    kind        text NOT NULL CHECK (kind IN ('consent', 'human', 'admin')),
    tool        text NOT NULL CHECK (tool ~ '^[A-Za-z0-9_.-]{1,128}$'),
    call_digest bytea NOT NULL CHECK (length(call_digest) = 32),
    summary     jsonb NOT NULL DEFAULT '{}'
                CHECK (jsonb_typeof(summary) = 'object' AND octet_length(summary::text) <= 8192),
    client      text CHECK (length(client) <= 64),
    state       text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'approved', 'denied', 'used', 'expired')),
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    decided_at  timestamptz,
    decided_by  text,
    reason      text CHECK (length(reason) <= 500),
    used_at     timestamptz,
    claim       bytea CHECK (length(claim) = 16),
    CHECK ((state = 'used') = (claim IS NOT NULL) AND (state = 'used') = (used_at IS NOT NULL))
);
CREATE UNIQUE INDEX approvals_call_digest ON keyproxy.approvals (call_digest)
    WHERE state IN ('pending', 'approved', 'denied');
CREATE UNIQUE INDEX approvals_claim ON keyproxy.approvals (claim) WHERE claim IS NOT NULL;
CREATE INDEX approvals_user_id ON keyproxy.approvals (user_id, created_at, id);
CREATE INDEX approvals_tenant_id ON keyproxy.approvals (tenant_id, created_at, id);
CREATE INDEX approvals_created_at ON keyproxy.approvals (created_at, id);
CREATE INDEX approvals_pending ON keyproxy.approvals (user_id, expires_at) WHERE state = 'pending';
CREATE INDEX approvals_expires_at ON keyproxy.approvals (expires_at);
CREATE INDEX approvals_live ON keyproxy.approvals (expires_at) WHERE state IN ('pending', 'approved', 'denied');

-- Claims that were given back before the proxy knew whether they had succeeded: one that reaches the server later fails.
CREATE TABLE keyproxy.released_claims (
    claim       bytea PRIMARY KEY CHECK (length(claim) = 16),
    released_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX released_claims_released_at ON keyproxy.released_claims (released_at);

CREATE TABLE keyproxy.consents (
    id          text PRIMARY KEY CHECK (id ~ '^cns_[0-9A-Za-z]{22}$'),
    user_id     text NOT NULL REFERENCES keyproxy.users (id) ON UPDATE CASCADE ON DELETE CASCADE,
    tool        text NOT NULL CHECK (tool ~ '^[A-Za-z0-9_.-]{1,128}$'),
    agent_id    text CHECK (agent_id ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'),
    granted_by  text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    revoked_at  timestamptz,
    CONSTRAINT consents_lifetime CHECK (expires_at > created_at AND expires_at <= created_at + interval '366 days')
);
COMMENT ON COLUMN keyproxy.consents.agent_id IS 'the only agent that the consent is for; null: any agent, and none';
CREATE INDEX consents_user_id ON keyproxy.consents (user_id, created_at, id);
CREATE INDEX consents_created_at ON keyproxy.consents (created_at, id);
CREATE INDEX consents_ended_at ON keyproxy.consents (least(expires_at, revoked_at));

-- Every proxy caches the consents of a user together, so their number is bounded. The lock on the user's row makes the count
-- exact: inserts that count at once would not see each other's rows.
CREATE FUNCTION keyproxy.bound_consents() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM FROM keyproxy.users AS u WHERE u.id = NEW.user_id FOR NO KEY UPDATE;
    PERFORM FROM keyproxy.consents AS c
    WHERE c.user_id = NEW.user_id AND c.id <> NEW.id AND c.revoked_at IS NULL AND c.expires_at > clock_timestamp()
    OFFSET 63 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'user % has 64 live consents already', NEW.user_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'consents_bound';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER bound BEFORE INSERT ON keyproxy.consents FOR EACH ROW
    WHEN (NEW.revoked_at IS NULL) EXECUTE FUNCTION keyproxy.bound_consents();
CREATE TRIGGER bound_update BEFORE UPDATE OF user_id, expires_at, revoked_at ON keyproxy.consents FOR EACH ROW
    WHEN (NEW.revoked_at IS NULL
          AND (OLD.user_id <> NEW.user_id OR OLD.revoked_at IS NOT NULL OR NEW.expires_at > OLD.expires_at))
    EXECUTE FUNCTION keyproxy.bound_consents();

-- The outbox of events, as `reminders`: a sender claims a row by moving `next_at` ahead. After `expires_at` an event is not
-- sent any more.
CREATE TABLE keyproxy.events (
    id          text PRIMARY KEY DEFAULT 'evt_' || replace(gen_random_uuid()::text, '-', '')
                CHECK (id ~ '^evt_[0-9a-f]{32}$'),
    kind        text NOT NULL CHECK (kind ~ '^[a-z_]{1,32}[.][a-z_]{1,32}$'),
    payload     jsonb NOT NULL CHECK (jsonb_typeof(payload) = 'object'),
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at  timestamptz NOT NULL,
    next_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    attempts    integer NOT NULL DEFAULT 0,
    sent_at     timestamptz,
    given_up_at timestamptz,
    last_error  text CHECK (length(last_error) <= 500)
);
CREATE INDEX events_waiting ON keyproxy.events (next_at) WHERE sent_at IS NULL AND given_up_at IS NULL;
CREATE INDEX events_expires_at ON keyproxy.events (expires_at);

CREATE FUNCTION keyproxy.notify_event() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_notify('keyproxy_events', '');
    RETURN NULL;
END
$$;
CREATE TRIGGER notify AFTER INSERT ON keyproxy.events FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.notify_event();

-- Insert an event, with the rights of the caller. Returns its id. `payload`: what the webhook receives as `data`.
CREATE FUNCTION keyproxy.note_event(kind text, payload jsonb, expires_at timestamptz) RETURNS text
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO keyproxy.events (kind, payload, expires_at) VALUES ($1, $2, $3) RETURNING id
$$;

CREATE FUNCTION keyproxy.note_approval_event() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    iso constant text := 'YYYY-MM-DD"T"HH24:MI:SS"Z"';
    decision jsonb := '{}';
BEGIN
    IF TG_OP = 'UPDATE' THEN
        decision := jsonb_build_object(
            'decided_at', to_char(NEW.decided_at AT TIME ZONE 'UTC', iso), 'decided_by', NEW.decided_by, 'reason', NEW.reason
        );
    END IF;
    PERFORM keyproxy.note_event(
        CASE TG_OP WHEN 'INSERT' THEN 'approval.requested' ELSE 'approval.decided' END,
        jsonb_build_object(
            'approval', NEW.id, 'state', NEW.state, 'kind', NEW.kind, 'tool', NEW.tool, 'tenant', NEW.tenant_id,
            'user', NEW.user_id, 'key', NEW.key_id, 'agent', NEW.agent_id, 'client', NEW.client, 'summary', NEW.summary,
            'created_at', to_char(NEW.created_at AT TIME ZONE 'UTC', iso),
            'expires_at', to_char(NEW.expires_at AT TIME ZONE 'UTC', iso)
        ) || decision,
        NEW.expires_at
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER event_requested AFTER INSERT ON keyproxy.approvals FOR EACH ROW
    WHEN (NEW.state = 'pending') EXECUTE FUNCTION keyproxy.note_approval_event();
-- An approval that is given back, used -> approved, was not decided again.
CREATE TRIGGER event_decided AFTER UPDATE OF state ON keyproxy.approvals FOR EACH ROW
    WHEN (OLD.state IN ('pending', 'approved') AND NEW.state IN ('approved', 'denied') AND NEW.state <> OLD.state)
    EXECUTE FUNCTION keyproxy.note_approval_event();

-- The change feed. The subject of a change of consents is the user, that of provider keys is for the migration that creates
-- their table.
ALTER TABLE keyproxy.changes DROP CONSTRAINT changes_kind_check;
ALTER TABLE keyproxy.changes ADD CONSTRAINT changes_kind_check CHECK (kind IN (
    'key', 'user', 'tenant', 'plan', 'all', 'key_limits', 'user_limits', 'tenant_limits', 'window', 'role', 'owned',
    'template', 'signing', 'consent', 'provider_key'
)) NOT VALID;

CREATE FUNCTION keyproxy.note_consent_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' AND least(OLD.expires_at, OLD.revoked_at) < clock_timestamp() - interval '1 day' THEN
        -- Cleanup: no proxy uses it.
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        PERFORM keyproxy.note_change('consent', OLD.user_id);
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.user_id <> OLD.user_id THEN
        PERFORM keyproxy.note_change('consent', NEW.user_id);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER note_insert AFTER INSERT ON keyproxy.consents
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_consent_change();
CREATE TRIGGER note_update AFTER UPDATE ON keyproxy.consents FOR EACH ROW
    WHEN ((OLD.user_id, OLD.tool, OLD.agent_id, OLD.expires_at, OLD.revoked_at)
          IS DISTINCT FROM (NEW.user_id, NEW.tool, NEW.agent_id, NEW.expires_at, NEW.revoked_at))
    EXECUTE FUNCTION keyproxy.note_consent_change();
CREATE TRIGGER note_delete AFTER DELETE ON keyproxy.consents
    FOR EACH ROW EXECUTE FUNCTION keyproxy.note_consent_change();
CREATE TRIGGER note_truncate AFTER TRUNCATE ON keyproxy.consents
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.note_truncate();

-- Also for rows that arrive by logical replication or with session_replication_role = replica.
DO $$
DECLARE
    feed record;
BEGIN
    FOR feed IN
        SELECT tgrelid::regclass AS home, tgname FROM pg_trigger
        WHERE tgname LIKE 'note\_%' AND tgrelid = 'keyproxy.consents'::regclass
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', feed.home, feed.tgname);
    END LOOP;
END
$$;

-- The audit log. As 0002_lineage.sql has made it, with tables that name their tenant, and without sealed secrets, summaries
-- of calls, and the values that authorise giving an approval back.
CREATE OR REPLACE FUNCTION keyproxy.audit() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    unlogged constant text[] := ARRAY['digest', 'last_used_at', 'sealed', 'summary', 'claim'];
    was jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - unlogged END;
    becomes jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - unlogged END;
    shown jsonb := coalesce(becomes, was);
BEGIN
    -- A change of nothing but last_used_at is traffic; a changed digest is a changed key, although it is not shown.
    IF TG_OP = 'UPDATE' AND was = becomes AND to_jsonb(OLD) -> 'digest' IS NOT DISTINCT FROM to_jsonb(NEW) -> 'digest'
       AND to_jsonb(OLD) -> 'sealed' IS NOT DISTINCT FROM to_jsonb(NEW) -> 'sealed' THEN
        RETURN NULL;
    END IF;
    INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, tenant_id, before, after)
    VALUES (
        keyproxy.actor(),
        keyproxy.origin(),
        lower(TG_OP),
        TG_ARGV[0],
        shown ->> 'id',
        CASE TG_ARGV[0]
            WHEN 'tenant' THEN shown ->> 'id'
            WHEN 'user' THEN shown ->> 'tenant_id'
            WHEN 'key' THEN keyproxy.tenant_of_user(shown ->> 'user_id')
            WHEN 'approval' THEN shown ->> 'tenant_id'
            WHEN 'consent' THEN keyproxy.tenant_of_user(shown ->> 'user_id')
            WHEN 'provider_key' THEN shown ->> 'tenant_id'
        END,
        was,
        becomes
    );
    RETURN NULL;
END
$$;

-- One row each for a request, a decision, a use and giving back. Expiry and cleanup are no changes by anyone.
CREATE TRIGGER audit_insert AFTER INSERT ON keyproxy.approvals
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit('approval');
CREATE TRIGGER audit_update AFTER UPDATE ON keyproxy.approvals FOR EACH ROW
    WHEN (NEW.state <> 'expired' OR OLD.state NOT IN ('pending', 'approved', 'denied') OR OLD.expires_at > now())
    EXECUTE FUNCTION keyproxy.audit('approval');
CREATE TRIGGER audit_delete AFTER DELETE ON keyproxy.approvals FOR EACH ROW
    WHEN (OLD.expires_at > now() - interval '30 days') EXECUTE FUNCTION keyproxy.audit('approval');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.approvals
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('approval');
CREATE TRIGGER audit_change AFTER INSERT OR UPDATE ON keyproxy.consents
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit('consent');
CREATE TRIGGER audit_delete AFTER DELETE ON keyproxy.consents FOR EACH ROW
    WHEN (least(OLD.expires_at, OLD.revoked_at) > now() - interval '30 days') EXECUTE FUNCTION keyproxy.audit('consent');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.consents
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('consent');

-- Use the approval of a call, or report why it cannot be used, or ask for it. A proxy, which may write no approval, calls
-- this before it sends anything, with a random `new_claim`.
--
-- `outcome`: `used`, `pending`, `denied`; `limit`, if the user has `pending_max` pending approvals, and no row was made;
-- `gone`, if the user does not exist in that tenant; or `busy`, if another transaction changes the same rows. `waited_seconds`:
-- from the request to the decision, of one that is used.
--
-- A repeated call with the same claim has the same outcome. An approval is used by one statement, so concurrent claims wait
-- for each other and one succeeds. The locks for a new row, in the order in which deletions take them too: the tenant, the
-- user, approvals. That of the user makes the count of its pending approvals exact.
CREATE FUNCTION keyproxy.claim_approval(
    new_id text, new_digest bytea, of_tenant text, of_user text, of_key text, of_agent text, of_kind text, of_tool text,
    new_summary jsonb, new_client text, new_claim bytea, pending_seconds float8, pending_max int,
    OUT outcome text, OUT approval_id text, OUT expires_at timestamptz, OUT waited_seconds float8
) LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '900ms' AS $$
#variable_conflict use_column
DECLARE
    current record;
    shown jsonb;
    hint text;
BEGIN
    -- At other levels the checks would read the rows of an earlier moment.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'approvals are claimed at the isolation level read committed'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM set_config('keyproxy.actor', 'key:' || of_key, true);

    SELECT a.id, a.expires_at INTO current FROM keyproxy.approvals AS a WHERE a.claim = new_claim AND a.call_digest = new_digest;
    IF FOUND THEN
        outcome := 'used';
        approval_id := current.id;
        expires_at := current.expires_at;
        RETURN;
    END IF;
    FOR attempt IN 1..2 LOOP
        UPDATE keyproxy.approvals AS a SET state = 'used', used_at = clock_timestamp(), claim = new_claim
        WHERE a.call_digest = new_digest AND a.state = 'approved' AND a.expires_at > clock_timestamp()
        RETURNING a.id, a.expires_at, extract(epoch FROM a.decided_at - a.created_at)::float8
        INTO claim_approval.approval_id, claim_approval.expires_at, claim_approval.waited_seconds;
        IF FOUND THEN
            -- Not before the row is locked: release_approval writes the claim while it has that lock.
            IF EXISTS (SELECT FROM keyproxy.released_claims AS r WHERE r.claim = new_claim) THEN
                RAISE EXCEPTION 'this claim was given back already' USING ERRCODE = 'object_not_in_prerequisite_state';
            END IF;
            outcome := 'used';
            RETURN;
        END IF;
        SELECT a.id, a.state, a.expires_at INTO current FROM keyproxy.approvals AS a
        WHERE a.call_digest = new_digest AND a.state IN ('pending', 'denied') AND a.expires_at > clock_timestamp();
        IF FOUND THEN
            outcome := current.state;
            approval_id := current.id;
            expires_at := current.expires_at;
            RETURN;
        END IF;
        EXIT WHEN attempt = 2;
        -- At the bound without locks too, so that a caller that keeps asking cannot delay those who change the user.
        IF (SELECT count(*) FROM keyproxy.approvals AS a
            WHERE a.user_id = of_user AND a.state = 'pending' AND a.expires_at > clock_timestamp()) >= pending_max THEN
            outcome := 'limit';
            RETURN;
        END IF;
        -- Another claim may make the row while this one waits for the locks, so it is looked up again.
        PERFORM FROM keyproxy.tenants AS t WHERE t.id = of_tenant FOR KEY SHARE;
        PERFORM FROM keyproxy.users AS u WHERE u.id = of_user AND u.tenant_id = of_tenant FOR NO KEY UPDATE;
        IF NOT FOUND THEN
            outcome := 'gone';
            RETURN;
        END IF;
    END LOOP;
    UPDATE keyproxy.approvals AS a SET state = 'expired'
    WHERE a.call_digest = new_digest AND a.state IN ('pending', 'approved', 'denied') AND a.expires_at <= clock_timestamp();
    IF (SELECT count(*) FROM keyproxy.approvals AS a
        WHERE a.user_id = of_user AND a.state = 'pending' AND a.expires_at > clock_timestamp()) >= pending_max THEN
        outcome := 'limit';
        RETURN;
    END IF;
    SELECT k.hint INTO hint FROM keyproxy.api_keys AS k WHERE k.id = of_key;
    shown := new_summary || jsonb_build_object('key_hint', hint);
    expires_at := clock_timestamp() + make_interval(secs => pending_seconds);
    INSERT INTO keyproxy.approvals (
        id, tenant_id, user_id, key_id, agent_id, kind, tool, call_digest, summary, client, created_at, expires_at
    ) VALUES (
        new_id, of_tenant, of_user, of_key, of_agent, of_kind, of_tool, new_digest, shown, new_client, clock_timestamp(),
        claim_approval.expires_at
    ) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        -- One that was used is given back at this moment.
        outcome := 'busy';
        RETURN;
    END IF;
    outcome := 'pending';
    approval_id := new_id;
EXCEPTION WHEN lock_not_available THEN
    outcome := 'busy';
END
$$;

-- Give a claimed approval back: it is approved again, with its old expiry. Only the proxy that chose the claim knows it.
-- `of_digest`: the digest of the call, if the reply to the claim was lost, so that the claim may still be on its way: then it
-- fails when it arrives. Null: it has succeeded.
--
-- `released`; `gone`, if no unexpired approval is used by this claim, which repeated calls report too; `waiting`, if the same
-- call was approved once more meanwhile: give this one back once that one was used; or `busy`. A pending request for the same
-- call is not needed any more. If the call was denied meanwhile, the approval stays withdrawn.
CREATE FUNCTION keyproxy.release_approval(old_claim bytea, of_digest bytea, OUT outcome text)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '900ms' AS $$
DECLARE
    used record;
    live record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'approvals are given back at the isolation level read committed'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    IF of_digest IS NOT NULL THEN
        -- Waits for a claim that has used the approval and is not committed.
        PERFORM FROM keyproxy.approvals AS a WHERE a.call_digest = of_digest AND a.state = 'approved' FOR NO KEY UPDATE;
        INSERT INTO keyproxy.released_claims (claim) VALUES (old_claim) ON CONFLICT DO NOTHING;
    END IF;
    SELECT a.id, a.key_id, a.call_digest, a.expires_at INTO used FROM keyproxy.approvals AS a
    WHERE a.claim = old_claim AND a.state = 'used' FOR NO KEY UPDATE;
    IF NOT FOUND OR used.expires_at <= clock_timestamp() THEN
        outcome := 'gone';
        RETURN;
    END IF;
    PERFORM set_config('keyproxy.actor', 'key:' || used.key_id, true);
    SELECT a.id, a.state, a.expires_at INTO live FROM keyproxy.approvals AS a
    WHERE a.call_digest = used.call_digest AND a.state IN ('pending', 'approved', 'denied') FOR NO KEY UPDATE;
    IF FOUND AND live.state = 'approved' AND live.expires_at > clock_timestamp() THEN
        outcome := 'waiting';
        RETURN;
    END IF;
    IF live.state = 'denied' AND live.expires_at > clock_timestamp() THEN
        UPDATE keyproxy.approvals AS a SET state = 'expired', used_at = NULL, claim = NULL WHERE a.id = used.id;
        outcome := 'gone';
        RETURN;
    END IF;
    UPDATE keyproxy.approvals AS a SET state = 'expired' WHERE a.id = live.id;
    UPDATE keyproxy.approvals AS a SET state = 'approved', used_at = NULL, claim = NULL WHERE a.id = used.id;
    outcome := 'released';
EXCEPTION WHEN lock_not_available THEN
    outcome := 'busy';
END
$$;

-- Mark what has expired, and delete what ended: approvals, consents and events after 30 days, claims that were given back
-- after one day; `portion` of each at most. Whether there may be more.
CREATE FUNCTION keyproxy.tend_approvals(portion int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET lock_timeout = '250ms' AS $$
DECLARE
    long_ago constant timestamptz := clock_timestamp() - interval '30 days';
    done int;
    most int := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('keyproxy.tend_approvals', 0)) THEN
        RETURN false;
    END IF;
    UPDATE keyproxy.approvals AS a SET state = 'expired' WHERE a.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.approvals AS o
        WHERE o.state IN ('pending', 'approved', 'denied') AND o.expires_at <= clock_timestamp()
        ORDER BY o.expires_at LIMIT portion FOR NO KEY UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    DELETE FROM keyproxy.approvals AS a WHERE a.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.approvals AS o WHERE o.expires_at < long_ago
        ORDER BY o.expires_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    DELETE FROM keyproxy.consents AS c WHERE c.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.consents AS o WHERE least(o.expires_at, o.revoked_at) < long_ago
        ORDER BY least(o.expires_at, o.revoked_at) LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    DELETE FROM keyproxy.events AS e WHERE e.id = ANY (ARRAY(
        SELECT o.id FROM keyproxy.events AS o WHERE o.expires_at < long_ago
        ORDER BY o.expires_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    most := greatest(most, done);
    DELETE FROM keyproxy.released_claims AS r WHERE r.claim = ANY (ARRAY(
        SELECT o.claim FROM keyproxy.released_claims AS o WHERE o.released_at < clock_timestamp() - interval '1 day'
        ORDER BY o.released_at LIMIT portion FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS done = ROW_COUNT;
    RETURN greatest(most, done) >= portion;
END
$$;

REVOKE EXECUTE ON FUNCTION keyproxy.claim_approval(
    text, bytea, text, text, text, text, text, text, jsonb, text, bytea, float8, int
), keyproxy.release_approval(bytea, bytea), keyproxy.tend_approvals(int) FROM PUBLIC;
