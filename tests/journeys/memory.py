"""Memory: every message that was ever in a site's outbox, however soon the relay took it out.

Whoever looks at the outbox now and then misses a message that comes and goes in between. The database
itself remembers here, in a trigger, and so in the same transaction.
"""

from __future__ import annotations

from sqlalchemy import text

from tests.journeys.site import Site

__all__ = ["Memory"]

_BEGIN = {
    "postgresql": (
        """CREATE OR REPLACE FUNCTION keep_message() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN INSERT INTO every_message SELECT NEW.*; RETURN NEW; END $$""",
        """CREATE TRIGGER keep_message AFTER INSERT ON outbox
           FOR EACH ROW EXECUTE FUNCTION keep_message()""",
    ),
    "mariadb": (
        """CREATE TRIGGER keep_message AFTER INSERT ON outbox FOR EACH ROW
           INSERT INTO every_message SELECT * FROM outbox WHERE id = NEW.id""",
    ),
    "sqlite": (
        """CREATE TRIGGER keep_message AFTER INSERT ON outbox
           BEGIN INSERT INTO every_message SELECT * FROM outbox WHERE id = NEW.id; END""",
    ),
}
_END = {
    "postgresql": "DROP TRIGGER IF EXISTS keep_message ON outbox",
    "mariadb": "DROP TRIGGER IF EXISTS keep_message",
    "sqlite": "DROP TRIGGER IF EXISTS keep_message",
}


class Memory:
    """What comes into the outbox of `site`, from now on and until the messages are delivered again."""

    def __init__(self, site: Site) -> None:
        self._site = site
        dialect = site.engine.dialect.name
        self._end = (text(_END[dialect]), text("DROP TABLE IF EXISTS every_message"))
        with site.engine.begin() as connection:
            for statement in self._end:
                connection.execute(statement)
            connection.execute(text("CREATE TABLE every_message AS SELECT * FROM outbox"))
            for begin in _BEGIN[dialect]:
                connection.execute(text(begin))

    def deliver_again(self) -> int:
        """Put every message into the outbox once more, and forget them; return how many."""
        site = self._site
        types = {column.name: column.type for column in site.outbox.tables.outbox.columns}
        every = text("SELECT * FROM every_message ORDER BY id").columns(**types)
        with site.engine.begin() as connection:
            rows = [dict(row) for row in connection.execute(every).mappings()]
            for statement in self._end:
                connection.execute(statement)
        if rows:
            site.insert_again(rows)
        return len(rows)
