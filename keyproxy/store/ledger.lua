-- The ledger in Redis or Valkey: one call is one operation, all of it or nothing. The rules are those of 0004_ledger.sql
-- and tests/reference_ledger.py; ledger_redis.py says what a generation and a share are. Time is the server's.
--
-- KEYS[1]  hash: the present generation. All other keys begin with it, and end some days after their use does.
-- ARGV     operation, generation, its arguments as JSON. Numbers come back as JSON of our own making: cjson rounds.
--
--   <1>:<g>:holders   sorted set: holders by when their time is over
--   <1>:<g>:h:<id>    hash of one holder: serial, ended, and its leases
--   <1>:<g>:w:<name>  one window; name is kind:is_test:measure:starts:owner
--   <1>:<g>:due       sorted set: windows by when PostgreSQL is to be told of them
--
-- Leases and windows are packed: in a small hash Redis looks for each field from the front, for 18 of them 18 times.

local call, floor, max, min = redis.call, math.floor, math.max, math.min
local marker, operation, generation = KEYS[1], ARGV[1], ARGV[2]
local base = marker .. ':' .. generation .. ':'
local ask = cjson.decode(ARGV[3])
local time = call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000

local DAY, WANTED_SECONDS = 86400, 2
local KEPT_SECONDS = 40 * DAY             -- longer than any window
local OVER_SECONDS = 2 * DAY              -- what has ended is remembered for so long
local TOLD_SECONDS = 30                   -- PostgreSQL hears of a window that changes so often
local SOON_SECONDS = 1                    -- and of one that was drawn on beyond its share
local IDLE_SECONDS = 30                   -- a window's share goes back when nobody has drawn on it for so long
local STOCK_SECONDS = 60                  -- a share lasts so long, at the pace of late
local HEARTBEAT_SECONDS = 300
local TURN_SECONDS = 5
local URGENT = 1                          -- due before all that is due at some time

local function number(value) return tonumber(value) or 0 end
local format = string.format
local function text(value) return value % 1 == 0 and format('%d', value) or format('%.17g', value) end

-- The history in this process' memory is whole, or it is not ours: a restart, a failover and a full copy of another
-- server's data each give the server another replication id, and nothing else may be believed to have kept our last write.
local function history()
    return string.match(call('INFO', 'replication'), 'master_replid:(%x+)')
        or error('this server does not tell its replication id')
end

local function is_present()
    local known = call('HMGET', marker, 'id', 'history')
    return known[1] == generation and known[2] == history()
end

-- The day of the month of a day since 1970 (Howard Hinnant, chrono-compatible low-level date algorithms).
local function day_of_month(days)
    local z = days + 719468
    local of_era = z % 146097
    local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
    local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
    local month = floor((5 * of_year + 2) / 153)
    return of_year - floor((153 * month + 2) / 5) + 1
end

-- When the window that an instant is in starts and ends; ends nil: never.
local function span(measure, at)
    local days = floor(at / DAY)
    if string.sub(measure, -8) == '_per_day' then
        return days * DAY, (days + 1) * DAY
    elseif string.sub(measure, -10) == '_per_month' then
        local first = days - day_of_month(days) + 1
        local later = first + 31
        return first * DAY, (later - day_of_month(later) + 1) * DAY
    end
    return 0, nil
end

-- Windows that this call has looked at. They are written at the end, if at all.
local windows, names = {}, {}

-- share and given_back: what PostgreSQL has granted this generation of it, and has got back; others_*: what is others' of
-- the window. Below low it is time to ask PostgreSQL, for need units, and no fewer than least; stocked_*: when it was last.
local FIELDS = {
    'spent', 'held', 'forfeited', 'limit', 'touched', 'wanted_at', 'wanted_by', 'theoretical', 'share', 'given_back',
    'others_spent', 'others_held', 'low', 'need', 'least', 'number', 'stocked_at', 'stocked_used', 'due',
}

