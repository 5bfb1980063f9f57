-- Tokens of the admin API, and its answers that a retried request gets again.

-- Like a key: known by its digest, with an end, and revoked for good. One that is bound to a tenant goes with it.
CREATE TABLE keyproxy.admin_tokens (
    id           text PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9._:@|+-]{0,127}$'),
    digest       bytea NOT NULL UNIQUE CHECK (length(digest) = 32),
    hint         text NOT NULL DEFAULT '' CHECK (length(hint) <= 40),
    name         text NOT NULL DEFAULT '' CHECK (length(name) <= 200),
    scopes       text[] NOT NULL
                 CHECK (cardinality(scopes) <= 64 AND array_position(scopes, NULL) IS NULL
                        AND keyproxy.are_scopes(scopes)),
    tenant_id    text REFERENCES keyproxy.tenants (id) ON UPDATE CASCADE ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    revoked_at   timestamptz,
    last_used_at timestamptz
);
CREATE INDEX admin_tokens_tenant_id ON keyproxy.admin_tokens (tenant_id) WHERE tenant_id IS NOT NULL;

CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON keyproxy.admin_tokens
    FOR EACH ROW EXECUTE FUNCTION keyproxy.audit('token');
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON keyproxy.admin_tokens
    FOR EACH STATEMENT EXECUTE FUNCTION keyproxy.audit_truncate('token');

-- What was answered to a request that came with an Idempotency-Key, written in the transaction of what it changed.
-- Neither the key as the client chose it nor the request itself is kept, and no answer holds a secret.
CREATE TABLE keyproxy.answered_requests (
    token_id     text NOT NULL,
    request_key  bytea NOT NULL CHECK (length(request_key) = 32),
    fingerprint  bytea NOT NULL CHECK (length(fingerprint) = 32),
    answer       jsonb NOT NULL,
    at           timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (token_id, request_key)
);
CREATE INDEX answered_requests_at ON keyproxy.answered_requests (at);
