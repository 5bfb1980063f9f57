-- Requests with an Idempotency-Key: which were charged, so that the same one is charged once. docs/ledger.md says more.

-- fingerprint: a digest of whose request it is, the key and all that it asks for; neither can be had from it.
-- tokens: the most that any attempt has used, which all of them together were charged.
-- Only what no index holds is updated, and rows leave room: such updates stay on their page.
CREATE TABLE keyproxy.idempotent_charges (
    fingerprint bytea PRIMARY KEY CHECK (length(fingerprint) = 32),
    tokens      bigint NOT NULL CHECK (tokens >= 0),
    tokens_were bigint NOT NULL,
    charged_at  timestamptz NOT NULL
) WITH (fillfactor = 80);
COMMENT ON COLUMN keyproxy.idempotent_charges.tokens_were IS 'what tokens was before the latest claim; -1: nothing was charged';
CREATE INDEX idempotent_charges_charged_at ON keyproxy.idempotent_charges (charged_at);

-- The last batch of claims of each process, and what it was answered: a batch that is told twice counts once.
CREATE TABLE keyproxy.claim_batches (
    process     text PRIMARY KEY,
    batch       bigint NOT NULL,
    is_first    boolean[] NOT NULL DEFAULT '{}',
    charged     bigint[] NOT NULL DEFAULT '{}',
    told_at     timestamptz NOT NULL
) WITH (fillfactor = 60);

-- One batch of claims: attempts that have ended. Who claims a fingerprint first is charged; who comes after it within 24
-- hours, only what tokens it used beyond any attempt before. The answers are in the order of the claims: whether it is the
-- first, and the tokens it is charged.
-- paid: what an attempt was told that was charged already, when it was let through because of that. It is never the first;
-- if what it was told of is too old by now, the row it leaves is too old from the start.
-- Told again, a batch gets the same answer. No row: a later one was heard already.
-- Rows in the order of their key, so that two processes do not wait for each other.
CREATE FUNCTION keyproxy.claim_charges(
    teller text, number bigint, fingerprints bytea[], used bigint[], paid bigint[],
    OUT is_first boolean[], OUT charged bigint[]
) RETURNS SETOF record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    instant timestamptz := clock_timestamp();
    oldest timestamptz := instant - interval '24 hours';
BEGIN
    INSERT INTO keyproxy.claim_batches AS b (process, batch, told_at) VALUES (teller, number, instant)
    ON CONFLICT (process) DO UPDATE SET batch = excluded.batch, told_at = excluded.told_at
        WHERE b.batch < excluded.batch;
    IF NOT FOUND THEN
        RETURN QUERY SELECT b.is_first, b.charged FROM keyproxy.claim_batches AS b
                     WHERE b.process = teller AND b.batch = number;
        RETURN;
    END IF;
    RETURN QUERY
    WITH claim AS (
        SELECT c.fingerprint, c.used, c.paid, c.place
        FROM unnest(fingerprints, used, paid) WITH ORDINALITY AS c (fingerprint, used, paid, place)
    ), noted AS (
        INSERT INTO keyproxy.idempotent_charges AS k (fingerprint, tokens, tokens_were, charged_at)
        SELECT c.fingerprint, max(c.used), -1, CASE WHEN bool_and(c.paid IS NOT NULL) THEN '-infinity' ELSE instant END
        FROM claim AS c GROUP BY c.fingerprint ORDER BY c.fingerprint
        ON CONFLICT (fingerprint) DO UPDATE
        SET tokens_were = CASE WHEN k.charged_at > oldest THEN k.tokens ELSE -1 END,
            tokens = CASE WHEN k.charged_at > oldest THEN greatest(k.tokens, excluded.tokens) ELSE excluded.tokens END,
            charged_at = CASE WHEN k.charged_at > oldest THEN k.charged_at ELSE excluded.charged_at END
        RETURNING k.fingerprint, k.tokens_were
    ), ranked AS (
        SELECT c.*, n.tokens_were,
               n.tokens_were < 0 AND c.paid IS NULL
               AND row_number() OVER (PARTITION BY c.fingerprint, c.paid IS NULL ORDER BY c.place) = 1 AS is_first,
               max(c.used) OVER (
                   PARTITION BY c.fingerprint ORDER BY c.place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
               ) AS used_before
        FROM claim AS c JOIN noted AS n ON n.fingerprint = c.fingerprint
    ), answer AS (
        SELECT array_agg(r.is_first ORDER BY r.place) AS is_first,
               array_agg(
                   CASE WHEN r.is_first THEN r.used ELSE greatest(0, r.used - greatest(r.tokens_were, r.used_before, r.paid))
                   END ORDER BY r.place
               ) AS charged
        FROM ranked AS r
    )
    UPDATE keyproxy.claim_batches AS b SET is_first = a.is_first, charged = a.charged
    FROM answer AS a WHERE b.process = teller
    RETURNING b.is_first, b.charged;
END
$$;
