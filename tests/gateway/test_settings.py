import pytest

from embedmesh_gateway.settings import GatewaySettings, redacted
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
