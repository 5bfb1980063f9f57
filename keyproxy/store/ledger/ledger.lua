-- The ledger in Redis or Valkey: one call is one atomic operation. limits/ledger/rules.py is the specification;
-- redis_backend.py defines generations and shares. Time is the server's.
--
-- KEYS[1]  hash: the current generation. It is the prefix of all other keys, which expire some days after their last use.
-- ARGV     operation, generation, its arguments as JSON, a message's lines. Numbers are returned as JSON that is formatted
--          here, because cjson rounds.
--
--   <1>:<g>:holders   sorted set: holders by expiry
--   <1>:<g>:h:<id>    hash of one holder: serial, ended, rests, its leases, and w:<name>: how many leases it has of a window
--   <1>:<g>:w:<name>  one window; name is kind:is_test:measure:starts:selector"owner. No selector contains a quote.
--   <1>:<g>:due       sorted set: windows by when they are reported to PostgreSQL; a window with a share is always in it
--
-- This must be fast, because a server has one thread. So lines, leases and windows are sent and stored as structs, and are
-- arrays here, with a named index for each field: Lua tables with keys take twice as long to create and to collect,
-- cmsgpack takes twice as long to read, and small hashes in Redis take even longer.

local call, floor, max, min, pack, unpacked = redis.call, math.floor, math.max, math.min, struct.pack, struct.unpack
local marker, operation, generation = KEYS[1], ARGV[1], ARGV[2]
local base = marker .. ':' .. generation .. ':'
local at_window = base .. 'w:'
local ask = cjson.decode(ARGV[3])
local time = call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000

local DAY, WANTED_SECONDS = 86400, 2
local KEPT_SECONDS = 40 * DAY             -- longer than any window
local OVER_SECONDS = 2 * DAY              -- how long ended holders and windows are kept
local SLACK_SECONDS = 3600                -- extra lifetime, so that a key's expiry need not be updated at every call
local TOLD_SECONDS = 30                   -- interval of reports to PostgreSQL for a window that changes
local SOON_SECONDS = 1                    -- delay of the report for a window that was used beyond its share
local IDLE_SECONDS = 30                   -- a window's share is returned after this time without use
local STOCK_SECONDS = 60                  -- a share is sized to last this long at the recent pace
local HEARTBEAT_SECONDS = 300
local TURN_SECONDS = 5
local PER_SECOND, FEW_HOLDERS = 120, 60   -- messages about a window, and the holders beyond which they have a schedule
local URGENT = 1                          -- due before everything with a time

local function number(value) return tonumber(value) or 0 end
local format = string.format
-- The time since `at`. A time in the future was written before the clock was set back.
local function since(at) return at > now and math.huge or now - at end
local function text(value) return value % 1 == 0 and format('%d', value) or format('%.17g', value) end

-- Identify the data set in this server's memory. A restart, a failover and a full sync from another server each change the
-- server's replication id; nothing else proves that our last write was kept. Replicas are rejected: a replica has the id of
-- its primary and may be writable, so two servers would share one history.
local function history()
    local said = call('INFO', 'replication')
    if not string.find(said, 'role:master', 1, true) then error('this server is a replica') end
    return string.match(said, 'master_replid:(%x+)') or error('this server reports no replication id')
end

local function is_present()
    local known = call('HMGET', marker, 'id', 'history')
    return known[1] == generation and known[2] == history()
end

-- Stored data is missing: end the generation.
local function lose()
    call('DEL', marker)
    return '"lost"'
end

-- The number of keys that the server has evicted, including other applications' keys.
local function evicted() return number(string.match(call('INFO', 'stats'), 'evicted_keys:(%d+)')) end

-- The day of the month of a day since 1970 (Howard Hinnant, chrono-compatible low-level date algorithms).
local function day_of_month(days)
    local z = days + 719468
    local of_era = z % 146097
    local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
    local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
    local month = floor((5 * of_year + 2) / 153)
    return of_year - floor((153 * month + 2) / 5) + 1
end

local NEVER = math.huge                   -- when the window of a budget ends
local PERIOD_SECONDS = {minute = 60, hour = 3600, day = DAY, week = 7 * DAY}
local MONDAY = 4 * DAY                    -- the first one of Unix time

-- When the window that an instant is in starts and ends; ends nil: it has no share, because it is a rate or counts slots.
local function span(measure, at)
    local period = string.match(measure, '_per_(%a+)$')
    local seconds = PERIOD_SECONDS[period]
    if seconds then
        local first = period == 'week' and MONDAY or 0
        local starts = floor((at - first) / seconds) * seconds + first
        return starts, starts + seconds
    elseif period == 'month' then
        local days = floor(at / DAY)
        local first = days - day_of_month(days) + 1
        local later = first + 31
        return first * DAY, (later - day_of_month(later) + 1) * DAY
    end
    return 0, string.sub(measure, -6) == '_total' and NEVER or nil
end

-- The seconds to the end of a window; -1: it never ends.
local function ends_in(ends) return ends and ends ~= NEVER and ends - now or -1 end

