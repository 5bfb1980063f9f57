-- A foreign key that has its digest stays known by its prefix, without the hash: who imports the same table again finds it.
ALTER TABLE keyproxy.foreign_hashes ALTER COLUMN hashed DROP NOT NULL;

CREATE OR REPLACE FUNCTION keyproxy.adopt_foreign(wanted text, shown text, becomes bytea) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    adopted text;
BEGIN
    UPDATE keyproxy.foreign_hashes AS f SET hashed = NULL
    WHERE f.prefix = wanted AND sha256(convert_to(f.hashed, 'UTF8')) = sha256(convert_to(shown, 'UTF8'))
    RETURNING f.key_id INTO adopted;
    -- Imported by its digest as well: that one is the key.
    UPDATE keyproxy.api_keys AS k SET digest = becomes
    WHERE k.id = adopted AND NOT EXISTS (SELECT FROM keyproxy.api_keys AS other WHERE other.digest = becomes);
    RETURN adopted;
END
$$;
