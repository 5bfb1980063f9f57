-- Reports of usage read it by an index, regardless of the planner's statistics and of how often a connection prepared them.
--
-- A prepared statement whose filters may be null has one generic plan for all of them, which scans the table; so does a plan
-- that is made before the statistics of a growing table are collected. The first day is never null, so that there is an index
-- condition even for all of the time: the pages are then read in their order. A million rows take 1 to 1.5 s.
--
-- The previous release reads the table itself, as before.

-- Sums grouped by `dimensions`, of one tenant, user and key, from the day `since` until before `until`, where not null.
-- Needs: usage (day …), (tenant_id, day), (user_id, day), (key_id, day).
CREATE FUNCTION keyproxy.usage_by(
    dimensions text[], of_tenant text, of_user text, of_key text, since date, until date, rows_max int
) RETURNS TABLE (
    day date, tenant text, "user" text, key text, mode text, route text, model text, requests numeric, refusals numeric,
    tokens_in numeric, tokens_out numeric, tokens_estimated numeric, tokens_cached numeric, tokens_cache_write numeric,
    tokens_reasoning numeric, cost_micros numeric
) LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT CASE WHEN 'day' = ANY(dimensions) THEN u.day END,
           CASE WHEN 'tenant' = ANY(dimensions) THEN u.tenant_id END,
           CASE WHEN 'user' = ANY(dimensions) THEN u.user_id END,
           CASE WHEN 'key' = ANY(dimensions) THEN u.key_id END,
           CASE WHEN 'mode' = ANY(dimensions) THEN CASE WHEN u.is_test THEN 'test' ELSE 'live' END END,
           CASE WHEN 'route' = ANY(dimensions) THEN u.route END,
           CASE WHEN 'model' = ANY(dimensions) THEN u.model END,
           sum(u.requests), sum(u.refusals), sum(u.tokens_in), sum(u.tokens_out), sum(u.tokens_estimated),
           sum(u.tokens_cached), sum(u.tokens_cache_write), sum(u.tokens_reasoning), sum(u.cost_micros)
    FROM keyproxy.usage AS u
    WHERE (of_tenant IS NULL OR u.tenant_id = of_tenant)
      AND (of_user IS NULL OR u.user_id = of_user)
      AND (of_key IS NULL OR u.key_id = of_key)
      AND u.day >= coalesce(since, '-infinity')
      AND (until IS NULL OR u.day < until)
    GROUP BY 1, 2, 3, 4, 5, 6, 7
    ORDER BY 1, 2, 3, 4, 5, 6, 7
    LIMIT rows_max;
END
$$;

-- Rows after the one with this key, with the filters of usage_by. Needs: as usage_by.
CREATE FUNCTION keyproxy.usage_after(
    after_day date, after_tenant text, after_user text, after_key text, after_test boolean, after_route text, after_model text,
    of_tenant text, of_user text, of_key text, since date, until date, rows_max int
) RETURNS TABLE (
    day date, tenant text, "user" text, key text, mode text, route text, model text, requests bigint, refusals bigint,
    tokens_in bigint, tokens_out bigint, tokens_estimated bigint, tokens_cached bigint, tokens_cache_write bigint,
    tokens_reasoning bigint, cost_micros bigint
) LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT u.day, u.tenant_id, u.user_id, u.key_id, CASE WHEN u.is_test THEN 'test' ELSE 'live' END, u.route, u.model,
           u.requests, u.refusals, u.tokens_in, u.tokens_out, u.tokens_estimated, u.tokens_cached, u.tokens_cache_write,
           u.tokens_reasoning, u.cost_micros
    FROM keyproxy.usage AS u
    WHERE (u.day, u.tenant_id, u.user_id, u.key_id, u.is_test, u.route, u.model)
          > (after_day, after_tenant, after_user, after_key, after_test, after_route, after_model)
      AND (of_tenant IS NULL OR u.tenant_id = of_tenant)
      AND (of_user IS NULL OR u.user_id = of_user)
      AND (of_key IS NULL OR u.key_id = of_key)
      AND u.day >= greatest(since, after_day)
      AND (until IS NULL OR u.day < until)
    ORDER BY u.day, u.tenant_id, u.user_id, u.key_id, u.is_test, u.route, u.model
    LIMIT rows_max;
END
$$;
