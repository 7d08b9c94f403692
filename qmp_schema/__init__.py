"""The schema of the control protocol, as JSON; `common.qmp.schema` reads it.

Each file has up to four members:

    commands   name -> doc, arguments, returns, allow-oob, alternative
    aliases    other name -> command
    events     name -> doc, data
    types      name -> one of
                 members [, tag, variants]   an object
                 members, base               another object with members added, or
                                             replaced where the name is the same
                 enum                        value -> doc
                 names-of                    an enum: the member names of an object
                 alternate                   any of these types

`arguments`, `returns` and `data` name a type; arguments and data may also list
members in place. A member is `"name": "type"` or `"name": {"type": …}`, with
a question mark after the name of an optional one; `["T"]` is an array of T. A
member may have `doc`, `default`, `features`, and a `range` with `from` and `to`
(a number, or the name of a member that holds it), `power-of-two` and the
`error` to give. A command with `alternative` also takes that type as its
arguments, when none of its own are given.
"""
