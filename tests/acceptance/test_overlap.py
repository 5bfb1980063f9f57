"""Addresses that keyproxy processes must not share: within a configuration, and between running processes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from pathlib import Path

import pytest

from keyproxy.config.schema import Listen, Settings, Upstream
from keyproxy.process import startup_conflicts
from tests.acceptance.conftest import STUCK_SECONDS, Configure, Output, Site, administering, until
from tests.rawhttp import free_port


@pytest.mark.parametrize(
    ("tables", "result"),
    [
        ({"ops": {"address": "127.0.0.1:{port}"}}, "ops.address: 127.0.0.1:{port} overlaps listen.address"),
        ({"ops": {"address": "0.0.0.0:{port}"}}, "ops.address: 0.0.0.0:{port} overlaps listen.address"),
        ({"admin": {"address": "[::]:{port}"}}, "admin.address: [::]:{port} overlaps listen.address"),
        ({"admin": {"address": "localhost:{port}"}}, "admin.address: localhost:{port} overlaps listen.address"),
        ({"admin": {"address": "127.1:{port}"}}, "admin.address: 127.1:{port} overlaps listen.address"),
        (
            {"upstream": {"url": "http://127.0.0.1:{port}"}},
            "upstream.url: http://127.0.0.1:{port} is this proxy itself",
        ),
        ({"upstream": {"test_url": "http://localhost:{port}"}}, "upstream.test_url: http://localhost:{port} is this"),
        ({"upstream": {"url": "http://0:{port}"}}, "upstream.url: http://0:{port} is this proxy itself"),
    ],
)
async def test_overlapping_addresses_are_refused_by_config_check_and_at_start(
    configure: Configure, dsn: str, tables: dict[str, dict[str, str]], result: str
) -> None:
    port = free_port()
    filled = {table: {key: value.format(port=port) for key, value in keys.items()} for table, keys in tables.items()}
    site = configure(dsn, **{"listen": {"address": f"127.0.0.1:{port}"}, **filled})
    for command in (("config", "check"), ("serve",), ("admin",)):
        output = await site.run(*command)
        assert (output.status, output.out) == (2, ""), command
        lines = output.err.splitlines()
        assert any(result.format(port=port) in line for line in lines)
        assert len(lines) == len(set(lines)), command


async def test_a_unix_socket_is_recognised_through_a_symbolic_link(
    configure: Configure, dsn: str, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    site = configure(
        dsn, listen={"address": f"unix:{tmp_path}/real/a.sock"}, upstream={"url": f"unix:{tmp_path}/link/a.sock"}
    )
    output = await site.run("config", "check")
    assert output.status == 2
    assert "is this proxy itself" in output.err


def another(site: Site, name: str, old: str, new: str) -> Site:
    """A site whose configuration differs from another one in one value."""
    config = site.config.with_name(name)
    content = site.config.read_text(encoding="utf-8")
    assert old in content
    config.write_text(content.replace(old, new), encoding="utf-8")
    return dataclasses.replace(site, config=config, printed=[])


async def refused(site: Site, *command: str) -> Output:
    """A process that must refuse to start and exit."""
    output = await asyncio.wait_for(site.run(*command), STUCK_SECONDS)
    assert (output.status, output.out) == (1, ""), output.err
    return output


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_second_proxy_on_the_port_has_to_have_the_same_upstream_and_store(
    configure: Configure, dsn: str, workers: int
) -> None:
    site = configure(dsn, listen={"workers": workers})
    secret = (await site.key())["secret"]
    elsewhere = another(site, "elsewhere.toml", f"http://127.0.0.1:{site.upstream.port}", "http://127.0.0.1:9")
    other_store = another(site, "other-store.toml", dsn, dsn.replace("/test_", "/other_"))
    wider = another(elsewhere, "wider.toml", f"127.0.0.1:{site.proxy_port}", f"0.0.0.0:{site.proxy_port}")
    async with site.serving() as process:
        for one in (elsewhere, other_store, wider):
            output = await refused(one, "serve")
            result = f"listen.address: a running `keyproxy serve` (pid {process.pid}) has this address, with another"
            assert result in output.err
        for _ in range(10):
            assert await site.call(secret) == (200, "")
        # The remedy in the message works: the same configuration for both.
        site.config.write_text(elsewhere.config.read_text(encoding="utf-8"), encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        await until(lambda: has_applied(site))
        async with elsewhere.serving():
            pass


async def has_applied(site: Site) -> bool:
    return b"configuration reloaded" in b"".join(site.printed)


async def test_purposes_do_not_mix_across_processes(configure: Configure, dsn: str) -> None:
    admin_port = free_port()
    site = configure(dsn, admin={"address": f"127.0.0.1:{admin_port}"})
    other = {"listen": free_port(), "ops": free_port()}
    apart = another(site, "apart.toml", f"127.0.0.1:{site.proxy_port}", f"127.0.0.1:{other['listen']}")
    apart = another(apart, "apart.toml", f"127.0.0.1:{site.ops_port}", f"127.0.0.1:{other['ops']}")
    swaps = {
        "admin.address": ((str(admin_port), str(site.proxy_port)), ("admin",)),
        "ops.address": ((str(other["ops"]), str(site.proxy_port)), ("serve",)),
        "listen.address": ((str(other["listen"]), str(site.ops_port)), ("serve",)),
    }
    async with site.serving() as process:
        for key, (change, command) in swaps.items():
            output = await refused(another(apart, "mixed.toml", *change), *command)
            assert f"{key}: a running `keyproxy serve` (pid {process.pid}) has this address as its" in output.err
        same_ops = another(apart, "ops.toml", str(other["ops"]), str(site.ops_port))
        assert "give each proxy its own ops.address" in (await refused(same_ops, "serve")).err
        async with administering(site, admin_port) as admin:
            mixed = another(apart, "mixed.toml", str(admin_port), str(free_port()))
            mixed = another(mixed, "mixed.toml", str(other["listen"]), str(admin_port))
            output = await refused(mixed, "serve")
            assert f"a running `keyproxy admin` (pid {admin.pid}) has this address as its admin.address" in output.err
            assert "a running `keyproxy admin`" in (await refused(site, "admin")).err


async def test_a_reload_to_an_address_of_another_process_changes_nothing(configure: Configure, dsn: str) -> None:
    site = configure(dsn)
    apart = another(site, "apart.toml", f"127.0.0.1:{site.proxy_port}", f"127.0.0.1:{free_port()}")
    apart = another(apart, "apart.toml", f"127.0.0.1:{site.ops_port}", f"127.0.0.1:{free_port()}")
    content = apart.config.read_text(encoding="utf-8")
    port, ops_port = (int(line.rpartition(":")[2].rstrip('"')) for line in content.splitlines() if "address" in line)
    apart = dataclasses.replace(apart, proxy_port=port, ops_port=ops_port)

    async def is_ready() -> bool:
        return (await apart.ops("/readyz"))[0] == 200

    async with site.serving(), apart.serving() as process:
        await until(is_ready, while_running=process)
        apart.config.write_text(content.replace(str(port), str(site.ops_port)), encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        await until(lambda: has_printed(apart, "has this address as its ops.address"))
        assert (await apart.ops("/readyz"))[0] == 200


async def has_printed(site: Site, text: str) -> bool:
    return text.encode() in b"".join(site.printed)


# -- the process registry


SAME = Settings(listen=Listen(address="127.0.0.1:1"), upstream=Upstream(url="http://a"))


@pytest.mark.parametrize(
    ("one", "other", "are_alike"),
    [
        ("postgresql://u:old@h/d", "postgresql://u:new@h/d", True),
        ("postgresql://u:p@h/d", "postgresql://v@H/d?application_name=x", True),
        ("postgresql://u@h/d", "postgresql://u@h/e", False),
        ("postgresql://u@h/d", "postgresql://u@i/d", False),
        ("postgresql://u@h:1/d", "postgresql://u@h:2/d", False),
        ("postgresql://u@/d?host=/a", "postgresql://u@/d?host=/b", False),
    ],
)
def test_a_store_is_the_same_with_other_credentials(one: str, other: str, are_alike: bool) -> None:
    assert (startup_conflicts.of_proxy(SAME, one) == startup_conflicts.of_proxy(SAME, other)) is are_alike


def test_a_name_encodes_the_presence_and_fits_a_socket_address() -> None:
    settings = Settings(listen=Listen(address="[2001:db8:1:2:3:4:5:6]:65535"))
    what = startup_conflicts.of_proxy(settings, "postgresql://u:hunter2@h/d")
    assert len(what.name()) < 107
    assert "hunter2" not in what.name()
    (host,) = startup_conflicts.addresses_of(what)["listen.address"].hosts
    assert (str(host), startup_conflicts.addresses_of(what)["listen.address"].port) == ("2001:db8:1:2:3:4:5:6", 65535)
    assert str(os.getpid()) in what.name()
