"""One set of promises, kept over a local folder and over a real S3 store."""

from __future__ import annotations

import os
import pickle
import secrets
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from infra import s3, storage
from infra.s3_errors import StoreRefuses
from tests.servers import S3Server

AWKWARD_KEYS = ["a.b", "a/b", "a b+c%20&?#.jpg", "ü/日本/🖼.png", "a-b", "a/b.c/d", "z/0", "Z"]


@pytest.fixture
def s3_root(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in store.environment.items():
        monkeypatch.setenv(variable, value)
    return storage.join(store.create_bucket(), "some/prefix")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_root") if request.param == "s3" else str(tmp_path / "root")


def keys(uri: str, *, include_hidden: bool = False) -> list[str]:
    return [found.key for found in storage.list_objects(uri, include_hidden=include_hidden)]


def test_what_was_written_is_read(root: str) -> None:
    uri = storage.join(root, "folder", "object.bin")
    assert storage.stat(uri) is None
    assert not storage.exists(uri)
    assert storage.write_bytes(uri, b"one")
    first = storage.stat(uri)
    assert storage.write_bytes(uri, b"two, longer")
    assert storage.read_bytes(uri) == b"two, longer"
    assert storage.read_part(uri, 0, 3) == b"two"
    assert storage.read_part(uri, 0, 100) == b"two, longer"
    assert storage.read_part(uri, 5, 4) == b"long"
    assert storage.read_part(uri, 5, 100) == b"longer"
    assert storage.read_part(uri, 11, 1) == b""
    empty = storage.join(root, "empty")
    storage.write_bytes(empty, b"")
    assert storage.read_part(empty, 0, 1) == b""
    second = storage.stat(uri)
    assert first is not None
    assert second is not None
    assert (second.uri, second.key, second.num_bytes) == (uri, "object.bin", 11)
    assert first.etag != second.etag
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_listing_is_in_string_order_and_leaves_out_what_is_hidden(root: str) -> None:
    hidden = [".git/config", "a/.DS_Store", "_nst/ledger/1.parquet"]
    for key in AWKWARD_KEYS + hidden:
        storage.write_bytes(storage.join(root, key), key.encode())
    assert keys(root) == sorted(AWKWARD_KEYS)
    assert keys(root, include_hidden=True) == sorted(AWKWARD_KEYS + hidden)
    for found in storage.list_objects(root):
        assert storage.read_bytes(found.uri) == found.key.encode()
        assert found.num_bytes == len(found.key.encode())
    assert [found.key for found in storage.list_objects(root, suffixes=(".JPG", ".png"))] == [
        "a b+c%20&?#.jpg",
        "ü/日本/🖼.png",
    ]


def test_a_prefix_is_a_folder_and_not_the_start_of_a_name(root: str) -> None:
    for key in ("cat/1", "cats/1"):
        storage.write_bytes(storage.join(root, key), b"")
    assert keys(storage.join(root, "cat")) == ["1"]
    assert keys(storage.join(root, "cat") + "/") == ["1"]
    assert keys(storage.join(root, "dog")) == []


def test_listing_one_object_gives_it(root: str) -> None:
    uri = storage.join(root, "a/photo.jpg")
    storage.write_bytes(uri, b"x")
    assert [(found.key, found.uri) for found in storage.list_objects(uri)] == [("photo.jpg", uri)]


@pytest.mark.slow
def test_listing_is_lazy_and_crosses_pages(root: str) -> None:
    names = [f"{number:05d}" for number in range(1050)]  # S3 gives pages of 1000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: storage.write_bytes(storage.join(root, key), b""), names))
    listing = storage.list_objects(root)
    assert next(listing).key == names[0]
    assert [found.key for found in listing] == names[1:]


def test_if_absent_has_exactly_one_winner(root: str) -> None:
    uri = storage.join(root, "manifest.json")
    barrier = threading.Barrier(8)

    def write(number: int) -> bool:
        barrier.wait()
        return storage.write_bytes(uri, f"{number}".encode(), if_absent=True)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == f"{won.index(True)}".encode()
    assert keys(root, include_hidden=True) == ["manifest.json"]  # nothing temporary is left


def test_files_and_folders_travel(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    big = secrets.token_bytes(20 << 20)  # more than one part of a multipart upload
    (source / "big.bin").write_bytes(big)
    (source / "inner" / ".hidden").write_bytes(b"too")
    storage.upload_dir(str(source), root)
    assert keys(root, include_hidden=True) == ["big.bin", "inner/.hidden"]
    storage.download_dir(root, str(tmp_path / "back"))
    assert (tmp_path / "back" / "big.bin").read_bytes() == big
    assert (tmp_path / "back" / "inner" / ".hidden").read_bytes() == b"too"
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["big.bin", "inner"]

    uri = storage.join(root, "inner", ".hidden")
    assert not storage.upload_file(str(source / "big.bin"), uri, if_absent=True)
    assert storage.read_bytes(uri) == b"too"
    assert storage.upload_file(str(source / "big.bin"), storage.join(root, "new"), if_absent=True)
    assert storage.read_bytes(storage.join(root, "new")) == big


def test_what_is_missing_is_named(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "nowhere/at all")
    for read in (
        lambda: storage.read_bytes(uri),
        lambda: storage.download_file(uri, str(tmp_path / "copy")),
        lambda: storage.download_dir(uri, str(tmp_path / "copies")),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            read()
        assert uri in str(caught.value)
    assert list(tmp_path.rglob("*.tmp")) == []
    assert not (tmp_path / "copy").exists()


def test_check_access_leaves_nothing(root: str) -> None:
    storage.check_access(root)
    assert keys(root, include_hidden=True) == []


def test_an_object_storage_is_small_and_picklable(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "x")
    storage.write_bytes(uri, b"data")
    copy = pickle.loads(pickle.dumps(storage.ObjectStorage()))  # noqa: S301 - our own bytes
    assert copy.read_bytes(uri) == b"data"
    copy.download_file(uri, str(tmp_path / "y"))
    assert (tmp_path / "y").read_bytes() == b"data"


def test_a_fork_has_its_own_connection(s3_root: str) -> None:
    uri = storage.join(s3_root, "x")
    storage.write_bytes(uri, b"data")
    program = (
        "import os, sys; from infra import storage\n"
        "uri = sys.argv[1]; storage.read_bytes(uri)\n"
        "pids = [os.fork() for _ in range(2)]\n"
        "for _ in range(20): assert storage.read_bytes(uri) == b'data'\n"
        "if all(pids): sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, uri], timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "does not accept these credentials"),
        ("AWS_ACCESS_KEY_ID", "test:nobody", "does not accept these credentials"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1", "cannot reach http://127.0.0.1:1"),
        ("AWS_ENDPOINT_URL_S3", "127.0.0.1:1", "AWS_ENDPOINT_URL"),
        ("NST_STORE_PATIENCE_S", "soon", "give a number of seconds"),
    ],
)
def test_what_the_user_can_mend_is_a_value_error(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    for act in (
        lambda: storage.write_bytes(storage.join(s3_root, "x"), b"data"),
        lambda: list(storage.list_objects(s3_root)),
        lambda: storage.check_access(s3_root),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert "testing" not in str(caught.value)  # the secret


def test_a_store_that_another_process_has_asked_is_away_and_not_misspelt(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that starts while the store restarts: no mistake of the user's."""
    monkeypatch.setattr(s3, "_answered", set())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with s3.patience(0.5), pytest.raises(StoreRefuses):
        storage.read_bytes(storage.join(s3_root, "x"))
    s3.expect_answers()
    with s3.patience(0.5), pytest.raises(OSError, match="Could not connect"):
        storage.read_bytes(storage.join(s3_root, "x"))


def test_no_credentials_and_no_bucket(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no bucket 'no-such-bucket'"):
        storage.write_bytes("s3://no-such-bucket/x", b"")
    with pytest.raises(ValueError, match="no bucket 'no-such-bucket'"):
        list(storage.list_objects("s3://no-such-bucket"))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID"):
        storage.read_bytes(storage.join(s3_root, "x"))


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///key", "s3://bucket", "gs://bucket/x", "file:relative", "", "a\0b"]
)
def test_a_name_that_is_no_place_is_a_value_error(uri: str) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/prefix|supported|absolute|names a bucket"):
        storage.read_bytes(uri)


def test_a_key_cannot_climb_out() -> None:
    with pytest.raises(ValueError, match="rename"):
        storage.join("/out", "a/../../etc/passwd")
    assert storage.join("/out", "a..b/c") == "/out/a..b/c"
    assert storage.join("/", "a") == "/a"
    assert storage.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert storage.name("s3://bucket/a/b/") == "b"


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/a%20b"
    storage.write_bytes(storage.join(uri, "x%25.txt"), b"data")
    assert (tmp_path / "a b" / "x%.txt").read_bytes() == b"data"
    assert [storage.read_bytes(found.uri) for found in storage.list_objects(uri)] == [b"data"]


def test_links_stay_inside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-2"
    for folder in (root / "real", outside):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x")
    (root / "loop").symlink_to(root)
    (root / "out-file").symlink_to(outside / "file")
    (root / "out-dir").symlink_to(outside)
    (root / "dangling").symlink_to(root / "nothing")
    (root / "inside").symlink_to("real/file")
    assert keys(str(root)) == ["inside", "real/file"]
    assert "left out 4 links" in caplog.text
    (tmp_path / "alias").symlink_to(root)
    assert keys(str(tmp_path / "alias")) == ["inside", "real/file"]


def test_what_must_not_be_opened_is_listed_on_request(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "c")
    (tmp_path / "d").symlink_to("a")
    found = storage.list_objects(str(tmp_path), include_unsafe=True)
    assert {one.key: one.is_unsafe for one in found} == {"a": False, "b": True, "c": True, "d": False}
    assert keys(str(tmp_path)) == ["a", "d"]


def test_a_link_that_somebody_planted_is_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "real", outside):
        folder.mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (root / "link").symlink_to(outside)
    (root / "sideways").symlink_to(root / "real")
    (root / "file").symlink_to(outside / "secret")
    (tmp_path / "alias").symlink_to(root)
    for place in (root, tmp_path / "alias"):  # the root itself may be a link: whoever named it wants that
        for way in ("link/x", "link/deeper/x", "sideways/x"):
            with pytest.raises(OSError, match="link"):
                storage.write_bytes(f"{place}/{way}", b"new", within=str(place))
        for way in ("link/secret", "file"):
            with pytest.raises(OSError, match="link"):
                storage.read_bytes(f"{place}/{way}", within=str(place))
        storage.write_bytes(f"{place}/new/x", b"new", within=str(place))
        assert storage.read_bytes(f"{place}/new/x", within=str(place)) == b"new"
    storage.write_bytes(f"{root}/file", b"new", within=str(root))  # takes the link's place
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"secret": b"secret"}
    assert list((root / "real").iterdir()) == []


def test_a_killed_writer_leaves_the_old_object(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    program = (
        "import os, sys; from infra import local_files\n"
        "class Dies:\n"
        "    def read(self, size):\n"
        "        os._exit(9)\n"
        "local_files.write(sys.argv[1], Dies(), if_absent=False)\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", program, str(target)], check=False, timeout=60).returncode == 9
    )
    assert target.read_bytes() == b"old"
    assert keys(str(tmp_path)) == ["x"]
    assert len(list(tmp_path.iterdir())) == 2  # what it had begun
    storage.remove_abandoned(str(tmp_path))
    assert list(tmp_path.iterdir()) == [target]


def test_a_lock_whose_holder_was_killed_is_nobodys(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    program = (
        "import os, sys; from infra import local_files\n"
        "local_files.write = lambda *arguments, **options: os._exit(9)\n"
        "local_files.replace(sys.argv[1], b'new', expected=b'old')\n"
    )
    command = [sys.executable, "-c", program, str(target)]
    for clear in (lambda: storage.remove_abandoned(str(tmp_path)), lambda: None):
        assert subprocess.run(command, check=False, timeout=60).returncode == 9
        assert len(list(tmp_path.iterdir())) == 2
        clear()
    assert storage.replace_bytes(str(target), b"new", expected=b"old")
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_living_writer_writes_is_not_tidied_away(tmp_path: Path) -> None:
    """Many writers, and somebody who tidies up all the time."""
    folder = tmp_path / "folder"
    is_over = threading.Event()

    def tidy() -> None:
        while not is_over.is_set():
            storage.remove_abandoned(str(folder))

    folder.mkdir()
    with ThreadPoolExecutor(5) as pool:
        tidying = pool.submit(tidy)
        list(pool.map(lambda number: storage.write_bytes(f"{folder}/{number}", b"x" * number), range(300)))
        is_over.set()
        tidying.result(30)
    assert {int(path.name): path.stat().st_size for path in folder.iterdir()} == {n: n for n in range(300)}


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        storage.write_bytes(str(tmp_path / "x"), b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


class CutsTheFirstAnswer(BaseHTTPRequestHandler):
    """Promises 100 bytes; the first time it sends 50 and hangs up."""

    num_answers = 0

    def do_GET(self) -> None:
        type(self).num_answers += 1
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * (50 if self.num_answers == 1 else 100))

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_answer_that_was_cut_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), CutsTheFirstAnswer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        assert storage.read_bytes("s3://bucket/key") == b"x" * 100
        server.shutdown()
    assert CutsTheFirstAnswer.num_answers == 2


def test_an_error_of_the_disk_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(OSError, match="/dev/full"):
        storage.upload_file(str(tmp_path / "x"), "/dev/full/x")
