-- Keys of other programs, known by a hash that is not ours until they are first used.

-- A key that djangorestframework-api-key issued: found by its prefix, verified by `hashed`. Its row in api_keys is like any
-- other, but for a digest that no key has. On first use it gets its own, and this row goes.
CREATE TABLE keyproxy.foreign_hashes (
    prefix  text PRIMARY KEY CHECK (length(prefix) BETWEEN 1 AND 32),
    key_id  text NOT NULL UNIQUE REFERENCES keyproxy.api_keys (id) ON UPDATE CASCADE ON DELETE CASCADE,
    hashed  text NOT NULL CHECK (length(hashed) <= 500)
);

-- How to hash what is presented under this prefix, without the hash to be met: `sha512$$`, `pbkdf2_sha256$600000$salt$`.
CREATE FUNCTION keyproxy.foreign_recipe(wanted text) RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT left(f.hashed, length(f.hashed) - strpos(reverse(f.hashed), '$') + 1)
    FROM keyproxy.foreign_hashes AS f WHERE f.prefix = wanted
$$;

-- Gives a foreign key its digest. A proxy, which may change no key, may call this: it has to show the hash that was
-- imported, which it cannot read, so that it can adopt a key only while somebody presents it. Once, however many try.
CREATE FUNCTION keyproxy.adopt_foreign(wanted text, shown text, becomes bytea) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    adopted text;
BEGIN
    DELETE FROM keyproxy.foreign_hashes AS f
    WHERE f.prefix = wanted AND sha256(convert_to(f.hashed, 'UTF8')) = sha256(convert_to(shown, 'UTF8'))
    RETURNING f.key_id INTO adopted;
    UPDATE keyproxy.api_keys AS k SET digest = becomes WHERE k.id = adopted;
    RETURN adopted;
END
$$;

REVOKE EXECUTE ON FUNCTION keyproxy.foreign_recipe(text), keyproxy.adopt_foreign(text, text, bytea) FROM PUBLIC;
