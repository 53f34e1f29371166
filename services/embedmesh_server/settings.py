"""Settings of a process: one frozen object, read once, every problem reported together.

A value comes from, in falling order of precedence: a flag (`--http-port`), an environment
variable (prefix + upper-case name, `EMBEDMESH_GATEWAY_HTTP_PORT`), the table of the process
in a TOML file named by `--config` or `EMBEDMESH_CONFIG`, the default. Lists are repeated
flags, comma-separated environment variables, TOML arrays.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["NodeSettings", "SettingsError", "load", "read"]

MIB = 1024 * 1024
CONFIG_ENV = "EMBEDMESH_CONFIG"


class NodeSettings(BaseModel):
    """What every process can be told; roles add their own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(0, ge=0, le=65535, description="Port of the gRPC service; 0 takes any free one.")
    http_port: int = Field(
        0, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 takes any free one."
    )
    http_host: str = Field("", description="Address of the HTTP port where it is not that of the gRPC service.")
    tls_cert: Path | None = Field(
        None, description="Certificate to show, with its chain, PEM; with it the gRPC port speaks TLS only."
    )
    tls_key: Path | None = Field(None, description="Private key of --tls-cert, PEM, unencrypted.")
    tls_client_ca: Path | None = Field(
        None, description="Authorities, PEM; with it callers must show a certificate that one of them vouches for."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level to log; debug logs a line for every call."
    )
    log_format: Literal["json", "text"] = Field("json", description="One JSON object a line, or lines for people.")
    drain_seconds: float = Field(20.0, ge=0, description="After SIGTERM, how long calls in flight may take to finish.")
    max_message_bytes: int = Field(64 * MIB, ge=MIB, description="Largest gRPC message sent or received.")
    max_connection_age_seconds: float = Field(
        300.0, gt=0, description="Connections are renewed after this long, so that clients see new replicas."
    )
    default_timeout_seconds: float = Field(60.0, gt=0, description="Deadline of calls that bring none.")
    tracing: bool = Field(
        False,
        description="Record spans of calls and send them by OTLP, where the OTEL_ variables of OpenTelemetry say; "
        "needs embedmesh[tracing].",
    )
    trace_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Part of the calls to record whose callers have not decided that; by default what "
        "OTEL_TRACES_SAMPLER says, else 0.01.",
    )
    ready_file: Path | None = Field(
        None, description="File to write addresses and pid into, as JSON, once the node serves."
    )

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: give both, or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca asks callers for certificates, which needs --tls-cert and --tls-key")
        return self


S = TypeVar("S", bound=NodeSettings)


class SettingsError(ValueError):
    """All problems found in the settings of a process, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def load(
    settings: type[S],
    *,
    prog: str,
    section: str,
    env_prefix: str,
    description: str = "",
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> S:
    """Read the settings of a process, or end it with status 2 and every problem on stderr."""
    try:
        return read(
            settings,
            prog=prog,
            section=section,
            env_prefix=env_prefix,
            description=description,
            argv=sys.argv[1:] if argv is None else argv,
            environ=environ,
        )
    except SettingsError as error:
        sys.stderr.write(f"{prog}: cannot start, {len(error.problems)} problem(s) in the settings:\n")
        sys.stderr.writelines(f"  {problem}\n" for problem in error.problems)
        sys.stderr.write(f"See `{prog} --help`.\n")
        raise SystemExit(2) from None


def read(
    settings: type[S],
    *,
    prog: str,
    section: str,
    env_prefix: str,
    description: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
) -> S:
    """Like `load`, but raise.

    Raises:
        SettingsError: With every problem: unknown flags, variables and keys, and values that do not fit.
    """
    flags, unknown = _parser(settings, prog, env_prefix, section, description).parse_known_args(argv)
    given = vars(flags)
    problems = [f"{flag}: no such flag{_suggest(flag, _flags(settings))}" for flag in unknown if flag.startswith("-")]
    problems += [f"{word}: unexpected argument" for word in unknown if not word.startswith("-")]
    config = given.pop("config") or environ.get(CONFIG_ENV)
    values = _from_file(config, section, problems) if config else {}
    values |= _from_environment(settings, env_prefix, environ, problems)
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        result = settings.model_validate(values)
    except ValidationError as error:
        for issue in error.errors():
            name = str(issue["loc"][0]) if issue["loc"] else section
            if issue["type"] == "extra_forbidden":
                problems.append(f"{name}: no such setting{_suggest(name, settings.model_fields)}")
                continue
            text = issue["msg"].removeprefix("Value error, ")
            text = text[0].lower() + text[1:]
            if not issue["loc"]:  # of several settings together: showing all of them would show secrets
                problems.append(text)
            else:
                where = f"{_flag(name)} ({env_prefix}{name.upper()}, or {name} in [{section}])"
                problems.append(f"{where}: {text}, got {issue['input']!r}")
        raise SettingsError(problems) from None
    if problems:
        raise SettingsError(problems)
    return result


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flags(settings: type[NodeSettings]) -> list[str]:
    return [_flag(name) for name in settings.model_fields] + ["--config", "--help", "--version"]


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.partition("=")[0], list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) is types.UnionType:
        return any(_is_list(part) for part in get_args(annotation))
    return get_origin(annotation) in {tuple, list}


def _parser(
    settings: type[NodeSettings], prog: str, env_prefix: str, section: str, description: str
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description or settings.__doc__,
        epilog=f"Every flag can also be an environment variable ({env_prefix}HTTP_PORT for --http-port) or a key "
        f"of [{section}] in the --config file. Flags win over variables, variables over the file.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('embedmesh')}")
    parser.add_argument("--config", metavar="FILE", help=f"TOML file with a table [{section}] ({CONFIG_ENV}).")
    for name, field in settings.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "" if default is None or default in ("", ()) else f" (default: {default})"
        options: dict[str, Any] = {
            "dest": name,
            "default": None,
            "help": ((field.description or "") + shown).replace("%", "%%"),
        }
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif _is_list(field.annotation):
            options |= {"action": "append", "metavar": name.upper().removesuffix("S")}
        elif get_origin(field.annotation) is Literal:
            options["metavar"] = "{" + ",".join(map(str, get_args(field.annotation))) + "}"
        else:
            options["metavar"] = name.upper().rsplit("_", 1)[-1]
        parser.add_argument(_flag(name), **options)
    return parser


def _from_file(path: str, section: str, problems: list[str]) -> dict[str, Any]:
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8")).get(section, {})
    except OSError as error:
        problems.append(f"--config {path}: cannot be read: {error.strerror}")
        return {}
    except ValueError as error:
        problems.append(f"--config {path}: is not TOML: {error}")
        return {}
    if not isinstance(table, dict):
        problems.append(f"--config {path}: [{section}] must be a table")
        return {}
    return {key.replace("-", "_"): value for key, value in table.items()}


def _from_environment(
    settings: type[NodeSettings], prefix: str, environ: Mapping[str, str], problems: list[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix).lower()
        if name not in settings.model_fields:
            known = [prefix + known.upper() for known in settings.model_fields]
            problems.append(f"{variable}: no such setting{_suggest(variable, known)}")
        elif _is_list(settings.model_fields[name].annotation):
            values[name] = [part.strip() for part in value.split(",") if part.strip()]
        else:
            values[name] = value
    return values
