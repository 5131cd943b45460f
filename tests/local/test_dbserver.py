"""The engine's DbServer with the runtime in it: it serves clients, and runs nothing of what comes.

A real server on a port of loopback, for the user openquake, as whom ``getpass`` sees the tests.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from oq_runtime.engine.dbserver import MAX_BYTES
from tests import pickles
from tests.conftest import Attacks
from tests.leftovers import wait_for

pytestmark = pytest.mark.timeout(300)

START_S, ANSWER_S, END_S = 120.0, 30.0, 20.0
GROWTH_BYTES = 300 << 20
EMPTY: list[Any] = []
JOB = Path(__file__).parents[2] / "examples" / "hazard_classical" / "job.ini"
#: with which a connection of ZeroMQ 3.1 without keys begins, and what says which socket it is of:
#: RFC 23
GREETING = (
    b"\xff"
    + bytes(8)
    + b"\x7f\x03\x01"
    + b"NULL".ljust(20, b"\0")
    + bytes(32)
    + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\3REQ"
)


def heed_interrupts() -> None:
    """As a service starts; a shell's job in the background ignores the signal, and its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Server:
    """A DbServer with a job of user alice."""

    def __init__(self, env: dict[str, str], home: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.database = home / "db.sqlite3"
        config = home / "openquake.cfg"
        config.write_text(
            "[oq_runtime]\ncode = import oq_runtime.activate\n"
            f"[dbserver]\nhost = 127.0.0.1\nport = {self.port}\nfile = {self.database}\n"
        )
        datadir = home / "oqdata"
        datadir.mkdir()
        self.env = env | {
            "OQ_CONFIG_FILE": str(config),
            "OQ_DATADIR": str(datadir),
            "LOGNAME": "openquake",
        }
        self.log = home / "dbserver.log"
        self.start()
        self.job = self.ask("create_job", str(datadir), "classical", "a job", "alice")

    python_arguments: tuple[str, ...] = ("-m", "openquake.commands")

    def start(self) -> None:
        command = (*self.python_arguments, "dbserver", "start", "-f")
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                [sys.executable, *command],
                env=self.env,
                stdout=log,
                stderr=log,
                cwd=self.database.parent,
                preexec_fn=heed_interrupts,
            )
        assert wait_for(self.listens, START_S), self.log.read_text()

    def listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def python(self, body: str) -> subprocess.CompletedProcess[str]:
        """Run a script in which ``dbcmd`` is the engine's."""
        head = "from openquake.commonlib.logs import dbcmd\n"
        return subprocess.run(
            [sys.executable, "-c", head + body],
            env=self.env,
            text=True,
            capture_output=True,
            timeout=100,
        )

    def ask(self, *command: Any) -> Any:
        """Ask without the engine's client; the value of a result comes unpickled."""
        return self.value(self.send([pickle.dumps(command)]))

    def value(self, data: bytes) -> Any:
        from oq_runtime.engine.dbserver import read_answer

        answer = read_answer(data)
        return answer.get() if hasattr(answer, "tb_str") else answer

    def send(self, frames: list[bytes]) -> bytes:
        """Send a message of these parts and return the answer."""
        with zmq.Context() as context, context.socket(zmq.REQ) as client:
            client.linger = 0
            client.connect(f"tcp://127.0.0.1:{self.port}")
            client.send_multipart(frames)
            assert client.poll(int(ANSWER_S * 1000)), "no answer"
            return client.recv()

    def peak_bytes(self) -> int:
        """Return the most memory that the server has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    def refused(self) -> int:
        return self.log.read_text().count("refused a message")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=END_S)
        except psutil.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="module")
def server(
    engine_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("d")
    server = Server(engine_home | {"TMPDIR": str(home)}, home)
    yield server
    server.stop()


def test_clients_are_served(server: Server) -> None:
    """All that clients get: numbers, rows, tables, dictionaries, and errors of their own class."""
    done = server.python(f"""
job = dbcmd("get_job", {server.job})
assert (job.id, job.user_name, type(job).__name__) == ({server.job}, "alice", "Row"), job
assert dbcmd("get_job", 10**6) is None
table = dbcmd("SELECT id, status FROM job WHERE id=?x", {server.job})
assert table._fields == ["id", "status"] and table[0].status == "created", table
assert dbcmd("UPDATE job SET description=?x WHERE id=?x", "Änderung", {server.job}) is not None
from datetime import datetime, UTC
dbcmd("log", {server.job}, datetime.now(UTC), "INFO", "a/1", "text " * 100_000)
assert [len(line) > 500_000 for line in dbcmd("get_log", {server.job})] == [True]
assert dbcmd("get_log_size", {server.job}) == 1
assert dbcmd("calc_info", {server.job})["user_name"] == "alice"
assert isinstance(dbcmd("getpid"), int)
import sqlite3
from openquake.commonlib import dbapi
for error, command in [
    (dbapi.NotFound, ("calc_info", 10**6)),
    (sqlite3.OperationalError, ("SELECT * FROM no_such_table",)),
    (sqlite3.OperationalError, ("no_such_action", 1)),
    (TypeError, ("get_job",)),
    (ValueError, ("SELECT ?x, ?x", 1)),
]:
    try:
        dbcmd(*command)
    except error:
        pass
    else:
        raise SystemExit(f"{{command}} has raised no {{error}}")
