-- Reminders of keys that expire soon, written before they are sent.

-- One row for each key, expiry and threshold, and so one id, however often it is sent: what has an id that the receiver
-- knows is the same. Who sends claims a row by moving `next_at` ahead; if it dies on the way, the row is free again then.
CREATE TABLE keyproxy.reminders (
    id          text PRIMARY KEY CHECK (id ~ '^rem_[0-9a-f]{32}$'),
    key_id      text NOT NULL REFERENCES keyproxy.api_keys (id) ON UPDATE CASCADE ON DELETE CASCADE,
    expires_at  timestamptz NOT NULL,
    before_days integer NOT NULL CHECK (before_days > 0),
    created_at  timestamptz NOT NULL DEFAULT now(),
    next_at     timestamptz NOT NULL DEFAULT now(),
    attempts    integer NOT NULL DEFAULT 0,
    sent_at     timestamptz,
    given_up_at timestamptz,
    last_error  text CHECK (length(last_error) <= 500),
    UNIQUE (key_id, expires_at, before_days)
);
CREATE INDEX reminders_waiting ON keyproxy.reminders (next_at) WHERE sent_at IS NULL AND given_up_at IS NULL;
CREATE INDEX reminders_expires_at ON keyproxy.reminders (expires_at);

-- What expires soon is looked for once a minute, and whenever metrics are scraped.
CREATE INDEX api_keys_expires_at ON keyproxy.api_keys (expires_at) WHERE expires_at IS NOT NULL AND revoked_at IS NULL;

-- Keys that work and end some day, and that no working key has replaced: whose end somebody would want to know of.
CREATE VIEW keyproxy.expiring_keys AS
SELECT k.id, k.user_id, u.tenant_id, k.hint, k.name, k.is_test, k.created_at, k.expires_at
FROM keyproxy.api_keys AS k
JOIN keyproxy.users AS u ON u.id = k.user_id
JOIN keyproxy.tenants AS t ON t.id = u.tenant_id
WHERE k.revoked_at IS NULL AND k.expires_at > now() AND u.disabled_at IS NULL AND t.disabled_at IS NULL
  AND NOT EXISTS (
      SELECT FROM keyproxy.api_keys AS s
      WHERE s.replaces = k.id AND s.revoked_at IS NULL AND (s.expires_at IS NULL OR s.expires_at > now())
  );
