"""The private servers, the proxy and the child processes that other tests rely on."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import kombu
import psycopg
import pytest
import redis

from tests.support.guardian import family
from tests.support.processes import Process, ProcessEnded, celery_beat, celery_worker
from tests.support.proxy import TcpProxy
from tests.support.servers import PostgreSQL, RabbitMQ, Redis, ServerMissing
from tests.support.waiting import WaitTimeout, wait_until

ROOT = Path(__file__).parents[2]


def connect(url: str) -> "psycopg.Connection[tuple[object, ...]]":
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def ask(url: str, query: str) -> object:
    with connect(url) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def test_postgresql_keeps_commits_through_a_kill() -> None:
    with PostgreSQL() as server:
        url = server.create_database()
        with connect(url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS answer")
            server.kill()
            assert not server.alive
            with pytest.raises(psycopg.OperationalError):
                connect(url)
        server.restart()
        assert ask(url, "SELECT answer FROM kept") == 7
        folder = server.folder
    assert not server.alive
    assert not folder.exists()


def test_postgresql_hangs_while_paused() -> None:
    with PostgreSQL() as server, connect(server.url) as connection:
        answers: list[object] = []
        asking = threading.Thread(target=lambda: answers.append(connection.execute("SELECT 1")))
        server.pause()
        asking.start()
        asking.join(0.2)
        assert asking.is_alive()
        server.resume()
        asking.join(10)
        assert answers


def test_postgresql_commits_in_two_phases(postgresql_url: str) -> None:
    with connect(postgresql_url) as connection:
        transaction = connection.xid(1, "two", "phases")
        connection.autocommit = False
        connection.tpc_begin(transaction)
        connection.execute("CREATE TABLE later AS SELECT 8 AS answer")
        connection.tpc_prepare()
        connection.tpc_commit()
    assert ask(postgresql_url, "SELECT answer FROM later") == 8


def test_databases_are_fresh(postgresql_server: PostgreSQL, postgresql_url: str) -> None:
    other = postgresql_server.create_database()
    assert other != postgresql_url
    with connect(other) as connection:
        connection.execute("CREATE TABLE only_here ()")
        postgresql_server.drop_database(other)  # with a connection open
    assert ask(postgresql_url, "SELECT to_regclass('only_here')") is None


def test_database_url_is_made_for_each_database(database_url: str) -> None:
    assert database_url.startswith(("postgresql+psycopg://", "sqlite:///"))


def test_redis_keeps_what_it_acknowledged_when_it_appends() -> None:
    with Redis(appendonly=True) as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("answer", 7)
        server.kill()
        server.restart()
        with redis.Redis.from_url(server.url) as client:
            assert client.get("answer") == b"7"


def test_redis_forgets_everything_when_it_does_not_append() -> None:
    with Redis() as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("answer", 7)
        server.kill()
        server.restart()
        with redis.Redis.from_url(server.url) as client:
            assert client.get("answer") is None


def test_redis_url_is_empty_each_time(redis_server: Redis, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


def publish(url: str, queue: str, text: str, **options: object) -> None:
    with kombu.Connection(url, transport_options={"confirm_publish": True}) as connection:
        bound = kombu.Queue(queue, durable=True)(connection.default_channel)
        bound.declare()
        connection.Producer().publish(text, routing_key=queue, retry=False, **options)


def test_rabbitmq_keeps_persistent_messages_through_a_kill() -> None:
    with RabbitMQ() as server:
        url = server.create_vhost()
        publish(url, "kept", "hello", delivery_mode=2)
        server.kill()
        with pytest.raises(ConnectionRefusedError), kombu.Connection(url) as connection:
            connection.connect()
        server.restart()
        # A queue comes up by itself, shortly after its vhost.
        wait_until(lambda: server.queue_depths(url) == {"kept": 1}, 60, "the message")


def test_rabbitmq_counts_queues_of_one_vhost(rabbitmq_server: RabbitMQ, amqp_url: str) -> None:
    assert rabbitmq_server.queue_depths(amqp_url) == {}
    publish(amqp_url, "größe", "one")
    publish(amqp_url, "größe", "two")
    assert rabbitmq_server.queue_depths(amqp_url) == {"größe": 2}
    assert rabbitmq_server.queue_depths("/") == {}
    assert amqp_url.rpartition("/")[2] in rabbitmq_server.rabbitmqctl("list_vhosts")


def test_rabbitmq_blocks_publishers_on_a_memory_alarm(
    rabbitmq_server: RabbitMQ, amqp_url: str
) -> None:
    rabbitmq_server.raise_memory_alarm()
    publishing = threading.Thread(target=publish, args=(amqp_url, "blocked", "hello"))
    try:
        publishing.start()
        publishing.join(0.5)
        assert publishing.is_alive()
    finally:
        rabbitmq_server.clear_memory_alarm()
    publishing.join(10)
    assert rabbitmq_server.queue_depths(amqp_url) == {"blocked": 1}


def test_a_missing_program_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServerMissing, match=r"apt-get install -y .*redis-server"):
        Redis()


def test_servers_end_when_their_owner_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import time
        from tests.support.processes import Process
        from tests.support.servers import PostgreSQL
        server = PostgreSQL().start()
        child = Process(["sh", "-c", "sleep 1000 & sleep 1000"], name="sleeper")
        print("up", server.pid, child.pid, server.folder, flush=True)
        time.sleep(1000)
        """
    )
    with Process([sys.executable, "-c", script], cwd=ROOT, log=tmp_path / "log") as owner:
        up = owner.wait_for_log(r"^up (\d+) (\d+) (.+)$")
        server, child, folder = int(up[1]), int(up[2]), Path(up[3])
        assert len(family(server)) > 1
        wait_until(lambda: len(family(child)) == 3, 10, "both sleeps")
        os.kill(owner.pid, signal.SIGKILL)
        wait_until(lambda: not family(server), 10, "the end of PostgreSQL")
        wait_until(lambda: not family(child), 10, "the end of the child and its children")
        wait_until(lambda: not folder.exists(), 10, "the end of the folder")