dbcmd("VACUUM")
""")
    assert done.returncode == 0, done.stderr
    assert server.refused() == 0


@pytest.mark.attack
def test_pickles_run_nothing(server: Server, attacks: Attacks, tmp_path: Path) -> None:
    mark = tmp_path / "done"
    before, refused = server.process.memory_info().rss, server.refused()
    tried = list(pickles.attacks(str(mark)))
    for name, data in tried:
        with pytest.raises(ValueError, match="refused this message"):
            server.value(server.send([data]))
        attacks.tried(successes=int(mark.exists()))
        assert server.process.is_running(), name
    assert server.refused() - refused == len(tried)
    assert server.ask("getpid") == server.process.pid
    assert server.process.memory_info().rss - before < GROWTH_BYTES


@pytest.mark.attack
def test_big_messages_are_refused(server: Server, attacks: Attacks) -> None:
    before = server.process.memory_info().rss
    for frames in [
        [pickle.dumps(("log", "x" * (MAX_BYTES + 1)))],
        [pickle.dumps(("get_job", 1))] * 2,
        [b"x" * (1 << 20)] * 40,
    ]:
        with pytest.raises(ValueError, match="refused this message"):
            server.value(server.send(frames))
        attacks.tried()
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger = 0
        client.connect(f"tcp://127.0.0.1:{server.port}")
        for _ in range(3):  # beyond what is received at all: the connection is closed
            client.send_multipart([b"", b"x" * (100 << 20)])
        assert not client.poll(1000)
        attacks.tried(3)
    assert server.ask("getpid") == server.process.pid
    assert server.process.memory_info().rss - before < GROWTH_BYTES


@pytest.mark.attack
def test_parts_without_end_are_not_kept(server: Server, attacks: Attacks) -> None:
    """Of one message, which libzmq hands over when it is whole."""
    before = server.peak_bytes()
    with socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as sender:
        sender.sendall(GREETING)
        with contextlib.suppress(ConnectionError, TimeoutError):  # closed, or not read any more
            for _ in range(1200):
                sender.sendall(b"\x03" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20))
    attacks.tried(successes=int(server.peak_bytes() - before > 2 * GROWTH_BYTES))
    assert server.ask("getpid") == server.process.pid


@pytest.mark.attack
def test_silent_connections_beyond_the_limit_of_open_files(
    server: Server, attacks: Attacks
) -> None:
    before = server.process.rlimit(psutil.RLIMIT_NOFILE)
    server.process.rlimit(psutil.RLIMIT_NOFILE, (1024, before[1]))
    try:
        with contextlib.ExitStack() as opened:
            for _ in range(1500):
                silent = socket.create_connection(("127.0.0.1", server.port), ANSWER_S)
                silent.sendall(GREETING)
                opened.enter_context(silent)
                attacks.tried()
            assert server.ask("getpid") == server.process.pid
            assert wait_for(lambda: server.process.num_fds() < 1024 / 2, ANSWER_S)
    finally:
        server.process.rlimit(psutil.RLIMIT_NOFILE, before)


@pytest.mark.slow
def test_wait_for_a_server_that_does_not_answer_is_told(server: Server) -> None:
    """Before there is a job, and while one runs."""
    command = [sys.executable, "-m", "oq_runtime.commands.run", str(JOB), "--no-progress"]
    told = f"waiting: the DbServer tcp://127.0.0.1:{server.port} does not answer"
    server.process.suspend()
    run = subprocess.Popen(command, env=server.env, stderr=subprocess.PIPE, text=True)
    try:
        assert run.stderr is not None
        for _ in range(2):
            assert any(line.startswith(told) for line in run.stderr), "it has ended"
            server.process.resume()
            if any("Sent " in line for line in run.stderr):
                server.process.suspend()
        server.process.resume()
        _, err = run.communicate(timeout=100)
        assert run.returncode == 0, err
    finally:
        server.process.resume()
        run.kill()
        run.communicate()


@pytest.mark.attack
def test_sql_opens_no_other_file(server: Server, attacks: Attacks, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for sql in [
        f"ATTACH '{other}' AS other",
        f"ATTACH 'file:{other}?mode=rwc' AS other",
        f"VACUUM INTO '{other}'",
        f"VACUUM main INTO '{other}'",
        f"PRAGMA temp_store_directory = '{tmp_path}'",
        "PRAGMA writable_schema = ON",
        "PRAGMA Writable_Schema = ON",
        f"SELECT load_extension('{other}')",
    ]:
        for command in [(sql,), ("fetch", sql)]:
            with pytest.raises(sqlite3.Error):
                server.ask(*command)
            attacks.tried(successes=int(other.exists()))
    with pytest.raises(sqlite3.Error):
        server.ask("ATTACH ?x AS other", str(other))
    attacks.tried(successes=int(other.exists()))


@pytest.mark.attack
def test_sql_does_not_touch_the_accounts_of_the_webui(server: Server, attacks: Attacks) -> None:
    """They are in the same file, and who reads a session is its user."""
    with sqlite3.connect(server.database) as db:
        db.execute("CREATE TABLE IF NOT EXISTS django_session (session_key TEXT)")
        db.execute("INSERT INTO django_session VALUES ('a secret')")
    for sql in [
        "SELECT session_key FROM Django_Session",
        "SELECT count(*) FROM (SELECT * FROM main.django_session)",
        "UPDATE job SET description = (SELECT session_key FROM django_session)",
        "INSERT INTO django_session VALUES ('mine')",
        "DELETE FROM django_session",
        "CREATE TABLE copy AS SELECT * FROM django_session",
        "CREATE VIEW job_view AS SELECT * FROM django_session",
        "ALTER TABLE django_session RENAME TO mine",
        "DROP TABLE django_session",
        "CREATE TRIGGER later AFTER UPDATE ON job BEGIN SELECT 1; END",
        "VACUUM INTO '/dev/null'",
    ]:
        for command in [(sql,), ("fetch", sql)]:
            with pytest.raises(sqlite3.Error):
                server.ask(*command)
            attacks.tried()
    server.ask("VACUUM")  # of oq purge: it may copy all tables
    with pytest.raises(sqlite3.Error):  # afterwards as before
        server.ask("SELECT * FROM django_session")
    with sqlite3.connect(server.database) as db:
        assert db.execute("SELECT * FROM django_session").fetchall() == [("a secret",)]
        db.execute("DROP TABLE django_session")


class Impatient(Server):
    """A server whose queries may take 2 s."""

    python_arguments = (
        "-c",
        "import runpy; from oq_runtime.engine import dbserver; dbserver.QUERY_SECS = 2; "
        "runpy.run_module('openquake.commands', run_name='__main__')",
    )


@pytest.fixture
def impatient(engine_home: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    server = Impatient(engine_home | {"TMPDIR": str(tmp_path)}, tmp_path)
    yield server
    server.stop()


@pytest.mark.slow
@pytest.mark.attack
def test_queries_without_end(impatient: Server, attacks: Attacks) -> None:
    """One for each of its threads, and one more; then one whose rows would fill the memory."""
    server = impatient
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT x FROM c"
    with ThreadPoolExecutor(6) as pool:
        for what in ("count(*)", "x"):
            sql = f"SELECT {what} FROM ({endless})"
            answers = [pool.submit(server.ask, sql) for _ in range(6)]
            for found in answers:
                with pytest.raises(sqlite3.OperationalError, match="interrupted"):
                    found.result(60)
                attacks.tried()
            assert server.ask("getpid") == server.process.pid


@pytest.mark.attack
def test_only_actions_of_the_engine(server: Server, attacks: Attacks) -> None:
    """Neither what its module imports, nor what belongs to any module, nor the workers' other."""
    names = ["os", "getpass", "general", "datetime", "upgrader", "NotFound", "__builtins__"]
    names += ["__init__", "__setattr__", "__class__", "__doc__", "workers_kill", "workers_stop"]
    names += ["workers___init__", "workers_", "_get_tag_id.__globals__"]
    for name in names:
        with pytest.raises((sqlite3.Error, ValueError)):
            server.ask(name, 1)
        attacks.tried()
    assert server.ask("getpid") == server.process.pid