local function opened(name, measure, starts, ends)
    local window = windows[name]
    if window then return window end
    local packed = call('GET', base .. 'w:' .. name)
    local values = packed and cmsgpack.unpack(packed) or {}
    window = {name = name, measure = measure, starts = starts, ends = ends, is_known = packed and true or false}
    for i, field in ipairs(FIELDS) do window[field] = values[i] or 0 end
    windows[name] = window
    names[#names + 1] = name
    return window
end

local function room(window) return window.share - window.given_back - window.spent - window.held end

-- As it is told to holders: what other shares hold is not what comes back in a moment, as what other leases hold is.
local function spent_of(window) return window.spent + window.others_spent + window.others_held end

local function granted_of(line, available, alive)
    local want, at_least = line[12], line[13]
    if want == 0 or available < at_least then return 0 end
    if line[14] then return available end
    -- Whoever asks leaves something for the others, the less there is the less they take.
    local share = want
    if alive > 1 then share = max(at_least, floor(available / (2 * alive))) end
    return min(want, available, share)
end

local function answer(line, starts, granted, spent, held, ends, wait, is_wanted)
    return format('[%d,%d,%d,%d,%d,%s,%s,%d]', line[1], starts, granted, spent, held,
        ends and format('%.6f', ends - now) or '-1', wait > 0 and format('%.6f', wait) or '0', is_wanted and 1 or 0)
end

-- GCRA: the theoretical arrival time is ahead of now by what was taken and has not come back.
local function rate_line(window, line, alive)
    local limit, interval = line[7], line[8]
    local tolerance = limit * interval
    -- Never further ahead than that: the clock may have been set back, or the burst lowered.
    local ahead = min(max(window.theoretical, now) - now, tolerance)
    local available = floor((tolerance - ahead) / interval + 1e-6)
    local grant = granted_of(line, available, alive)
    ahead = ahead + grant * interval
    window.theoretical, window.limit, window.touched, window.kept = now + ahead, limit, now, tolerance
    local wait = 0
    if line[12] > 0 and grant == 0 then wait = max(0, ahead + line[13] * interval - tolerance) end
    return answer(line, 0, grant, 0, limit - max(0, available - grant), nil, wait, false)
end

-- Windows whose share is too small for what is asked of them, by how much, and by how much for the least of it.
local lacking = {}

-- What may be granted: what the limit leaves, and no more than there is of the share. Whether the share was too small.
local function judged(window, line, alive, is_final)
    if window.ends and now >= window.ends then return 0, false end
    local available = line[7] - spent_of(window) - window.held
    local grant = granted_of(line, available, alive)
    if grant == 0 or not window.ends or grant <= room(window) then return grant, false end
    if is_final then
        local less = granted_of(line, min(available, room(window)), alive)
        return less, less == 0
    end
    local missing = grant - room(window)
    lacking[window.name] = {window = window, missing = missing, least = max(1, missing - (grant - line[13]))}
    return grant, true
end

-- lease, kind, owner, is_test, measure, starts, limit, interval, granted, used, returned, want, at_least, takes_all, is_closing
local function sync_line(sender, leases, line, alive, is_final)
    local measure = line[5]
    local starts, ends = span(measure, line[6] > 0 and line[6] or now)
    local name = table.concat({line[2], line[4] and 1 or 0, measure, text(starts), line[3]}, ':')
    if line[6] == 0 and leases[line[1]] then
        -- A lease whose first answer got lost stays in the window that it began in, though its holder cannot say which.
        name = leases[line[1]][4]
        starts, ends = span(measure, tonumber(string.match(name, '^%a+:%d:[%a_]+:(%d+):')))
    end
    local window = opened(name, measure, starts, ends)
    if line[8] > 0 then return rate_line(window, line, alive), false end
    window.limit = line[7]
    local is_wanted = now - window.wanted_at < WANTED_SECONDS and window.wanted_by ~= sender
    local known = leases[line[1]]
    if not known and line[15] then
        return answer(line, starts, line[10] + line[11], spent_of(window), window.held, ends, 0, is_wanted), false
    end
    known = known or {0, 0, 0}
    -- What was told is cumulative. More used than was granted is granted by that.
    local used, returned = max(known[2], line[10]), max(known[3], line[11])
    local granted = max(known[1], line[9], used + returned)
    window.spent = window.spent + used - known[2]
    window.held = window.held + (granted - used - returned) - (known[1] - known[2] - known[3])
    if used > known[2] or line[12] > 0 then window.touched = now end
    local grant, is_short = judged(window, line, alive, is_final)
    granted, window.held = granted + grant, window.held + grant
    if line[15] then
        -- Also what was granted in an answer that got lost.
        window.held = window.held - (granted - used - returned)
        granted = used + returned
        leases[line[1]] = {0, 0, 0, false}
    else
        leases[line[1]] = {granted, used, returned, name}
    end
    if line[12] > 0 and grant == 0 and window.held > granted - used - returned then
        window.wanted_at, window.wanted_by = now, sender
    end
    window.is_refused = line[12] > 0 and grant == 0
    return answer(line, starts, granted, spent_of(window), window.held, ends, 0, is_wanted), is_short
end

local function write(window)
    local values = {}
    for i, field in ipairs(FIELDS) do values[i] = window[field] end
    local seconds = window.ends and max(1, floor(window.ends - now)) + OVER_SECONDS
        or window.kept and floor(window.kept) + 60 or window.held > 0 and KEPT_SECONDS or OVER_SECONDS
    call('SET', base .. 'w:' .. window.name, cmsgpack.pack(values), 'EX', text(seconds))
end

-- When PostgreSQL is to be told of a window, 0: it is not.
local function set_due(window, at)
    window.due = at
    call('ZADD', base .. 'due', text(at), window.name)
end

-- Have PostgreSQL told of a window: in a while, or next if its share runs low. Whether it is next.
local function schedule(window)
    if not window.ends then return false end
    local is_urgent = window.low > 0 and room(window) < window.low
    -- Drawn on beyond its share; or refused for what others may have given back by now.
    local is_soon = room(window) < 0 or (window.is_refused and window.others_held > 0)
    local at = is_urgent and URGENT or now + (is_soon and SOON_SECONDS or TOLD_SECONDS)
    if window.due == 0 or at < window.due then set_due(window, at) end
    return is_urgent
end

local function sync()
    local sender, holder = ask.holder, base .. 'h:' .. ask.holder
    local known = call('HMGET', holder, 'serial', 'ended')
    if known[2] then return '"ended"' end
    if ask.serial <= number(known[1]) then return '"late"' end
    local fields, leases, replies = {}, {}, {}
    for i, line in ipairs(ask.lines) do fields[i] = text(line[1]) end
    if #fields > 0 then
        for i, packed in ipairs(call('HMGET', holder, unpack(fields))) do
            leases[ask.lines[i][1]] = packed and cmsgpack.unpack(packed) or nil
        end
    end
    local expires = now + ask.lease_seconds
    local alive = call('ZCOUNT', base .. 'holders', '(' .. text(now), '+inf')
    local mine = call('ZSCORE', base .. 'holders', sender)
    if not (mine and tonumber(mine) > now) and expires > now then alive = alive + 1 end
    local short = 0
    for i, line in ipairs(ask.lines) do
        local reply, is_short = sync_line(sender, leases, line, alive, ask.is_final)
        replies[i] = reply
        if is_short then short = short + 1 end
    end
    if short > 0 and not ask.is_final then
        -- Nothing has happened, but that PostgreSQL will be asked for so much.
        windows = {}
        for name, lack in pairs(lacking) do
            local window = opened(name, lack.window.measure, lack.window.starts, lack.window.ends)
            window.need, window.least = window.need + lack.missing, lack.least
            window.limit, window.touched = lack.window.limit, now
            set_due(window, URGENT)
            write(window)
        end
        return '"short"'
    end
    local kept, closed = {'serial', text(ask.serial)}, {}
    for lease, state in pairs(leases) do
        if state[4] then
            kept[#kept + 1], kept[#kept + 2] = text(lease), cmsgpack.pack(state)
        else
            closed[#closed + 1] = text(lease)
        end
    end
    call('HSET', holder, unpack(kept))
    if #closed > 0 then call('HDEL', holder, unpack(closed)) end
    call('EXPIRE', holder, KEPT_SECONDS)
    call('ZADD', base .. 'holders', text(expires), sender)
    call('EXPIRE', base .. 'holders', KEPT_SECONDS)
    local is_low = false
    for _, name in ipairs(names) do
        is_low = schedule(windows[name]) or is_low
        write(windows[name])
    end
    call('EXPIRE', base .. 'due', KEPT_SECONDS)
    return '{"is_low":' .. tostring(is_low) .. ',"short":' .. short .. ',"replies":[' .. table.concat(replies, ',') .. ']}'
end

local function parts(name)
    local kind, is_test, measure, starts, owner = string.match(name, '^(%a+):(%d):([%a_]+):(%d+):(.*)$')
    return kind, is_test == '1', measure, tonumber(starts), owner
end

local function opened_by(name)
    local _, _, measure, starts = parts(name)
    local _, ends = span(measure, starts)
    return opened(name, measure, starts, ends)
end

-- End a holder, a slice of its leases at a time: what it has not returned is charged, slots are free again.
local function end_holder()
    local holder = base .. 'h:' .. ask.holder
    local expires = call('ZSCORE', base .. 'holders', ask.holder)
    if ask.only_dead and (not expires or tonumber(expires) > now) then return '0' end
    if not ask.only_dead and not expires then return '0' end
    -- Dead at once for everyone; whoever looks for the dead goes on if we do not.
    call('HSET', holder, 'ended', '1')
    call('ZADD', base .. 'holders', '0', ask.holder)
    local found = call('HSCAN', holder, ask.cursor, 'COUNT', '500')
    local gone = {}
    for i = 1, #found[2], 2 do
        if found[2][i] ~= 'serial' and found[2][i] ~= 'ended' then
            local state = cmsgpack.unpack(found[2][i + 1])
            local window, outstanding = opened_by(state[4]), state[1] - state[2] - state[3]
            window.held = window.held - outstanding
            if window.measure ~= 'concurrency' then
                window.spent, window.forfeited = window.spent + outstanding, window.forfeited + outstanding
            end
            gone[#gone + 1] = found[2][i]
        end
    end
    for _, name in ipairs(names) do
        schedule(windows[name])
        write(windows[name])
    end
    for _, lease in ipairs(gone) do call('HDEL', holder, lease) end
    if found[1] == '0' then
        call('EXPIRE', holder, OVER_SECONDS)
        call('ZREM', base .. 'holders', ask.holder)
    end
    return found[1]
end

-- What PostgreSQL is to be asked for a window, in units.
local function wanted(window)
    local is_low = window.low > 0 and room(window) < window.low
    window.need = max(window.need, -room(window))
    if now >= window.ends or not (window.need > 0 or is_low) then return 0 end
    local used = window.spent + window.held
    local pace = (used - window.stocked_used) / max(1, now - window.stocked_at)
    local left = window.limit - window.others_spent - window.others_held - (window.share - window.given_back)
    local ahead = min(max(math.ceil(pace * STOCK_SECONDS), 4 * window.need), floor(left / 8))
    return max(window.need, ahead)
end

-- The turn to speak with PostgreSQL, and what there is to say: one process at a time, its messages in an order.
local function stock()
    -- When the last holder has ended, everything goes back.
    local is_deserted = call('ZCARD', base .. 'holders') == 0
    if ask.is_last and not is_deserted then return '"done"' end
    local turn = call('HMGET', marker, 'turn_by', 'turn_until', 'told_at')
    if turn[1] and turn[1] ~= ask.by and number(turn[2]) > now then return '"busy"' end
    local until_then = ask.is_urgent and URGENT or is_deserted and now + TOLD_SECONDS or now
    local due = call('ZRANGEBYSCORE', base .. 'due', '-inf', text(until_then), 'LIMIT', '0', ask.most)
    if #due == 0 and now - number(turn[3]) < HEARTBEAT_SECONDS then return '"done"' end
    local serial = call('HINCRBY', marker, 'serial', 1)
    call('HSET', marker, 'turn_by', ask.by, 'turn_until', text(now + TURN_SECONDS))
    local lines = {}
    for _, name in ipairs(due) do
        local kind, is_test, measure, starts, owner = parts(name)
        local window = opened_by(name)
        if window.is_known then
            if window.number == 0 then window.number = call('HINCRBY', marker, 'numbers', 1) end
            local is_over = now >= window.ends + 60 and window.held == 0
            if is_over or is_deserted or (window.need == 0 and now - window.touched >= IDLE_SECONDS) then
                -- First it is not ours any more, then PostgreSQL hears of it.
                window.given_back, window.low = window.given_back + max(0, room(window)), 0
            end
            local want = wanted(window)
            if want == 0 then window.low = 0 end
            lines[#lines + 1] = format('[%s,%.0f,%s,%s,%s,"%s",%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%.0f,%s]',
                cjson.encode(name), window.number, cjson.encode(kind), cjson.encode(owner), tostring(is_test), measure, starts,
                window.limit, window.share, window.spent, window.given_back, want,
                want > 0 and min(max(1, window.least), want) or 0, tostring(is_over))
            window.need, window.least, window.stocked_at, window.stocked_used = 0, 0, now, window.spent + window.held
            -- If we say it to nobody, somebody else will.
            set_due(window, now + TURN_SECONDS)
            write(window)
        else
            call('ZREM', base .. 'due', name)
        end
    end
    return '{"serial":' .. serial .. ',"lines":[' .. table.concat(lines, ',') .. ']}'
end

-- What PostgreSQL has answered: name, granted, what is others' (spent, held), whether we got all, whether it is over.
local function stocked()
    for _, row in ipairs(ask.rows) do
        local name, granted, is_over = row[1], row[2], row[6]
        local window = opened_by(name)
        local is_quiet = window.held == 0 and room(window) == 0
        if window.is_known and is_over and is_quiet then
            call('DEL', base .. 'w:' .. name)
            call('ZREM', base .. 'due', name)
        elseif window.is_known then
            local got = max(0, granted - window.share)
            window.share = window.share + got
            window.others_spent, window.others_held = row[3], row[4]
            -- Half of what came is left: it is time to ask. Where there was less than was asked for, there is no more.
            if got > 0 or not row[5] then window.low = row[5] and floor(got / 2) or 0 end
            local is_settled = room(window) == 0 and window.held == 0 and window.need == 0
            set_due(window, window.need > 0 and URGENT or is_settled and window.ends + 60 or now + TOLD_SECONDS)
            write(window)
        end
    end
    if ask.is_heard then call('HSET', marker, 'told_at', text(now)) end
    if call('HGET', marker, 'turn_by') == ask.by then call('HDEL', marker, 'turn_by', 'turn_until') end
    return '"done"'
end

-- How windows stand: spent, held, forfeited, until their end, of a rate until it is as new; null: nobody drew on it.
local function stand()
    local rows = {}
    for i, asked in ipairs(ask.windows) do
        local starts, ends = span(asked[4], now)
        local window = opened(table.concat({asked[1], asked[3] and 1 or 0, asked[4], text(starts), asked[2]}, ':'), asked[4],
            starts, ends)
        rows[i] = window.is_known and format('[%.0f,%.0f,%.0f,%.6f,%.6f]', window.spent + window.others_spent,
            window.held + window.others_held, window.forfeited, ends and ends - now or -1, max(0, window.theoretical - now))
            or 'null'
    end
    return '[' .. table.concat(rows, ',') .. ']'
end

if operation == 'begin' then
    local known = call('HMGET', marker, 'id', 'history')
    if known[1] and known[2] == history() then return cjson.encode(known[1]) end
    call('DEL', marker)
    call('HSET', marker, 'id', generation, 'history', history(), 'told_at', text(now))
    return cjson.encode(generation)
end
if not is_present() then return '"lost"' end
if operation == 'sync' then return sync() end
if operation == 'dead' then
    local dead = call('ZRANGEBYSCORE', base .. 'holders', '-inf', text(now), 'LIMIT', '0', '100')
    return #dead > 0 and cjson.encode(dead) or '[]'
end
if operation == 'end' then return end_holder() end
if operation == 'stock' then return stock() end
if operation == 'stocked' then return stocked() end
if operation == 'stand' then return stand() end
if operation == 'void' then return tostring(call('DEL', marker)) end
error('no such operation: ' .. operation)
