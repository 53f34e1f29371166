from pathlib import Path

import pytest
from pydantic import Field

from embedmesh_server.settings import NodeSettings, SettingsError, load, read


class DemoSettings(NodeSettings):
    """A demo."""

    port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC service.")
    models: tuple[str, ...] = Field((), description="Folders, 100% yours.")
    warm: bool = Field(True, description="Warm up.")


def read_demo(*argv: str, **environ: str) -> DemoSettings:
    return read(
        DemoSettings,
        prog="demo",
        section="demo",
        env_prefix="EMBEDMESH_DEMO_",
        description="",
        argv=argv,
        environ=environ,
    )


def problems(*argv: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read_demo(*argv, **environ)
    return caught.value.problems


def test_defaults() -> None:
    settings = read_demo()
    assert (settings.host, settings.port, settings.models, settings.warm) == ("127.0.0.1", 50051, (), True)


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text('[demo]\nport = 1\nhttp-port = 2\ndrain_seconds = 3.5\nmodels = ["a"]\n[other]\nx = 1\n')
    settings = read_demo("--config", str(config), "--port", "7", EMBEDMESH_DEMO_PORT="6", EMBEDMESH_DEMO_HTTP_PORT="5")
    assert (settings.port, settings.http_port, settings.drain_seconds, settings.models) == (7, 5, 3.5, ("a",))
    assert read_demo(EMBEDMESH_CONFIG=str(config)).port == 1


def test_lists_are_repeated_flags_or_comma_separated_variables() -> None:
    assert read_demo("--models", "a", "--models", "b").models == ("a", "b")
    assert read_demo(EMBEDMESH_DEMO_MODELS="a, b,").models == ("a", "b")


def test_switches() -> None:
    assert read_demo("--no-warm").warm is False
    assert read_demo(EMBEDMESH_DEMO_WARM="false").warm is False
    assert read_demo("--warm", EMBEDMESH_DEMO_WARM="0").warm is True


def test_all_problems_at_once(tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text("[demo]\nprot = 1\n")
    found = problems(
        "--config", str(config), "--port", "x", "--worm", "stray",
        EMBEDMESH_DEMO_HTTP_PORT="70000", EMBEDMESH_DEMO_HOSTS="h",
    )  # fmt: skip
    text = "\n".join(found)
    assert len(found) == 6, text
    assert "--port (EMBEDMESH_DEMO_PORT, or port in [demo]): input should be a valid integer" in text
    assert "got 'x'" in text
    assert "--http-port" in text
    assert "less than or equal to 65535" in text
    assert "prot: no such setting, did you mean port?" in text
    assert "--worm: no such flag, did you mean --warm?" in text
    assert "stray: unexpected argument" in text
    assert "EMBEDMESH_DEMO_HOSTS: no such setting, did you mean EMBEDMESH_DEMO_HOST?" in text


def test_bad_config_files(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in problems("--config", str(tmp_path / "none.toml"))[0]
    broken = tmp_path / "broken.toml"
    broken.write_text("[demo\n")
    assert "is not TOML" in problems("--config", str(broken))[0]
    flat = tmp_path / "flat.toml"
    flat.write_text("demo = 3\n")
    assert "[demo] must be a table" in problems("--config", str(flat))[0]


def test_load_ends_the_process_with_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(DemoSettings, prog="demo", section="demo", env_prefix="D_", argv=["--port=x", "--http-port=y"], environ={})
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "2 problem(s)" in shown
    assert "demo --help" in shown
    assert "Traceback" not in shown


def test_help_names_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(DemoSettings, prog="demo", section="demo", env_prefix="D_", argv=["--help"], environ={})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in DemoSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
    assert "(default: 50051)" in shown
    assert "100% yours" in shown


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_demo().port = 1