def test_many_bad_answers_do_not_use_up_the_server(server: Server) -> None:
    """Its five threads survive what cannot be answered, and what raises."""
    for _ in range(12):
        with pytest.raises(sqlite3.Error):
            server.ask("SELECT ?x", [1])
        with pytest.raises(TypeError):
            server.ask("create_job")
        assert server.ask("DELETE FROM job WHERE id=?x", -1) is not None


class Thief:
    """Takes the place of a DbServer and answers whatever it is asked with the same bytes."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.REP)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")

    def answer(self, data: bytes) -> None:
        assert self.socket.poll(60_000)
        self.socket.recv()
        self.socket.send(data)

    def close(self) -> None:
        self.context.destroy(linger=0)


CLIENT = """
import sys
import threading
from openquake.commonlib.logs import dbcmd
for _ in range(int(sys.argv[1])):
    try:
        dbcmd("get_job", 1)
    except Exception as exc:
        print(type(exc).__name__, exc, flush=True)
    else:
        print("accepted", flush=True)
"""


@pytest.mark.attack
def test_a_thief_of_the_port_runs_nothing_in_clients(
    server: Server, attacks: Attacks, tmp_path: Path
) -> None:
    mark = tmp_path / "done"
    inner = [data for name, data in pickles.programs_in_messages(str(mark)) if "alone" in name]
    inner = [data for data in inner if b"KeyError" not in data and b"dict" not in data]
    inner += [data for _, data in pickles.written_by_hand(str(mark))]
    inner += [data for name, data in pickles.bombs() if "key" in name]
    results = [as_result(data) for data in inner]
    thief = Thief()
    try:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(len(inner) + len(results))],
            env=server.env
            | {"OQ_DATABASE": "127.0.0.1", "OQ_CONFIG_FILE": str(config(thief, tmp_path))},
            stdout=subprocess.PIPE,
            text=True,
        )
        for data in (*inner, *results):
            thief.answer(data)
        out, _ = client.communicate(timeout=60)
    finally:
        thief.close()
        client.kill()
    lines = out.splitlines()
    assert len(lines) == len(inner) + len(results)
    attacks.tried(len(lines), successes=int(mark.exists()))
    assert all(line.startswith("Refused what answers at tcp://127.0.0.1:") for line in lines), lines


def config(thief: Thief, tmp_path: Path) -> Path:
    path = tmp_path / "openquake.cfg"
    path.write_text(
        "[oq_runtime]\ncode = import oq_runtime.activate\n"
        f"[dbserver]\nhost = 127.0.0.1\nport = {thief.port}\nfile = {tmp_path}/db.sqlite3\n"
    )
    return path


def as_result(inner: bytes) -> bytes:
    """Return the pickle of a result of the engine whose value is another pickle."""
    from openquake.baselib import parallel

    result = parallel.Result(None, parallel.dummy_mon)
    result.pik.pik = inner
    return pickle.dumps(result)


def test_stops_at_a_signal(engine_home: dict[str, str], tmp_path: Path) -> None:
    """Also with threads that have refused something."""
    server = Server(engine_home | {"TMPDIR": str(tmp_path)}, tmp_path)
    with pytest.raises(ValueError, match="refused"):
        server.value(server.send([b""]))
    server.stop()
    assert server.process.wait() == 0
    assert os.path.exists(server.database)


#: the engine with a DbServer whose threads, but the first, begin two seconds late
LATE = """
import runpy, sqlite3, sys, threading, time
first, connect = [], sqlite3.connect
def late(*args, **kwargs):
    thread = threading.current_thread()
    if thread is not threading.main_thread() and (first or first.append(thread)):
        time.sleep(2)
    return connect(*args, **kwargs)