-- The fields of a window, by index. For this call only: OWN is what the leases in this message hold of it, ASKER the
-- latest lease that wants units, LASTS how long a rate takes to recover, IS_URGENT whether PostgreSQL must hear of a refusal.
-- Stored: SHARE and GIVEN_BACK are what PostgreSQL has granted this generation and what was returned; OTHERS_* is what other
-- holders have of the window there, and CREDITED what was added to its limit, as of its last reply: see FRESHNESS. HOLDERS is
-- the number of holders here that have a lease of it. Below LOW, NEED units are requested from PostgreSQL, and no fewer than LEAST;
-- STOCKED_* is the last such request. When SPENT reaches ALERT_AT (0: never), PostgreSQL has an alert to write; REFUSED_AT is
-- when it was last informed that a request needs more than is not spent. NUMBER is that of the share, negative while the share of
-- a budget is being closed. DUE is the time of the next report to PostgreSQL, EXPIRES that of the key's expiry.
local NAME, MEASURE, STARTS, ENDS, IS_KNOWN, IS_REFUSED, OWN, ASKER, LASTS, HAS_MOVED, IS_URGENT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
local SPENT, HELD, FORFEITED, LIMIT, TOUCHED, WANTED_AT, THEORETICAL, SHARE, GIVEN_BACK, OTHERS_SPENT, OTHERS_HELD, CREDITED,
    FRESHNESS, HOLDERS, LOW, NEED, LEAST, ALERT_AT, REFUSED_AT, NUMBER, STOCKED_AT, STOCKED_USED, DUE, EXPIRES, CARRIED,
    CARRIED_UNTIL, WANTED_BY =
    12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38
-- For this call only, too: how many holders there were before, or are expected; whether units were short then; and whether a
-- lease is opened.
local CROWD, WAS_SHORT, IS_OPENED = 39, 40, 41
-- Of what PostgreSQL replied about a window: nothing yet; current; it has changed there since a message was last prepared.
local UNREAD, READ, STALE = 0, 1, 2
local WINDOW = '<' .. string.rep('d', 26) .. 's'
local NEW = pack(WINDOW, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '')

-- Windows that this call has read. They are written at the end, if at all.
local windows, names = {}, {}

-- A new window expects the holders of its predecessor for three intervals of their reports.
local function expect_holders(window)
    local before, starts, rest = string.match(window[NAME], '^(%a+:%d:[%a_]+:)(%d+)(:.*)$')
    local packed = call('GET', at_window .. before .. text((span(window[MEASURE], tonumber(starts) - 1))) .. rest)
    if packed then
        window[CARRIED] = select(HOLDERS - SPENT + 1, unpacked(WINDOW, packed))
        window[CARRIED_UNTIL] = now + max(5, 3 * window[CARRIED] / PER_SECOND)
    end
end

local function holders_of(window)
    return max(1, window[HOLDERS], now < window[CARRIED_UNTIL] and window[CARRIED] or 0)
end

