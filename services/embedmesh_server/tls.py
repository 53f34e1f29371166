"""Certificates and private keys from PEM files, for servers and for channels."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import grpc

from embedmesh_server.files import FileError, Files, Followed

__all__ = ["Identity", "TlsFiles", "follow", "server_credentials"]


class TlsFiles(NamedTuple):
    """Where the PEM files are, each None where there is none."""

    certificate: Path | None
    key: Path | None
    authorities: Path | None


class Identity(NamedTuple):
    """What is in them; empty where there is no file."""

    certificate: bytes
    key: bytes
    authorities: bytes

    def __repr__(self) -> str:
        return "<Identity>"  # a private key is in it


def follow(files: Files, name: str, paths: TlsFiles) -> Followed[Identity]:
    """Read PEM files now, and again when they change.

    Raises:
        FileError: One is missing or of no use, or the key is not the certificate's.
    """
    return files.follow(name, [path for path in paths if path is not None], lambda: _read(paths))


def server_credentials(identity: Followed[Identity]) -> grpc.ServerCredentials:
    """Credentials that show every new connection the newest certificate.

    Where there are authorities, clients without a certificate of theirs are refused.
    """
    given = identity.value

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(given.key, given.certificate)], given.authorities or None)

    def newer() -> grpc.ServerCertificateConfiguration | None:
        # gRPC asks before each handshake, on a thread of its own; None stands for no change.
        nonlocal given
        newest = identity.value
        if newest is given:
            return None
        given = newest
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        newer,  # type: ignore[arg-type]  # the stubs do not know that it may give None
        require_client_authentication=bool(given.authorities),
    )


def _read(paths: TlsFiles) -> Identity:
    identity = Identity(*(b"" if path is None else _bytes(path) for path in paths))
    # OpenSSL judges here, in words; gRPC would refuse the same files in silence.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if paths.certificate is not None:
        try:
            # With a password given OpenSSL asks for none at the terminal.
            context.load_cert_chain(paths.certificate, paths.key, password="")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise FileError(f"{paths.key} is not the key of the certificate in {paths.certificate}") from None
            raise FileError(
                f"{paths.certificate} and {paths.key} are not a certificate and its private key in PEM, unencrypted"
            ) from None
        except OSError as error:
            raise FileError(f"{error.filename or paths.certificate} cannot be read: {error.strerror}") from None
    if identity.authorities:
        try:
            context.load_verify_locations(cadata=identity.authorities.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError):
            raise FileError(f"{paths.authorities} holds no certificates of authorities in PEM") from None
    return identity


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    if not content:
        raise FileError(f"{path} is empty")
    return content
