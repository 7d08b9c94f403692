"""What is answered when nothing has happened yet."""

from __future__ import annotations

from support.exchanges import exchange, request

QUERIES = (
    "query-name", "query-uuid", "query-status", "query-version", "query-migrate",
    "query-migrate-capabilities", "query-migrate-parameters", "query-dirty-rate",
)  # fmt: skip

EXCHANGES = [
    *(exchange(f"{command}, no arguments", request(command)) for command in QUERIES),
    *(exchange(f"{command}, empty arguments", request(command, {}))
      for command in QUERIES),
    exchange("all in one write", b"".join(request(c, id=c) for c in QUERIES)),
    exchange("start postcopy before there is anything",
             request("migrate-set-capabilities",
                     {"capabilities": [{"capability": "postcopy-ram", "state": True}]}),
             request("migrate-start-postcopy")),
    exchange("cancel before there is anything", request("migrate_cancel"),
             request("query-migrate")),
    exchange("quit, and nothing behind it", request("quit", {"x": 1}),
             request("query-name")),
]  # fmt: skip
