"""Who may call, and how much of the gateway each may use.

A tenant is a name with the tokens of its callers and its quotas, from a TOML file that is read again when it changes:

    [keys.search]                  # letters, digits, ".", "_" and "-"; shown in metrics and in the log
    sha256 = ["9f86d08..."]        # of each token, in hex; two while a new one takes the place of an old one
    inputs_per_second = 500        # what follows may be left out: no limit
    burst_inputs = 1000            # inputs at once after a pause; one second's worth unless given
    requests_per_second = 50
    burst_requests = 100
    inflight_inputs = 256          # inputs being served at a time; bulk work may take half

The file holds hashes only, so that whoever reads it cannot call. A token is looked up by its hash: how long that takes
says something about the hash, from which no token can be derived. Tokens must therefore be random, not words.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from embedmesh.errors import QuotaExceeded, Retryable, Unauthenticated
from embedmesh_gateway.admission import Admission
from embedmesh_server.files import FileError, Followed
from embedmesh_server.metrics import KEY_OUTCOMES, GatewayMetrics

__all__ = ["Bucket", "Quotas", "Tenant", "Tenants", "read_keys"]

_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_SHA256: Final = r"^[0-9a-f]{64}$"


class Quotas(BaseModel):
    """The table of one tenant, as in the file; None is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[
        tuple[Annotated[str, Field(pattern=_SHA256)], ...],
        Field(min_length=1, repr=False),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ]
    inputs_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)
    burst_inputs: int | None = Field(None, ge=1)
    requests_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)
    burst_requests: int | None = Field(None, ge=1)
    inflight_inputs: int | None = Field(None, ge=1)


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Annotated[dict[Annotated[str, Field(pattern=_NAME)], Quotas], Field(min_length=1)]