sqlite3.connect = late
runpy.run_module("openquake.commands", run_name="__main__", alter_sys=True)
"""


def test_a_signal_before_its_threads_have_begun_is_not_missed(
    engine_home: dict[str, str], tmp_path: Path
) -> None:
    class LateServer(Server):
        python_arguments = ("-c", LATE)

    server = LateServer(engine_home | {"TMPDIR": str(tmp_path)}, tmp_path)
    server.stop()
    assert server.process.wait() == 0


def test_a_signal_in_the_midst_of_messages_is_not_missed(
    engine_home: dict[str, str], tmp_path: Path
) -> None:
    """A client asks all the time, so that the server hardly waits when the signal comes."""
    server = Server(engine_home | {"TMPDIR": str(tmp_path)}, tmp_path)
    ended = threading.Event()

    def ask() -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as client:
            client.linger = 0
            client.connect(f"tcp://127.0.0.1:{server.port}")
            while not ended.is_set():
                if client.poll(10, zmq.POLLOUT):  # not when the server has ended
                    client.send_multipart([b"", b""])
                client.poll(1)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        server.stop()
    finally:
        ended.set()
        thread.join()
    assert server.process.wait() == 0


def test_job_whose_process_is_gone_has_failed(server: Server) -> None:
    """As after a power cut; one that still runs, and one of another host, are left alone."""
    with subprocess.Popen(["true"]) as gone:
        pass
    host = socket.gethostname()
    wanted = {}
    for pid, where, end in (
        (gone.pid, host, "failed"),
        (os.getpid(), host, "executing"),
        (gone.pid, "elsewhere", "executing"),
    ):
        job = server.ask("create_job", str(server.database.parent), "classical", "a job", "alice")
        values = {"pid": pid, "host": where, "status": "executing", "is_running": 1}
        server.ask("update_job", job, values)
        wanted[job] = end
    server.stop()
    server.start()
    assert {job: server.ask("get_job", job).status for job in wanted} == wanted
