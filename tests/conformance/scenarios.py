"""Commands in every state that one end can be brought to by itself."""

from __future__ import annotations

from support.scenarios import (
    LISTEN,
    Connect,
    End,
    Scenario,
    Settled,
    ask,
    capabilities,
    look,
    status,
)

NOBODY = "unix:/nowhere"
EVENTS = capabilities(events=True)
START_POSTCOPY = ask("migrate-start-postcopy")
# At 4 KiB a second precopy has no end.
SLOWLY = (
    ask("migrate-set-parameters", max_bandwidth=4096),
    ask("migrate", uri="exec:cat > /dev/null"),
)
# More than enough for what a destination reads before it gives up.
GARBAGE = b"this is no migration stream" * 10


def source(name: str, *steps):
    return Scenario(name, "source", (EVENTS, *steps))


def destination(name: str, *steps):
    return Scenario(name, "destination", (EVENTS, *steps))


# Commands for which this is the wrong state, or which are harmless.
PROBES = (
    ask("query-status"),
    ask("migrate-pause"),
    ask("migrate-recover", uri=NOBODY),
    ask("migrate-continue", state="none"),
    ask("migrate-continue", state="pre-switchover"),
    ask("migrate", uri=NOBODY, resume=True),
    ask("migrate-incoming", uri=NOBODY),
    ask("migrate-set-parameters", downtime_limit=5),
)

SOURCE = [
    source("nobody listens", ask("migrate", uri=NOBODY), status("failed"),
           ask("query-migrate"), ask("query-status"), *PROBES, START_POSTCOPY,
           ask("migrate_cancel"), ask("query-migrate"), capabilities(return_path=True),
           ask("migrate", uri=NOBODY), status("failed"),
           ask("migrate-continue", state="failed")),
    source("nobody listens, TCP", ask("migrate", uri="tcp:127.0.0.1:1"),
           status("failed"), ask("query-migrate"), ask("query-status")),
    source("no such descriptor", ask("migrate", uri="fd:nope"), ask("query-migrate"),
           ask("query-status"), ask("migrate", uri="fd:999")),
    source("a file in no folder", ask("migrate", uri="file:/nowhere/x"),
           ask("query-migrate"), ask("query-status")),
    source("active", *SLOWLY, status("active"), *PROBES,
           START_POSTCOPY, ask("migrate", uri=NOBODY), capabilities(),
           capabilities(postcopy_ram=True), ask("migrate-continue", state="active"),
           look("query-migrate"), ask("migrate_cancel"), status("cancelled"),
           ask("query-status"), ask("migrate_cancel"), capabilities(events=True),
           ask("migrate-continue", state="cancelled")),
    source("stopped and continued while active", *SLOWLY,
           status("active"), ask("stop"), ask("query-status"), ask("cont"),
           ask("query-status"), ask("migrate_cancel"), status("cancelled"),
           ask("query-status")),
    source("cancelled while the guest was stopped", ask("stop"),
           *SLOWLY, status("active"), ask("migrate_cancel"),
           status("cancelled"), ask("query-status"), ask("cont"), ask("query-status")),
    source("again after it was cancelled", *SLOWLY, status("active"),
           ask("migrate_cancel"), status("cancelled"), ask("migrate", uri=NOBODY),
           status("failed"), ask("query-migrate")),
    source("completed", ask("migrate", uri="exec:cat > /dev/null"),
           status("completed"), Settled("postmigrate"),
           look("query-migrate"), *PROBES, ask("stop"),
           ask("query-status"), ask("migrate_cancel"), START_POSTCOPY,
           ask("migrate", uri=NOBODY), ask("migrate-continue", state="completed"),
           capabilities(return_path=True), ask("cont")),
    source("held before the switchover", capabilities(pause_before_switchover=True),
           ask("migrate", uri="exec:cat > /dev/null"), status("pre-switchover"),
           *PROBES[:4], ask("migrate", uri=NOBODY), capabilities(),
           look("query-migrate"), ask("cont"), ask("stop"), ask("query-status"),
           ask("migrate-continue", state="active"),
           ask("migrate-continue", state="pre-switchover"), status("completed"),
           Settled("postmigrate")),
    source("cancelled before the switchover",
           capabilities(pause_before_switchover=True),
           ask("migrate", uri="exec:cat > /dev/null"), status("pre-switchover"),
           ask("migrate_cancel"), status("cancelled"), ask("query-status")),
    source("preempt wants more than one channel",
           capabilities(postcopy_ram=True, postcopy_preempt=True),
           ask("migrate", uri="exec:true"), ask("migrate", uri="file:/nowhere/x"),
           ask("query-migrate")),
    source("postcopy before there is a migration", capabilities(postcopy_ram=True),
           START_POSTCOPY, ask("migrate", uri=NOBODY), status("failed"),
           START_POSTCOPY),
    source("quit", ask("quit"), End()),
    source("quit, stopped", ask("stop"), ask("quit"), End()),
]  # fmt: skip

DESTINATION = [
    destination("listening", ask("migrate-incoming", uri=LISTEN), look("query-migrate"),
                *PROBES, ask("migrate-incoming", uri=LISTEN), START_POSTCOPY,
                ask("migrate", uri=NOBODY), ask("migrate_cancel"),
                ask("migrate-continue", state="setup"),
                capabilities(postcopy_ram=True, postcopy_preempt=True),
                capabilities(multifd=True), capabilities(return_path=True), ask("stop"),
                ask("query-status"), ask("cont"), look("query-migrate")),
    destination("listening, TCP", ask("migrate-incoming", uri="tcp:127.0.0.1:0"),
                look("query-migrate"), ask("query-status")),
    destination("no folder to listen in",
                ask("migrate-incoming", uri="unix:/nowhere/x")),
    destination("too long a path",
                ask("migrate-incoming", uri="unix:/tmp/" + "x" * 200)),
    destination("no such port", ask("migrate-incoming", uri="tcp:127.0.0.1:nope")),
    destination("no such host",
                ask("migrate-incoming", uri="tcp:no.such.host.invalid:1")),
    destination("no such descriptor", ask("migrate-incoming", uri="fd:nope")),
    destination("preempt wants more than one channel",
                capabilities(postcopy_ram=True, postcopy_preempt=True),
                ask("migrate-incoming", uri="exec:true"), ask("query-migrate")),
    destination("garbage", ask("migrate-incoming", uri=LISTEN, exit_on_error=False),
                Connect(GARBAGE), status("failed"), look("query-migrate"),
                ask("query-status"), ask("migrate-incoming", uri=LISTEN),
                ask("migrate-recover", uri=LISTEN), ask("migrate-pause"),
                ask("migrate", uri=NOBODY), capabilities(return_path=True)),
    destination("a stream that ends at once",
                ask("migrate-incoming", uri=LISTEN, exit_on_error=False),
                Connect(b"\0"), status("failed"), look("query-migrate")),
    destination("garbage ends the process", ask("migrate-incoming", uri=LISTEN),
                Connect(GARBAGE), End()),
    destination("a command that says something else",
                ask("migrate-incoming", uri="exec:echo " + "no stream " * 20,
                    exit_on_error=False),
                status("failed"), look("query-migrate")),
    destination("quit", ask("quit"), End()),
    destination("quit while listening", ask("migrate-incoming", uri=LISTEN),
                ask("quit"), End()),
]  # fmt: skip

SCENARIOS = [*SOURCE, *DESTINATION]