local function looked_at(packed, name, measure, starts, ends)
    local window = {
        name, measure, starts, ends or false, packed and true, false, 0, false, 0, false, false, unpacked(WINDOW, packed or NEW)
    }
    if starts > 0 and not packed then expect_holders(window) end
    window[CROWD], window[WAS_SHORT] = holders_of(window), since(window[WANTED_AT]) < WANTED_SECONDS
    windows[name] = window
    names[#names + 1] = name
    return window
end

local function opened(name, measure, starts, ends)
    return windows[name] or looked_at(call('GET', at_window .. name), name, measure, starts, ends)
end

-- Whether a window is missing of which PostgreSQL may have granted a share: it has not ended, and its report is scheduled.
-- Made anew, it would not account for what leases hold of that share.
local function is_lost(window)
    return not window[IS_KNOWN] and window[ENDS] and now < window[ENDS] and call('ZSCORE', base .. 'due', window[NAME])
end

local function write(window)
    local over = max(now, window[ENDS] ~= NEVER and window[ENDS] or 0)
        + (window[LASTS] > 0 and window[LASTS] + 60 or window[HELD] > 0 and KEPT_SECONDS or OVER_SECONDS)
    local is_late = window[EXPIRES] < over
    if is_late then window[EXPIRES] = over + SLACK_SECONDS end
    local packed = pack(WINDOW, unpack(window, SPENT, WANTED_BY))
    if is_late then
        call('SET', at_window .. window[NAME], packed, 'EX', text(math.ceil(window[EXPIRES] - now)))
    else
        -- Overwrite in place, at half the cost of SET. A longer old value leaves a tail, which is not read.
        call('SETRANGE', at_window .. window[NAME], '0', packed)
    end
end

local function room(window) return window[SHARE] - window[GIVEN_BACK] - window[SPENT] - window[HELD] end

-- Spent, as reported to holders: units in other shares count as spent, because they do not return soon as leased ones do.
local function spent_of(window) return window[SPENT] + window[OTHERS_SPENT] + window[OTHERS_HELD] end

-- Set when a window is reported to PostgreSQL; 0: it is not.
local function set_due(window, at)
    window[DUE] = at
    call('ZADD', base .. 'due', text(at), window[NAME])
end

-- Schedule the report of a window to PostgreSQL: later, or next if its share runs low or it is to write an alert. Returns
-- whether it is next.
local function schedule(window)
    if not window[ENDS] then return false end
    local left = room(window)
    local is_urgent = window[LOW] > 0 and left < window[LOW] or window[IS_URGENT]
        or window[ALERT_AT] > 0 and window[SPENT] >= window[ALERT_AT]
    -- Used beyond its share; or refused for units that others may have returned by now.
    local is_soon = left < 0 or (window[IS_REFUSED] and window[OTHERS_HELD] > 0)
    local at = is_urgent and URGENT or now + (is_soon and SOON_SECONDS or TOLD_SECONDS)
    if window[DUE] == 0 or at < window[DUE] then
        set_due(window, at)
    elseif window[DUE] < now - TOLD_SECONDS then
        -- PostgreSQL is unavailable, or the set of due windows is gone.
        set_due(window, window[DUE])
    end
    return is_urgent
end

-- The fields of a line, by index. For this call only: its window and the units granted; for a rate how far AHEAD it is and
-- what is AVAILABLE; for a lease IS_WANTED, whether another holder is short of units, and whether it COUNTS. Stored for the
-- lease, raised to what is reported: HAD granted, CONSUMED, BACK. The rest is LeaseReport in limits/ledger_protocol.py.
local OF, GIVEN, AHEAD, AVAILABLE, IS_WANTED, COUNTS, FIELD, HAD, CONSUMED, BACK = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
local LEASE, AT, BOUND, INTERVAL, GRANTED, USED, RETURNED, WANT, AT_LEAST, MOST, GRANTED_AT, IS_CLOSING, IS_TEST, KIND, OF_MEASURE,
    OWNER, SELECTOR, NEXT, IS_NEW = 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29
local LINE = '<dddddddddddBBssss'
local LEASE_KEPT = '<ddds'
local REPLY = '<i8i8i8i8i8i8i8dddB'

local function read_lines(packed)
    local lines, at = {}, 1
    while at <= #packed do
        local line = {false, 0, 0, 0, 0, false, '', 0, 0, 0, unpacked(LINE, packed, at)}
        line[FIELD], at = format('%d', line[LEASE]), line[NEXT]
        lines[#lines + 1] = line
    end
    return lines
end

local function name_of(kind, is_test, measure, starts, selector, owner)
    return table.concat({kind, is_test, measure, text(starts), selector .. '"' .. owner}, ':')
end

-- The current window of each measure, computed once per call: start, end, and the middle parts of its names.
local present = {}

-- The window of a line: its name, start and end.
local function window_of(line)
    local measure, at = line[OF_MEASURE], line[AT]
    local today = present[measure]
    if not today then
        local starts, ends = span(measure, now)
        today = {starts, ends or false, ':0:' .. measure .. ':' .. text(starts) .. ':',
            ':1:' .. measure .. ':' .. text(starts) .. ':'}
        present[measure] = today
    end
    if at == 0 or at == today[1] then
        return line[KIND] .. today[3 + line[IS_TEST]] .. line[SELECTOR] .. '"' .. line[OWNER], today[1], today[2]
    end
    local starts, ends = span(measure, at)
    return name_of(line[KIND], line[IS_TEST], measure, starts, line[SELECTOR], line[OWNER]), starts, ends
end

-- Attach to each line its window and its stored lease. False: data was lost, because a window is missing, or was made anew
-- without units that leases hold of it.
local function find(lines, kept)
    local seen, keys, firsts, all_starts, all_ends = {}, {}, {}, {}, {}
    for i, line in ipairs(lines) do
        local name, starts, ends = window_of(line)
        local packed = kept[i + 3]
        if packed then
            local began_in
            line[HAD], line[CONSUMED], line[BACK], began_in = unpacked(LEASE_KEPT, packed)
            line[COUNTS] = true
            if began_in ~= name and line[AT] == 0 then
                -- A lease whose first reply was lost stays in the window in which it started, though its holder does not
                -- know which.
                name = began_in
                starts, ends = span(line[OF_MEASURE], tonumber(string.match(name, '^%a+:%d:[%a_]+:(%d+):')))
            end
        end
        line[OF] = name
        if not seen[name] then
            local n = #keys + 1
            seen[name], keys[n], firsts[n], all_starts[n], all_ends[n] = true, at_window .. name, line, starts, ends or false
        end
    end
    local found = #keys > 0 and call('MGET', unpack(keys)) or {}
    for i, line in ipairs(firsts) do
        if is_lost(looked_at(found[i], line[OF], line[OF_MEASURE], all_starts[i], all_ends[i])) then return false end
    end
    for _, line in ipairs(lines) do
        line[OF] = windows[line[OF]]
        if line[HAD] - line[CONSUMED] - line[BACK] > line[OF][HELD] then return false end
    end
    return true
end

-- GCRA, as in limits/gcra.py: the theoretical arrival time is ahead of now by what was taken and is not yet replenished.
local function settle_rate(line, window)
    local tolerance = line[BOUND] * line[INTERVAL]
    -- Capped: the clock may have been set back, or the burst lowered.
    local ahead, units = min(max(window[THEORETICAL], now) - now, tolerance), line[RETURNED]
    if line[OF_MEASURE] == 'token_rate' then
        if units > 0 then
            -- Less what has been refilled since these units were granted.
            ahead = max(0, ahead - max(0, units * line[INTERVAL] - max(0, now - line[GRANTED_AT])))
        else
            ahead = min(ahead - units * line[INTERVAL], tolerance)
        end
    end
    line[AHEAD] = ahead
    line[AVAILABLE] = floor((tolerance - ahead) / line[INTERVAL] + 1e-6)
    window[LASTS] = max(window[LASTS], tolerance)
end

-- Apply a lease's report. Its figures are cumulative; use beyond the grant counts as granted.
local function settle(line)
    local window = line[OF]
    if line[WANT] > 0 and not (window[ASKER] and window[ASKER][LEASE] > line[LEASE]) then window[ASKER] = line end
    window[LIMIT] = line[BOUND]
    if line[INTERVAL] > 0 then return settle_rate(line, window) end
    line[IS_WANTED] = window[WAS_SHORT] and window[WANTED_BY] ~= ask.holder and 1 or 0
    -- A lease that is closed already stays closed.
    if not line[COUNTS] and line[IS_CLOSING] == 1 then return end
    if not line[COUNTS] then line[IS_NEW], window[IS_OPENED] = true, true end
    local consumed, back = max(line[CONSUMED], line[USED]), max(line[BACK], line[RETURNED])
    -- Closing also returns what was granted in a reply that was lost.
    local had = line[IS_CLOSING] == 1 and consumed + back or max(line[HAD], line[GRANTED], consumed + back)
    local outstanding = had - consumed - back
    window[SPENT] = window[SPENT] + consumed - line[CONSUMED]
    window[HELD] = window[HELD] + outstanding - (line[HAD] - line[CONSUMED] - line[BACK])
    window[OWN] = window[OWN] + outstanding
    if consumed > line[CONSUMED] or line[WANT] > 0 then window[TOUCHED] = now end
    line[COUNTS], line[HAD], line[CONSUMED], line[BACK] = true, had, consumed, back
end

-- What a line gets of a window with many holders, at least: as in limits/ledger/rules.py.
local function share_of(window, line, available, alive)
    local half, crowd = floor(line[WANT] / 2), window[CROWD]
    if crowd <= FEW_HOLDERS then return 0 end
    if window[WAS_SHORT] then return min(half, floor(window[HELD] / (2 * crowd))) end
    if line[MOST] == 0 or not line[IS_NEW] then return half end
    return max(half, min(floor(line[WANT] * crowd / PER_SECOND), floor(available / (4 * alive))))
end

local function granted_of(window, line, available, alive)
    local want, at_least = line[WANT], line[AT_LEAST]
    if want == 0 or available < at_least then return 0 end
    -- A holder leaves units for the others beyond what its requests wait for: the fewer are available, the fewer it gets.
    local fair = want
    if alive > 1 then fair = max(at_least, line[MOST], floor(available / (2 * alive))) end
    return min(available, max(share_of(window, line, available, alive), min(want, fair)))
end

-- The schedule of messages about a window with many holders: as in limits/ledger/message_schedule.py. Take places for this message.
local function take_places(window, places)
    local ahead = max(window[THEORETICAL] - now, 0) + places / PER_SECOND
    window[THEORETICAL] = now + min(ahead, 2 * window[CROWD] / PER_SECOND)
end

-- How long the holder waits before it asks for units of a window with many.
local function ask_seconds(window, line)
    local ahead = min(window[THEORETICAL] - now, 20)
    if line[WANT] > 0 and line[GIVEN] == 0 then return max(0.7, ahead) end
    return window[WAS_SHORT] and ahead >= 0.25 and ahead or 0
end

-- Windows whose share is too small for a request: by how much, and by how much for its minimum.
local lacking = {}

-- What may be granted: what the limit leaves, at most what the share leaves. Also whether the share was too small.
local function judged(window, line, alive)
    if window[ENDS] and now >= window[ENDS] then return 0, false end
    local available = line[BOUND] + window[CREDITED] - spent_of(window) - window[HELD]
    local granted, left = granted_of(window, line, available, alive), room(window)
    if not window[ENDS] then return granted, false end
    if granted == 0 and window[FRESHNESS] == UNREAD then
        -- More than its limit, but a credit may cover it: PostgreSQL decides.
        if not ask.is_final then lacking[#lacking + 1] = {window, line[WANT], line[AT_LEAST]} end
        return 0, true
    end
    if granted == 0 or granted <= left then return granted, false end
    if ask.is_final then
        local less = granted_of(window, line, min(available, left), alive)
        return less, less == 0
    end
    local missing = granted - left
    lacking[#lacking + 1] = {window, missing, max(1, missing - (granted - line[AT_LEAST]))}
    return granted, true
end

-- Pass a refusal on to PostgreSQL if the request needs more than is not spent: it writes the alert of a limit that is used up.
-- More tokens or money than the limit never fit; a limit of 0 requests is used up.
local function note_refusal(window, line)
    local limit, least = line[BOUND] + window[CREDITED], line[AT_LEAST]
    local may_fit = least <= limit or (least == 1 and string.sub(window[MEASURE], 1, 9) == 'requests_')
    if may_fit and least > limit - window[SPENT] - window[OTHERS_SPENT] and window[NEED] == 0
        and since(window[REFUSED_AT]) >= TOLD_SECONDS
    then
        window[NEED], window[LEAST], window[REFUSED_AT], window[IS_URGENT] = least, least, now, true
    end
end

-- Grant available units to the line that wants them; if several leases of one window do, only to the latest one. Returns
-- whether the share was too small.
local function grant(window, alive)
    local line = window[ASKER]
    if line[INTERVAL] > 0 then
        line[GIVEN] = granted_of(window, line, line[AVAILABLE], alive)
        return false
    end
    local granted, is_short = judged(window, line, alive)
    line[HAD], window[HELD], window[LIMIT] = line[HAD] + granted, window[HELD] + granted, line[BOUND]
    line[GIVEN], window[IS_REFUSED] = granted, granted == 0
    if granted == 0 and not (window[ENDS] and now >= window[ENDS]) then
        if window[CROWD] > FEW_HOLDERS then take_places(window, 3) end
        if window[HELD] > window[OWN] then window[WANTED_AT], window[WANTED_BY] = now, ask.holder end
        if window[ENDS] then note_refusal(window, line) end
    end
    return is_short
end

local function rate_reply(line)
    local window = line[OF]
    local ahead = line[AHEAD] + line[GIVEN] * line[INTERVAL]
    -- The maximum over its lines.
    window[THEORETICAL] = max(window[HAS_MOVED] and window[THEORETICAL] or 0, now + ahead)
    window[HAS_MOVED], window[TOUCHED] = true, now
    local wait = 0
    if line[WANT] > 0 and line[GIVEN] == 0 then wait = max(0, ahead + (line[AT_LEAST] - line[BOUND]) * line[INTERVAL]) end
    local held = line[BOUND] - max(0, line[AVAILABLE] - line[GIVEN])
    return pack(REPLY, line[LEASE], 0, line[GIVEN], 0, held, 0, 1, -1, wait, now, 0)
end

local function reply(line)
    local window = line[OF]
    if line[INTERVAL] > 0 then return rate_reply(line) end
    local holders, wait, is_over = holders_of(window), 0, window[ENDS] and now >= window[ENDS]
    if window[CROWD] > FEW_HOLDERS then
        holders = max(holders, floor((window[THEORETICAL] - now) * PER_SECOND))
        wait = is_over and 0 or ask_seconds(window, line)
    end
    return pack(REPLY, line[LEASE], window[STARTS], line[COUNTS] and line[HAD] or line[USED] + line[RETURNED],
        spent_of(window), window[HELD], window[CREDITED], holders, ends_in(window[ENDS]), wait, 0,
        line[IS_WANTED])
end

-- Change nothing except that PostgreSQL is asked for what is lacking.
local function note_lacking()
    windows = {}
    for _, lack in ipairs(lacking) do
        local found = lack[1]
        local window = opened(found[NAME], found[MEASURE], found[STARTS], found[ENDS])
        window[NEED], window[LEAST], window[LIMIT], window[TOUCHED] = window[NEED] + lack[2], lack[3], found[LIMIT], now
        set_due(window, URGENT)
        write(window)
    end
end

-- Count the holders of windows of which this one opens or closes leases, before these are settled. Returns how many leases it
-- has of each then.
local function count_holders(holder, lines)
    local more, fields, changed = {}, {}, {}
    for i = 1, #lines do
        local line = lines[i]
        -- Most lines are about a lease that is open, and stays so.
        if (not line[COUNTS]) == (line[IS_CLOSING] == 0) and line[INTERVAL] == 0 then
            local window, change = line[OF], line[IS_CLOSING] == 1 and -1 or 1
            if not more[window] then
                changed[#changed + 1], fields[#fields + 1] = window, 'w:' .. window[NAME]
            end
            more[window] = (more[window] or 0) + change
        end
    end
    local counts = {}
    if #fields == 0 then return counts end
    for i, before in ipairs(call('HMGET', holder, unpack(fields))) do
        local window = changed[i]
        local were = number(before)
        local are = max(0, were + more[window])
        counts[i] = {fields[i], are}
        window[HOLDERS] = max(0, window[HOLDERS] + (are > 0 and 1 or 0) - (were > 0 and 1 or 0))
    end
    return counts
end

-- Store the holder and its leases after this message.
local function write_leases(holder, lines, counts)
    local kept, closed = {'serial', text(ask.serial)}, {}
    for _, count in ipairs(counts) do
        if count[2] > 0 then
            kept[#kept + 1] = count[1]
            kept[#kept + 1] = text(count[2])
        else
            closed[#closed + 1] = count[1]
        end
    end
    for _, line in ipairs(lines) do
        if line[IS_CLOSING] == 1 then
            closed[#closed + 1] = line[FIELD]
        elseif line[INTERVAL] == 0 then
            local n, name = #kept, line[OF][NAME]
            kept[n + 1], kept[n + 2] = line[FIELD], pack(LEASE_KEPT, line[HAD], line[CONSUMED], line[BACK], name)
        end
    end
    call('HSET', holder, unpack(kept))
    if #closed > 0 then call('HDEL', holder, unpack(closed)) end
    call('EXPIRE', holder, KEPT_SECONDS)
    call('ZADD', base .. 'holders', text(now + ask.lease_seconds), ask.holder)
    call('EXPIRE', base .. 'holders', KEPT_SECONDS)
end

-- The number of live holders, including the sender of this message.
local function living()
    local alive = call('ZCOUNT', base .. 'holders', '(' .. text(now), '+inf')
    local mine = call('ZSCORE', base .. 'holders', ask.holder)
    return (mine and tonumber(mine) > now or ask.lease_seconds <= 0) and alive or alive + 1
end

-- Whether a holder claims granted units. If it is not stored, or rests, they were charged when it ended or was deleted.
local function has_leases(lines)
    for _, line in ipairs(lines) do
        if line[GRANTED] > 0 and line[INTERVAL] == 0 and line[IS_CLOSING] == 0 then return true end
    end
    return false
end

-- Settle all lines first, then grant what is available. Returns a JSON header, a line feed, and the replies.
local function sync()
    local holder, lines, fields = base .. 'h:' .. ask.holder, read_lines(ARGV[4]), {'serial', 'ended', 'rests'}
    for i, line in ipairs(lines) do fields[i + 3] = line[FIELD] end
    local kept = call('HMGET', holder, unpack(fields))
    if kept[2] or ((not kept[1] or kept[3]) and has_leases(lines)) then return '"ended"' end
    if ask.serial <= number(kept[1]) then return '"late"' end
    if not find(lines, kept) then return lose() end
    local counts = count_holders(holder, lines)
    for _, line in ipairs(lines) do settle(line) end
    for _, name in ipairs(names) do
        if windows[name][CROWD] > FEW_HOLDERS then take_places(windows[name], windows[name][IS_OPENED] and 4 or 1) end
    end
    local alive, short, is_low, replies = living(), 0, false, {}
    for _, name in ipairs(names) do
        if windows[name][ASKER] and grant(windows[name], alive) then short = short + 1 end
    end
    if short > 0 and not ask.is_final then
        note_lacking()
        return '"short"'
    end
    if kept[3] then call('HDEL', holder, 'rests') end
    write_leases(holder, lines, counts)
    for i, line in ipairs(lines) do replies[i] = reply(line) end
    for _, name in ipairs(names) do
        is_low = schedule(windows[name]) or is_low
        write(windows[name])
    end
    call('EXPIRE', base .. 'due', KEPT_SECONDS)
    return '{"is_low":' .. tostring(is_low) .. ',"short":' .. short .. '}\n' .. table.concat(replies)
end

-- The expired holders. A server that has evicted keys may have evicted any of ours.
local function dead()
    local known, counted = number(call('HGET', marker, 'evicted')), evicted()
    if counted > known then return lose() end
    if counted < known then call('HSET', marker, 'evicted', text(counted)) end
    local found = call('ZRANGEBYSCORE', base .. 'holders', '-inf', text(now), 'LIMIT', '0', '100')
    return #found > 0 and cjson.encode(found) or '[]'
end

local function parts(name)
    local kind, is_test, measure, starts, selector, owner = string.match(name, '^(%a+):(%d):([%a_]+):(%d+):([^"]*)"(.*)$')
    return kind, is_test == '1', measure, tonumber(starts), owner, selector
end

local function opened_by(name)
    local _, _, measure, starts = parts(name)
    local _, ends = span(measure, starts)
    return opened(name, measure, starts, ends)
end

-- End a holder, a slice of its leases at a time: what it has not returned is charged, concurrency slots are released.
local function end_holder()
    local holder = base .. 'h:' .. ask.holder
    local expires = call('ZSCORE', base .. 'holders', ask.holder)
    if ask.only_dead and (not expires or tonumber(expires) > now) then return '0' end
    if not ask.only_dead and not expires then return '0' end
    if ask.only_dead and call('HLEN', holder) <= 1 then
        -- Only its serial is stored, and no lease: the holder rests until its next message.
        call('HSET', holder, 'rests', '1')
        call('EXPIRE', holder, OVER_SECONDS)
        call('ZREM', base .. 'holders', ask.holder)
        return '0'
    end
    -- Ended at once for all callers. If this process stops halfway, the next reaper continues.
    call('HSET', holder, 'ended', '1')
    call('ZADD', base .. 'holders', '0', ask.holder)
    local found = call('HSCAN', holder, ask.cursor, 'COUNT', '500')
    local gone = {}
    for i = 1, #found[2], 2 do
        local field = found[2][i]
        if string.sub(field, 1, 2) == 'w:' then
            local window = opened_by(string.sub(field, 3))
            window[HOLDERS] = max(0, window[HOLDERS] - 1)
            gone[#gone + 1] = field
        elseif tonumber(field) then
            local had, consumed, back, name = unpacked(LEASE_KEPT, found[2][i + 1])
            local window, outstanding = opened_by(name), had - consumed - back
            if is_lost(window) or outstanding > window[HELD] then return lose() end
            window[HELD] = window[HELD] - outstanding
            if window[MEASURE] ~= 'concurrency' then
                window[SPENT], window[FORFEITED] = window[SPENT] + outstanding, window[FORFEITED] + outstanding
            end
            gone[#gone + 1] = field
        end
    end
    for _, name in ipairs(names) do
        if windows[name][IS_KNOWN] then
            schedule(windows[name])
            write(windows[name])
        end
    end
    for _, lease in ipairs(gone) do call('HDEL', holder, lease) end
    if found[1] == '0' then
        call('EXPIRE', holder, OVER_SECONDS)
        call('ZREM', base .. 'holders', ask.holder)
    end
    return found[1]
end

-- How many units of a window to request from PostgreSQL.
local function wanted(window)
    local is_low = window[LOW] > 0 and room(window) < window[LOW]
    window[NEED] = max(window[NEED], -room(window))
    if now >= window[ENDS] or not (window[NEED] > 0 or is_low) then return 0 end
    local used = window[SPENT] + window[HELD]
    local pace = (used - window[STOCKED_USED]) / max(1, since(window[STOCKED_AT]))
    local left = window[LIMIT] + window[CREDITED] - window[OTHERS_SPENT] - window[OTHERS_HELD] - (window[SHARE] - window[GIVEN_BACK])
    local lasts = min(STOCK_SECONDS, window[ENDS] - now)
    local ahead = min(max(math.ceil(pace * lasts), 4 * window[NEED]), floor(left / 8))
    return max(window[NEED], ahead)
end

-- Take the turn to sync with PostgreSQL, and collect the lines: one process at a time, with ordered messages.
local function stock()
    -- When the last holder has ended, all shares are returned.
    local is_deserted = call('ZCARD', base .. 'holders') == 0
    if ask.is_last and not is_deserted then return '"done"' end
    local turn = call('HMGET', marker, 'turn_by', 'turn_since', 'told_at')
    if turn[1] and turn[1] ~= ask.by and since(number(turn[2])) < TURN_SECONDS then return '"busy"' end
    local until_then = ask.is_urgent and URGENT or is_deserted and now + TOLD_SECONDS or now
    local due = call('ZRANGEBYSCORE', base .. 'due', '-inf', text(until_then), 'LIMIT', '0', ask.most)
    if #due == 0 and since(number(turn[3])) < HEARTBEAT_SECONDS then return '"done"' end
    local serial = call('HINCRBY', marker, 'serial', 1)
    call('HSET', marker, 'turn_by', ask.by, 'turn_since', text(now))
    local lines = {}
    for _, name in ipairs(due) do
        local kind, is_test, measure, starts, owner, selector = parts(name)
        local window = opened_by(name)
        if window[IS_KNOWN] then
            if window[NUMBER] == 0 then window[NUMBER] = call('HINCRBY', marker, 'numbers', 1) end
            local is_over, want = true, 0
            if window[NUMBER] > 0 then
                local is_idle = window[NEED] == 0 and since(window[TOUCHED]) >= IDLE_SECONDS
                -- A budget has no end: its share is closed when nothing uses it, and its next use opens another one.
                local is_unused = is_idle and window[ENDS] == NEVER and room(window) >= 0
                is_over = window[HELD] == 0 and (now >= window[ENDS] + 60 or is_unused)
                if is_over or is_idle or window[NEED] == 0 and is_deserted then
                    -- Give units up here first, then report it to PostgreSQL.
                    window[GIVEN_BACK], window[LOW] = window[GIVEN_BACK] + max(0, room(window)), 0
                end
                want = wanted(window)
                if want == 0 then window[LOW] = 0 end
                window[STOCKED_AT], window[STOCKED_USED] = now, window[SPENT] + window[HELD]
                if is_over and window[ENDS] == NEVER then window[NUMBER] = -window[NUMBER] end
            end
            -- A share that is being closed is reported with the same figures until PostgreSQL has replied: it may have closed
            -- the share already, and would count another report of it as that of a new one.
            local is_closing = window[NUMBER] < 0
            lines[#lines + 1] = format('[%s,%.0f,%s,%s,%s,"%s",%s,%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%s]',
                cjson.encode(name), math.abs(window[NUMBER]), cjson.encode(kind), cjson.encode(owner), tostring(is_test), measure,
                cjson.encode(selector), starts, window[LIMIT], window[SHARE], is_closing and window[STOCKED_USED] or window[SPENT],
                window[GIVEN_BACK], want, want > 0 and min(max(1, window[LEAST]), want) or 0, min(window[NEED], want),
                tostring(is_over))
            if not is_closing then window[NEED], window[LEAST], window[ALERT_AT] = 0, 0, 0 end
            if window[FRESHNESS] == STALE then window[FRESHNESS] = READ end
            -- If this report is not sent, another process sends it.
            set_due(window, now + TURN_SECONDS)
            write(window)
        elseif is_lost(window) then
            return lose()
        else
            call('ZREM', base .. 'due', name)
        end
    end
    return '{"serial":' .. serial .. ',"lines":[' .. table.concat(lines, ',') .. ']}'
end

-- Apply PostgreSQL's reply: name, granted, others' spent and held, whether all was granted, whether the window has ended,
-- what was credited, at which SPENT it has the next alert to write, the number of the share, and how much of it was reported
-- as spent. Returns whether there is more to report at once.
local function stocked()
    local is_more = false
    for _, row in ipairs(ask.rows) do
        local name, granted, is_over = row[1], row[2], row[6]
        local window = opened_by(name)
        if is_lost(window) then return lose() end
        local is_quiet = window[HELD] == 0 and room(window) == 0
        -- A window that was deleted and made anew has another share. The units in this reply are those of the earlier one:
        -- leases hold them, or have used them.
        local is_budget = window[ENDS] == NEVER
        local is_its = window[IS_KNOWN] and window[NUMBER] == (is_over and is_budget and -row[9] or row[9])
        if is_its and is_over and is_quiet and not (is_budget and window[NEED] > 0) then
            call('DEL', base .. 'w:' .. name)
            call('ZREM', base .. 'due', name)
        elseif is_its and is_over and is_budget then
            -- It was used while its share was being closed: only that use belongs to the next share.
            window[NUMBER], window[SHARE], window[GIVEN_BACK], window[SPENT] = 0, 0, 0, window[SPENT] - row[10]
            window[OTHERS_SPENT], window[OTHERS_HELD], window[FRESHNESS] = row[3] + row[10], row[4], READ
            set_due(window, URGENT)
            write(window)
            is_more = true
        elseif is_its then
            local got = max(0, granted - window[SHARE])
            window[SHARE] = window[SHARE] + got
            window[OTHERS_SPENT], window[OTHERS_HELD] = row[3], row[4]
            window[CREDITED], window[ALERT_AT], window[FRESHNESS] = row[7], row[8], max(window[FRESHNESS], READ)
            -- Ask again when half of the grant is left. If less was granted than requested, there is no more.
            if got > 0 or not row[5] then window[LOW] = row[5] and floor(got / 2) or 0 end
            local is_settled = room(window) == 0 and window[HELD] == 0 and window[NEED] == 0
            local is_next = window[NEED] > 0 or window[FRESHNESS] == STALE
                or window[ALERT_AT] > 0 and window[SPENT] >= window[ALERT_AT]
            is_more = is_more or is_next
            local is_finished = is_settled and not is_budget
            set_due(window, is_next and URGENT or is_finished and window[ENDS] + 60 or now + TOLD_SECONDS)
            write(window)
        end
    end
    if ask.is_heard then call('HSET', marker, 'told_at', text(now)) end
    if call('HGET', marker, 'turn_by') == ask.by then call('HDEL', marker, 'turn_by', 'turn_since') end
    return tostring(is_more)
end

-- The state of windows: spent, held, forfeited, seconds to the end, seconds to a rate's recovery; null: never used.
local function stand()
    local rows = {}
    for i, asked in ipairs(ask.windows) do
        local starts, ends = span(asked[4], now)
        local name = name_of(asked[1], asked[3] and 1 or 0, asked[4], starts, asked[5], asked[2])
        local window = opened(name, asked[4], starts, ends)
        rows[i] = window[IS_KNOWN] and format('[%.0f,%.0f,%.0f,%.6f,%.6f]', window[SPENT] + window[OTHERS_SPENT],
            window[HELD] + window[OTHERS_HELD], window[FORFEITED], ends_in(ends), max(0, window[THEORETICAL] - now))
            or 'null'
    end
    return '[' .. table.concat(rows, ',') .. ']'
end

-- Windows were changed in PostgreSQL, by a credit, `seconds` ago: read them again. Returns whether any is due, or an exchange
-- with PostgreSQL is in progress.
local function refresh()
    local is_due = call('HEXISTS', marker, 'turn_by') == 1
    for _, asked in ipairs(ask.windows) do
        local starts, ends = span(asked[4], now)
        local window = opened(name_of(asked[1], asked[3] and 1 or 0, asked[4], starts, asked[5], asked[2]), asked[4], starts, ends)
        -- Every proxy learns of a credit; one exchange that began after it is enough.
        if ends and window[IS_KNOWN] and since(window[STOCKED_AT]) >= ask.seconds then
            window[FRESHNESS] = window[FRESHNESS] == UNREAD and UNREAD or STALE
            set_due(window, URGENT)
            write(window)
            is_due = true
        end
    end
    return tostring(is_due)
end

if operation == 'begin' then
    local known = call('HMGET', marker, 'id', 'history')
    if known[1] and known[2] == history() then return cjson.encode(known[1]) end
    call('DEL', marker)
    call('HSET', marker, 'id', generation, 'history', history(), 'told_at', text(now), 'evicted', text(evicted()))
    return cjson.encode(generation)
end
if not is_present() then return '"lost"' end
if operation == 'sync' then return sync() end
if operation == 'dead' then return dead() end
if operation == 'end' then return end_holder() end
if operation == 'stock' then return stock() end
if operation == 'stocked' then return stocked() end
if operation == 'stand' then return stand() end
if operation == 'refresh' then return refresh() end
if operation == 'void' then return tostring(call('DEL', marker)) end
error('no such operation: ' .. operation)