def read_keys(path: Path) -> Mapping[str, Quotas]:
    """Read the file of keys: quotas by name.

    Raises:
        FileError: With every mistake in it, and none of its values.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FileError(f"{path} is not TOML: {error}") from None
    try:
        keys = _Keys.model_validate(table).keys
    except ValidationError as error:
        issues = error.errors(include_url=False, include_input=False)
        problems = "; ".join(
            f"{'.'.join(str(part) for part in issue['loc'] if part != '[key]')}: {issue['msg']}" for issue in issues
        )
        raise FileError(f"{path}: {problems}") from None
    owners: dict[str, str] = {}
    for name, quotas in keys.items():
        for digest in quotas.sha256:
            if owners.setdefault(digest, name) != name:
                raise FileError(f"{path}: keys.{owners[digest]} and keys.{name} have a token in common")
    return keys


class Bucket:
    """A token bucket: at most `size` at once, and `rate` a second in the long run.

    Who wants more than it holds when full goes when it is full, and leaves a debt.

    Args:
        rate: By which it fills, a second.
        size: What it holds at most, and at first.
        now: In seconds of any clock, as everywhere here.
    """

    def __init__(self, rate: float, size: float, now: float) -> None:
        self.rate, self.size = rate, size
        self._level = float(size)
        self._at = now

    def __repr__(self) -> str:
        return f"<Bucket {self._level:.1f}/{self.size:g} +{self.rate:g}/s>"

    def pause(self, n: int, now: float) -> float:
        """Seconds until `n` may be taken; 0 when it may be now."""
        self._level = min(self.size, self._level + (now - self._at) * self.rate)
        self._at = now
        return max(0.0, (min(n, self.size) - self._level) / self.rate)

    def take(self, n: int) -> None:
        """Take `n`; a negative number gives back."""
        self._level = min(self.size, self._level - n)

    def change(self, rate: float, size: float, now: float) -> None:
        """Fill up as before until now, and by other numbers from now on."""
        self.pause(0, now)
        self.rate, self.size = rate, size
        self._level = min(self._level, size)


class Tenant:
    """What the callers of one name use together, and may use."""

    def __init__(self, name: str, quotas: Quotas, metrics: GatewayMetrics) -> None:
        self._name = name
        # Kept, since the metrics forget the name when the file does, and calls may still be in flight.
        self._inputs = {outcome: metrics.key_inputs.labels(name, outcome) for outcome in KEY_OUTCOMES}
        self._in_flight = metrics.key_inputs_in_flight.labels(name)
        self._buckets: dict[str, Bucket] = {}
        self._admission: Admission | None = None
        self._turn = asyncio.Lock()  # of those who wait
        self.change(quotas)

    def __repr__(self) -> str:
        return f"<Tenant {self._name} {self._buckets} {self._admission!r}>"

    def change(self, quotas: Quotas) -> None:
        """Go by other quotas; what was used stays used."""
        now = _now()
        for quota, rate, burst in (
            ("requests_per_second", quotas.requests_per_second, quotas.burst_requests),
            ("inputs_per_second", quotas.inputs_per_second, quotas.burst_inputs),
        ):
            if rate is None:
                self._buckets.pop(quota, None)
                continue
            size = float(burst or max(1.0, rate))
            if quota in self._buckets:
                self._buckets[quota].change(rate, size, now)
            else:
                self._buckets[quota] = Bucket(rate, size, now)
        limit = quotas.inflight_inputs
        if limit is None:
            self._admission = None
        elif self._admission is not None:
            self._admission.resize(limit)
        else:
            self._admission = Admission(limit, self._full)

    @asynccontextmanager
    async def hold(self, n: int, *, bulk: bool, patient: bool, deadline: float) -> AsyncIterator[None]:
        """Count a request of `n` inputs against the quotas; when they are used up refuse, or wait when `patient`.

        Those who wait go one after the other; who does not wait may overtake them. What fails for a reason that passes
        is given back.

        Raises:
            QuotaExceeded: With the time until the same request would be let in.
            DeadlineExceeded: No place came free in time.
        """
        if self._buckets:
            if patient:
                await self._wait(n, deadline)
            elif self._pause(n):
                raise self._used_up(n)
            self._take(n)
        try:
            if self._admission is None:
                with self._counted(n):
                    yield
            else:
                async with self._admission.hold(n, bulk=bulk, patient=patient, deadline=deadline):
                    with self._counted(n):
                        yield
        except Retryable:
            self._take(n, -1)
            raise

    async def _wait(self, n: int, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline), self._turn:
                while pause := self._pause(n):
                    if _now() + pause > deadline:
                        raise self._used_up(n)
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise self._used_up(n) from None

    def _pause(self, n: int) -> float:
        now = _now()
        return max(bucket.pause(_amount(quota, n), now) for quota, bucket in self._buckets.items())

    def _take(self, n: int, times: int = 1) -> None:
        for quota, bucket in self._buckets.items():
            bucket.take(times * _amount(quota, n))

    @contextmanager
    def _counted(self, n: int) -> Iterator[None]:
        self._inputs["admitted"].inc(n)
        self._in_flight.inc(n)
        try:
            yield
        finally:
            self._in_flight.dec(n)

    def _used_up(self, n: int) -> QuotaExceeded:
        now = _now()
        pause, quota = max((bucket.pause(_amount(quota, n), now), quota) for quota, bucket in self._buckets.items())
        return self._refusal(n, quota, self._buckets[quota].rate, pause)

    def _full(self, n: int, admission: Admission, pause: float) -> QuotaExceeded:
        return self._refusal(n, "inflight_inputs", admission.limit, pause)

    def _refusal(self, n: int, quota: str, limit: float, pause: float) -> QuotaExceeded:
        self._inputs[quota].inc(n)
        return QuotaExceeded(
            f"the quota of key {self._name} is used up: {limit:g} {quota.replace('_', ' ')}",
            # A moment more, lest who comes back exactly then be told so again.
            retry_after=pause + 0.001,
            metadata={"quota": quota, "limit": f"{limit:g}"},
        )


class _Key:
    """One token of a tenant, known by its hash."""

    __slots__ = ("name", "revoked", "tenant")

    def __init__(self, name: str, tenant: Tenant) -> None:
        self.name, self.tenant, self.revoked = name, tenant, False


_key: contextvars.ContextVar[_Key] = contextvars.ContextVar("embedmesh_key")


class Tenants:
    """Knows whose a token is.

    Args:
        keys: Quotas by name, as `read_keys` gives them.
        metrics: Counts what each uses.
    """

    def __init__(self, keys: Followed[Mapping[str, Quotas]], metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._tenants: dict[str, Tenant] = {}
        self._keys: dict[bytes, _Key] = {}
        self._update(keys.value)
        keys.on_change(self._update)

    def __repr__(self) -> str:
        return f"<Tenants {' '.join(sorted(self._tenants))}>"

    def authenticate(self, metadata: Mapping[str, str | bytes]) -> str:
        """Find out who calls, from the metadata of a call, and remember it for `caller`; gives the name.

        Raises:
            Unauthenticated: There is no token, or none that is known.
        """
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated('the call brings no key: send it as metadata "authorization: Bearer KEY"')
        key = self._keys.get(_digest(token))
        if key is None:
            raise Unauthenticated("the key is not known here: it is mistyped, or was revoked")
        _key.set(key)
        return key.name

    def caller(self) -> Tenant:
        """Whose call is being served.

        Raises:
            Unauthenticated: The key was revoked since the call began, as that of a stream can be.
        """
        key = _key.get()
        if key.revoked:
            raise Unauthenticated("the key was revoked")
        return key.tenant

    def _update(self, keys: Mapping[str, Quotas]) -> None:
        for name in self._tenants.keys() - keys.keys():
            del self._tenants[name]
            self._metrics.forget_key(name)
        for name, quotas in keys.items():
            if name in self._tenants:
                self._tenants[name].change(quotas)
            else:
                self._tenants[name] = Tenant(name, quotas, self._metrics)
        before, self._keys = self._keys, {}
        for name, quotas in keys.items():
            for digest in map(bytes.fromhex, quotas.sha256):
                known = before.get(digest)
                if known is None or known.tenant is not self._tenants[name]:
                    known = _Key(name, self._tenants[name])
                self._keys[digest] = known
        for digest, key in before.items():
            key.revoked = self._keys.get(digest) is not key


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _amount(quota: str, n: int) -> int:
    return 1 if quota == "requests_per_second" else n


def _now() -> float:
    return asyncio.get_running_loop().time()
