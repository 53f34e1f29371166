import pytest

from embedmesh_gateway.redis_url import parse_redis_url, redacted
from embedmesh_gateway.settings import GatewaySettings
from embedmesh_server.settings import SettingsError, read


def read_settings(*argv: str, **environ: str) -> GatewaySettings:
    return read(
        GatewaySettings,
        prog="embedmesh-gateway",
        section="gateway",
        env_prefix="EMBEDMESH_GATEWAY_",
        description="",
        argv=argv,
        environ={f"EMBEDMESH_GATEWAY_{name}": value for name, value in environ.items()},
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("", ""),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://user:secret@host/1?ssl_cert_reqs=none", "rediss://user:***@host/1"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
        ("redis://[secret", "***"),
        ("redis+sentinel://:secret@a:1,b:2/main", "redis+sentinel://:***@a:1,b:2/main"),
        ("redis+sentinel://a,b/main?sentinel_password=secret", "redis+sentinel://a,b/main"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_a_password_is_neither_in_the_repr_nor_in_an_error_message() -> None:
    settings = read_settings("--text-target", "x:1", REDIS_URL="redis://:secret@host:6379")
    assert settings.redis_url == "redis://:secret@host:6379"
    assert "secret" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        read_settings("--text-target", "x:1", "--redis-url", "http://:secret@host")
    assert "must start with redis://" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_urls_of_several_servers() -> None:
    url = parse_redis_url("rediss+sentinel://user:p%40ss@a,[::1]:7/main/3?sentinel_password=q&ssl_cert_reqs=none")
    assert (url.kind, url.hosts, url.master) == ("sentinel", (("a", 26379), ("::1", 7)), "main")
    assert url.options == {"username": "user", "password": "p@ss", "db": 3, "ssl": True, "ssl_cert_reqs": "none"}
    assert url.sentinel_options == {"password": "q", "ssl": True, "ssl_cert_reqs": "none"}
    url = parse_redis_url("redis+cluster://a:7000,b")
    assert (url.kind, url.hosts, url.options) == ("cluster", (("a", 7000), ("b", 6379)), {})


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://a", "must start with redis://"),
        ("redis+cluster", "must start with redis://"),
        ("redis+sentinel://a:1", "lacks the name that the Sentinels know the master by"),
        ("redis+sentinel://a:1/main/x", "the number of a database only"),
        ("redis+sentinel://a:1/main/0/1", "the number of a database only"),
        ("redis+sentinel://a:1,/main", "'' is no host"),
        ("redis+cluster://", "'' is no host"),
        ("redis+cluster://a:0", "'a:0' is no host"),
        ("redis+cluster://a:99999", "'a:99999' is no host"),
        ("redis+cluster://a b", "'a b' is no host"),
        ("redis+cluster://::1", "'::1' is no host"),
        ("redis+cluster://a/3", "has no databases"),
        ("redis+cluster://a?db=3", "has no databases"),
        ("redis+cluster://a?socket_timeout=soon", "Invalid value for 'socket_timeout'"),
    ],
)
def test_an_url_that_cannot_work_is_refused(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_redis_url(url)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings("--text-target", "x:1", "--max-inputs", "0", "--cache-ttl-seconds", "never")
    assert len(caught.value.problems) == 2


def test_a_gateway_without_encoders_has_nothing_to_serve() -> None:
    with pytest.raises(SettingsError, match="--text-target, --image-target or --audio-target"):
        read_settings(REDIS_URL="redis://:secret@host")


def test_a_missing_target_never_shows_the_password() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(REDIS_URL="redis://:secret@host")
    assert "secret" not in str(caught.value)


def test_targets_are_those_that_were_given() -> None:
    assert read_settings("--text-target", "a:1", AUDIO_TARGET="b:2").targets == {"text": "a:1", "audio": "b:2"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--upstream-tls-cert", "c"), "--upstream-tls-cert and --upstream-tls-key go together"),
        (("--upstream-tls-key", "k"), "--upstream-tls-cert and --upstream-tls-key go together"),
        (("--upstream-tls-cert", "c", "--upstream-tls-key", "k"), "needs --upstream-tls-ca"),
        (("--upstream-tls-name", "n"), "needs --upstream-tls-ca"),
    ],
)
def test_half_a_tls_is_refused(flags: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        read_settings("--text-target", "x:1", *flags)


def test_calls_are_held_unless_that_is_turned_off() -> None:
    assert read_settings("--text-target", "a:1").hold_ms == 5
    assert read_settings("--text-target", "a:1", "--hold-ms", "0").hold_ms == 0
    with pytest.raises(SettingsError, match="hold-ms"):
        read_settings("--text-target", "a:1", "--hold-ms", "-1")
