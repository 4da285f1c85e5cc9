"""The servers that the tests of the network locks stand on do what those tests count on."""

from __future__ import annotations

from servers import PostgresServer, RedisServer


def test_a_server_of_each_kind_answers(postgres: PostgresServer, redis_server: RedisServer) -> None:
    assert postgres.execute("SELECT 1 + 1") == "2"
    assert redis_server.execute("PING") == "PONG"
