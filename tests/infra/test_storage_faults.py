"""A store that fails now and then: what is asked is done once, and what cannot be done is said in time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra import s3, storage
from tests.fault_proxy import Fault, FaultProxy, Request, always, fault_proxy, first_time, seeded
from tests.servers import S3Server


@pytest.fixture
def proxy(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the store, and this process its client."""
    with fault_proxy(store) as found:
        for variable, value in found.environment.items():
            monkeypatch.setenv(variable, value)
        yield found


@pytest.fixture
def bucket(store: S3Server, proxy: FaultProxy) -> str:
    return store.create_bucket()


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name.lower())
def test_every_request_that_fails_once_is_made_good(
    proxy: FaultProxy, bucket: str, tmp_path: Path, fault: Fault
) -> None:
    large = secrets.token_bytes(9 << 20)  # a multipart upload, and a download in parts
    (tmp_path / "large").write_bytes(large)
    for key in ("read", "deleted", "listed/1", "listed/2"):
        storage.write_bytes(f"{bucket}/{key}", key.encode())
    storage.upload_file(str(tmp_path / "large"), f"{bucket}/downloaded")

    def travels() -> bytes:
        storage.download_file(f"{bucket}/downloaded", str(tmp_path / "back"))
        return (tmp_path / "back").read_bytes()

    def is_uploaded() -> bool:
        storage.upload_file(str(tmp_path / "large"), f"{bucket}/uploaded")
        return True

    def keys() -> list[str]:
        return [found.key for found in storage.list_objects(f"{bucket}/listed")]

    tasks = {
        "read": (lambda: storage.read_bytes(f"{bucket}/read"), b"read"),
        "write": (lambda: storage.write_bytes(f"{bucket}/written", b"data"), True),
        "create": (lambda: storage.write_bytes(f"{bucket}/created", b"data", if_absent=True), True),
        "stat": (lambda: storage.exists(f"{bucket}/read"), True),
        "stat of nothing": (lambda: storage.exists(f"{bucket}/nothing"), False),
        "list": (keys, ["1", "2"]),
        "delete": (lambda: storage.delete(f"{bucket}/deleted"), None),
        "download": (travels, large),
        "upload": (is_uploaded, True),
    }
    proxy.script = first_time(fault)
    with ThreadPoolExecutor(len(tasks)) as pool:
        results = {name: pool.submit(act) for name, (act, _) in tasks.items()}
        for name, (_, expected) in tasks.items():
            assert results[name].result(120) == expected, name
    assert proxy.faults[fault] >= len(tasks)
    proxy.script = None
    assert storage.read_bytes(f"{bucket}/uploaded") == large
    assert storage.read_bytes(f"{bucket}/written") == storage.read_bytes(f"{bucket}/created") == b"data"
    assert not storage.exists(f"{bucket}/deleted")
    assert not list(tmp_path.glob("*.tmp"))


def test_an_object_that_was_made_by_a_put_without_an_answer_is_ours(proxy: FaultProxy, bucket: str) -> None:
    proxy.script = first_time(Fault.LOST_ANSWER, "PUT")
    assert storage.write_bytes(f"{bucket}/x", b"ours", if_absent=True)
    assert proxy.seen["PUT", "x"] == 2
    assert not storage.write_bytes(f"{bucket}/x", b"ours", if_absent=True)  # the same bytes, another writer
    proxy.seen.clear()
    storage.delete(f"{bucket}/x")
    assert storage.write_bytes(f"{bucket}/x", b"others", if_absent=True)
    assert storage.read_bytes(f"{bucket}/x") == b"others"


def test_of_many_writers_one_wins_though_answers_are_lost(proxy: FaultProxy, bucket: str) -> None:
    def lost(request: Request) -> Fault | None:
        return Fault.LOST_ANSWER if request.method == "PUT" and request.nth % 2 else None

    proxy.script = lost
    uri = f"{bucket}/manifest.json"
    with ThreadPoolExecutor(6) as pool:
        won = list(
            pool.map(lambda number: storage.write_bytes(uri, b"%d" % number, if_absent=True), range(6))
        )
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)


def test_nothing_is_lost_or_mixed_up_in_a_storm(proxy: FaultProxy, bucket: str) -> None:
    contents = {f"{number % 7}/{number:03d}": secrets.token_bytes(1 + 50 * number) for number in range(70)}
    proxy.script = seeded(7, share=0.25)

    def write(key: str) -> None:
        assert storage.write_bytes(f"{bucket}/{key}", contents[key], if_absent=True)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(write, contents))
        read = list(pool.map(lambda key: storage.read_bytes(f"{bucket}/{key}"), contents))
    assert read == list(contents.values())
    listed = [(found.key, found.num_bytes) for found in storage.list_objects(bucket)]
    assert listed == sorted((key, len(data)) for key, data in contents.items())
    assert set(proxy.faults) == set(Fault)


@pytest.mark.faults
def test_a_listing_whose_pages_fail_has_every_key_once(proxy: FaultProxy, bucket: str) -> None:
    names = [f"{number:05d}" for number in range(2050)]  # three pages
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: storage.write_bytes(f"{bucket}/{key}", b""), names))
    for fault in (Fault.CUT_IN_BODY, Fault.TOO_MANY_REQUESTS):
        proxy.seen.clear()
        proxy.script = first_time(fault, "GET", times=4)
        assert [found.key for found in storage.list_objects(bucket)] == names


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault.SLOW_DOWN, "answers 503"),
        (Fault.TOO_MANY_REQUESTS, "answers 429"),
        (Fault.CUT_BEFORE, "Connection"),
    ],
)
def test_what_never_ends_is_one_error_that_names_the_object(
    proxy: FaultProxy,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    message: str,
) -> None:
    monkeypatch.setenv(s3.PATIENCE_VARIABLE, "0.5")
    storage.write_bytes(f"{bucket}/x", b"data" * 1000)
    proxy.script = always(fault)
    for act in (
        lambda: storage.read_bytes(f"{bucket}/x"),
        lambda: storage.download_file(f"{bucket}/x", str(tmp_path / "x")),
    ):
        with pytest.raises(OSError, match=message) as caught:
            act()
        assert f"{bucket}/x" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    proxy.script = None
    assert storage.read_bytes(f"{bucket}/x") == b"data" * 1000


def test_a_store_that_goes_away_is_waited_for(
    proxy: FaultProxy, store: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket}/x", b"data")
    back_at = time.monotonic() + 2
    proxy.script = lambda request: Fault.CUT_BEFORE if time.monotonic() < back_at else None
    assert storage.read_bytes(f"{bucket}/x") == b"data"
    monkeypatch.setenv(s3.PATIENCE_VARIABLE, "0.5")
    with fault_proxy(store) as gone:
        for variable, value in gone.environment.items():
            monkeypatch.setenv(variable, value)
        assert storage.exists(f"{bucket}/x")
    # It has answered before: no mistake of the user's any more.
    with pytest.raises(OSError, match="Could not connect"):
        storage.read_bytes(f"{bucket}/x")
