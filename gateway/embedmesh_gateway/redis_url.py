"""Where Redis is: one server, a master that Sentinels name, or a Cluster.

    redis://[user:password@]host[:6379][/database][?options]        rediss:// with TLS, unix:// for a socket
    redis+sentinel://[user:password@]host[:26379],host/master[/database][?options]
    redis+cluster://[user:password@]host[:6379],host[?options]      some of its nodes; the others are found

rediss+sentinel:// and rediss+cluster:// speak TLS. Options are those of redis-py's URLs; user and password are
of the data servers, `sentinel_username` and `sentinel_password` of the Sentinels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from redis.asyncio.connection import SSLConnection, parse_url

__all__ = ["RedisUrl", "parse_redis_url", "redacted"]

_PLAIN: Final = ("redis", "rediss", "unix")
_SEVERAL: Final = re.compile(
    r"(?P<base>rediss?)\+(?P<kind>sentinel|cluster)://"
    r"(?:(?P<user>[^/?#]*)@)?(?P<hosts>[^/?#@]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?"
)
_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+)(?::(?P<port>[0-9]{1,5}))?")
_PORTS: Final = {"sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """An URL in redis-py's terms.

    Attributes:
        url: As it was given.
        kind: "single", "sentinel" or "cluster".
        hosts: Sentinels, or some nodes of the cluster; none for a single server.
        master: The name that Sentinels know the master by.
        options: Of connections to data servers; empty for a single server, whose URL redis-py reads itself.
        sentinel_options: Of connections to Sentinels.
    """

    url: str = field(repr=False)
    kind: str
    hosts: tuple[tuple[str, int], ...] = ()
    master: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)


def parse_redis_url(url: str) -> RedisUrl:
    """Read an URL.

    Raises:
        ValueError: It cannot work; the sentence says what to write, and never shows a password.
    """
    parts = _SEVERAL.fullmatch(url)
    if parts is None:
        if urlsplit(url).scheme in _PLAIN:
            return RedisUrl(url, "single")
        raise ValueError(
            "must start with redis://, rediss:// or unix://; or be redis+sentinel://host:26379,host:26379/master "
            "or redis+cluster://host:6379,host:6379 (rediss+... with TLS)"
        )
    kind = parts["kind"]
    hosts = tuple(_host(host, _PORTS[kind]) for host in parts["hosts"].split(","))
    path = [unquote(part) for part in parts["path"].strip("/").split("/") if part]
    user = "" if parts["user"] is None else f"{parts['user']}@"
    options: dict[str, Any] = dict(parse_url(f"{parts['base']}://{user}host?{parts['query'] or ''}"))
    del options["host"]
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    if kind == "cluster":
        if path not in ([], ["0"]) or options.pop("db", 0):
            raise ValueError("Redis Cluster has no databases to choose from: write nothing after the hosts")
        return RedisUrl(url, kind, hosts, options=options)
    if not path:
        raise ValueError("lacks the name that the Sentinels know the master by: redis+sentinel://host:26379/mymaster")
    master, *database = path
    if database:
        if len(database) > 1 or not database[0].isdecimal():
            raise ValueError("after the master's name there may be the number of a database only: /mymaster/0")
        options["db"] = int(database[0])
    given = [name for name in ("username", "password") if f"sentinel_{name}" in options]
    sentinel_options = {name: options.pop(f"sentinel_{name}") for name in given}
    sentinel_options |= {name: value for name, value in options.items() if name.startswith("ssl")}
    return RedisUrl(url, kind, hosts, master, options, sentinel_options)


def _host(text: str, port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    if found is None or not 0 < (number := int(found["port"] or port)) < 2**16:
        raise ValueError(f"{text!r} is no host, or host:port, between its commas")
    return found["host"].strip("[]"), number


def redacted(url: str) -> str:
    """Give `url` without its password, fit for logs."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    if parts.password is None and "password" not in parts.query:
        return url
    host = parts.netloc.rpartition("@")[2]
    user = "" if parts.password is None else f"{parts.username or ''}:***@"
    return f"{parts.scheme}://{user}{host}{parts.path}"