def test_a_process_is_killed_with_its_children(tmp_path: Path) -> None:
    with Process(["sh", "-c", "setsid sleep 1000 & echo started; wait"]) as process:
        process.wait_for_log("started")
        wait_until(lambda: len(family(process.pid)) == 2, 10, "the sleep in its own session")
        members = family(process.pid)
        process.pause()
        process.resume()
        process.kill()
        assert not process.alive
        assert process.returncode == -signal.SIGKILL
        assert not any(family(pid) for pid in members)
        process.restart()
        assert process.alive
        assert process.terminate() == -signal.SIGTERM


def test_a_process_that_ends_early_shows_its_log() -> None:
    with (
        Process(["sh", "-c", "echo oh no; exit 3"], name="broken") as process,
        pytest.raises(ProcessEnded, match=r"(?s)broken ended with code 3.*oh no"),
    ):
        process.wait_for_log("ready")


def test_waiting_in_vain_names_what_was_awaited() -> None:
    with pytest.raises(WaitTimeout, match="in vain for the parcel; last answer: 0"):
        wait_until(lambda: 0, 0.05, "the parcel")


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends everything back."""

    def serve(client: socket.socket) -> None:
        with client:
            while data := client.recv(1000):
                client.sendall(data)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()


def dial(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def test_the_proxy_passes_bytes_and_cuts_connections(echo: int) -> None:
    with TcpProxy("127.0.0.1", echo) as proxy, dial(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"
        proxy.cut()
        assert client.recv(10) == b""
        with dial(proxy) as another:
            another.sendall(b"again")
            assert another.recv(10) == b"again"
        assert (proxy.connections, proxy.passed) == (2, 10)


def test_the_proxy_refuses_and_accepts(echo: int) -> None:
    with TcpProxy("127.0.0.1", echo) as proxy, dial(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            dial(proxy)
        client.sendall(b"still")
        assert client.recv(10) == b"still"
        proxy.accept()
        dial(proxy).close()


def test_the_proxy_swallows_replies_until_healed(echo: int) -> None:
    with TcpProxy("127.0.0.1", echo) as proxy, dial(proxy) as client:
        proxy.swallow_replies()
        client.sendall(b"hello")
        wait_until(lambda: proxy.swallowed == 5, 10, "the swallowed reply")
        assert proxy.passed == 5
        proxy.heal()
        assert client.recv(10) == b""  # torn, so cut
        with dial(proxy) as another:
            another.sendall(b"again")
            assert another.recv(10) == b"again"


def test_a_publish_without_its_confirm_arrives(rabbitmq_server: RabbitMQ, amqp_url: str) -> None:
    proxy = TcpProxy("127.0.0.1", rabbitmq_server.port)
    url = amqp_url.replace(f":{rabbitmq_server.port}/", f":{proxy.port}/")
    connection = kombu.Connection(url, transport_options={"confirm_publish": True})
    # The proxy ends first: closing a connection waits for an answer, without a limit.
    with connection, proxy:
        kombu.Queue("arrives")(connection.default_channel).declare()
        producer = connection.Producer()
        producer.publish("first", routing_key="arrives")  # asks for confirms, and waits for a reply
        proxy.swallow_replies()
        with pytest.raises(TimeoutError):
            producer.publish("second", routing_key="arrives", confirm_timeout=0.5)
        wait_until(lambda: proxy.swallowed, 10, "the confirm")
        assert rabbitmq_server.queue_depths(amqp_url) == {"arrives": 2}


APP = """
from celery import Celery

app = Celery("support", broker={broker!r}, backend={broker!r})
app.conf.beat_schedule = {{"add": {{"task": "add", "schedule": 0.1, "args": (1, 1)}}}}

@app.task(name="add")
def add(x, y):
    return x + y
"""


def test_workers_and_beat_start_and_stop(tmp_path: Path, redis_url: str) -> None:
    (tmp_path / "support_app.py").write_text(APP.format(broker=redis_url))
    with (
        celery_worker("support_app", tmp_path, {}, "--concurrency=1") as worker,
        celery_beat("support_app", tmp_path, {}) as beat,
    ):
        worker.wait_for_log(r"Task add\[.*succeeded")
        assert beat.terminate() == 0
        assert worker.terminate() == 0


def test_pytest_celery_is_installed_and_needs_no_docker(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_app(celery_app):\n    assert celery_app.conf.broker_url\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "DOCKER_HOST": "unix:///nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
