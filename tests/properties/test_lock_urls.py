"""Whatever a password is, it is not in what is shown of an address."""

from __future__ import annotations

import string
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchard_infra.errors import ConfigurationError
from orchard_infra.locks import urls
from orchard_infra.locks.redis import RedisLock
from orchard_infra.locks.urls import (
    URL_VARIABLE,
    find_url,
    has_password,
    lock_from_url,
    redacted,
)

unhurried = settings(deadline=None)

# RFC 3986, 3.2.1: what may stand in the user information as it is; "%" begins an escape.
UNRESERVED = string.ascii_letters + string.digits + "-._~"
IN_USERINFO = UNRESERVED + "!$&'()*+,;=" + ":"
anything = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
secrets = st.one_of(
    st.text(IN_USERINFO, min_size=1),
    anything.map(lambda text: quote(text, safe="")),
    # Not allowed there, and quoted in the error that says so.
    st.text(IN_USERINFO + "@/?#[]%", min_size=1),
)
users = st.text(UNRESERVED)
tails = st.sampled_from(["", "/locks", ":5432/locks", ":6379/0?ssl_ca_certs=/etc/ca.pem", "?a=b"])

# Long enough, and of letters that no address has: else it might be in the rest by chance.
MARK = "\N{BLACK STAR}"


def marked(secret: str) -> str:
    return f"{MARK}{secret}{MARK}"


@given(st.sampled_from(["postgresql", "postgres", "redis", "rediss"]), users, secrets, tails)
@example("redis", "", "pw", "")
@example("redis", "", "pa/ss", "")
@example("redis", "", "7/@", "")
@example("postgresql", "ada", "p@ss", "/locks")
@example("postgresql", "ada", "5432", "/locks")
@unhurried
def test_in_an_address(scheme: str, user: str, secret: str, tail: str) -> None:
    url = f"{scheme}://{user}:{marked(secret)}@db.example{tail}"
    assert has_password(url)
    for text in (url, f"cannot connect to {url}: refused", f"({url!r})"):
        shown = redacted(text)
        assert MARK not in shown
        assert f"{scheme}://{user}:***@db.example" in shown
        assert redacted(shown) == shown
    assert MARK not in urls.shown(url)
    assert has_password(f"{scheme}://{user}:{secret}@db.example{tail}") or secret == "***"


@given(anything, users)
@unhurried
def test_in_an_address_with_blanks_and_all(secret: str, user: str) -> None:
    url = f"redis://{user}:{marked(secret)}@db/locks"
    assert has_password(url)
    assert MARK not in urls.shown(url)


@given(
    st.sampled_from(["password", "sslpassword", "PASSWORD", "ssl_password", "passwd", "token"]),
    anything.map(lambda text: quote(text, safe="")),
)
@unhurried
def test_in_the_query_of_an_address(name: str, secret: str) -> None:
    url = f"postgresql://ada@db/locks?{name}={marked(secret)}&sslmode=require"
    assert has_password(url)
    assert redacted(url) == f"postgresql://ada@db/locks?{name}=***&sslmode=require"


def in_quotes(secret: str) -> str:
    escaped = secret.replace("\\", r"\\").replace("'", r"\'")
    return f"'{escaped}'"


def bare(secret: str) -> str:
    """A value without quotes, see libpq's "Connection Strings"."""
    return "".join(f"\\{char}" if char.isspace() or char in "'\\" else char for char in secret)


@given(anything, st.sampled_from([in_quotes, bare]), st.sampled_from(["=", " = "]))
@example("it's", in_quotes, "=")
@example("a\\' b", in_quotes, "=")
@example("a b", bare, "=")
@unhurried
def test_in_the_settings_of_libpq(secret: str, form, equals: str) -> None:  # type: ignore[no-untyped-def]
    if form is bare and "&" in secret:
        return  # which ends the value where it is in the query of an address
    settings = f"host=db password{equals}{form(marked(secret))} dbname=locks"
    assert has_password(settings)
    assert redacted(settings) == f"host=db password{equals}*** dbname=locks"
    assert MARK not in redacted(f"host=db password{equals}'{MARK} {MARK}")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://db",
        "postgresql://ada@db:5432/locks?sslmode=require",
        "postgresql://db:5432/locks?application_name=a@b",
        "postgresql://one:5432,two:5433/locks",
        "postgresql://[::1]:5432/locks",
        "postgresql:///locks?host=/run/postgresql&passfile=/home/ada/.pgpass",
        "redis://cache:6379/0",
        "unix:///run/redis.sock?db=1",
        "host=db dbname=locks passfile=/x",
        "service=locks",
        "file:/home/ada/.lock-url",
    ],
)
def test_an_address_without_a_password_is_shown_as_it_is(url: str) -> None:
    assert redacted(url) == url
    assert not has_password(url)


@given(secrets)
@unhurried
def test_an_address_that_nothing_speaks_to_is_not_quoted(secret: str) -> None:
    for url in (f"mysql://ada:{marked(secret)}@db/locks", f":{marked(secret)}"):
        with pytest.raises(ConfigurationError) as caught:
            lock_from_url(url)
        assert MARK not in str(caught.value)


def test_the_scheme_says_which_lock_it_is() -> None:
    for url in ("postgres://db", "postgresql://db", "POSTGRESQL://db", "host=db", "service = a"):
        assert type(lock_from_url(url, timeout=3)).__name__ == "PostgresLock"
    for url in ("redis://cache", "rediss://cache", "unix:///run/redis.sock"):
        assert lock_from_url(url, timeout=3).timeout == 3
        assert type(lock_from_url(url)).__name__ == "RedisLock"


def test_what_stands_after_a_number_sign_is_for_the_lock_itself() -> None:
    lock = lock_from_url("redis://cache/0#ttl=60&renew=10&lock_key=a%26b&guard=no")
    assert lock == RedisLock("redis://cache/0", ttl=60.0, renew=10.0, lock_key="a&b", guard=False)
    assert lock_from_url("redis://:p#ttl=1@cache") == RedisLock("redis://:p#ttl=1@cache")
    for wrong in ("ttl=0", "breath=3", "ttl=long"):
        with pytest.raises(ConfigurationError, match="after the #"):
            lock_from_url(f"redis://:{MARK}@cache#{wrong}")


def test_an_address_comes_from_the_argument_the_variable_or_a_file(tmp_path) -> None:
    path = tmp_path / "url"
    path.write_text("redis://:pw@cache/0\n# the lock of the group\n")
    assert find_url("redis://a", environ={URL_VARIABLE: "redis://b"}) == "redis://a"
    assert find_url(environ={URL_VARIABLE: "redis://b"}) == "redis://b"
    for given_ in (f"file:{path}", f"file://{path}"):
        assert find_url(given_, environ={}) == "redis://:pw@cache/0"
        assert find_url(environ={URL_VARIABLE: given_}) == "redis://:pw@cache/0"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"", "is empty"), (b"\n", "is empty"), (b"\xff\xfe", "not text")],
)
def test_a_file_without_an_address_is_named(tmp_path, content: bytes | None, words: str) -> None:
    path = tmp_path / "url"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=words) as caught:
        find_url(f"file:{path}", environ={})
    assert str(path) in str(caught.value)


def test_without_any_address_the_ways_to_give_one_are_named() -> None:
    with pytest.raises(ConfigurationError, match=f"set {URL_VARIABLE}"):
        find_url(environ={})
