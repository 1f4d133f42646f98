import hashlib
import hmac

import pytest

from vlmguard.errors import BadRequest, ImageTooLarge, RateLimited
from vlmguard.gateway.config import Key, Settings, load
from vlmguard.gateway.keys import ANONYMOUS, Keys, Limiter, check_pictures, may_call, new_key, presented


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def key(name: str, secret: str, **limits: object) -> Key:
    return Key.model_validate({"id": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), **limits})


def test_a_key_is_found_by_its_hash() -> None:
    first, second = key("first", "vg-one"), key("second", "vg-zwö")
    keys = Keys([first, second])
    assert keys.find("vg-one") is first
    assert keys.find("vg-zwö") is second


@pytest.mark.parametrize("wrong", [None, "", "vg-on", "vg-one ", "VG-ONE", "\ud800", "x" * 100_000])
def test_any_other_is_not(wrong: str | None) -> None:
    assert Keys([key("first", "vg-one")]).find(wrong) is None


def test_the_hash_itself_is_no_key() -> None:
    first = key("first", "vg-one")
    assert Keys([first]).find(first.sha256) is None


def test_every_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    keys = Keys(key(str(number), f"vg-{number}") for number in range(5))
    for asked in ("vg-0", "vg-4", "unknown"):
        compared.clear()
        keys.find(asked)
        assert len(compared) == 5, asked


def test_without_keys_everybody_is_anonymous() -> None:
    keys = Keys.of(load())
    assert keys.find(None) is ANONYMOUS
    assert keys.find("anything") is ANONYMOUS
    assert (ANONYMOUS.id, ANONYMOUS.mode) == ("anonymous", None)
    keys.spend(ANONYMOUS)
    check_pictures(ANONYMOUS, 10_000, 10**12)
    assert may_call(ANONYMOUS, "/v1/messages")


def test_new_keys_are_long_and_match_their_hash() -> None:
    made = [new_key() for _ in range(20)]
    assert len({secret for secret, _ in made}) == 20
    for secret, digest in made:
        assert len(secret) > 40
        assert secret.isascii()
        found = Settings.model_validate({"keys": [{"id": "app", "sha256": digest}]})
        assert Keys.of(found).find(secret) == found.keys[0]


def test_a_bucket_gives_its_requests_and_refills_steadily() -> None:
    clock = Clock()
    bucket = Limiter(6, clock)  # one in 10 s
    assert [bucket.take() for _ in range(6)] == [0] * 6
    assert bucket.take() == pytest.approx(10)
    clock.now += 4
    assert bucket.take() == pytest.approx(6)
    clock.now += 6
    assert bucket.take() == 0
    assert bucket.take() == pytest.approx(10)


def test_a_bucket_holds_no_more_than_a_minutes_requests() -> None:
    clock = Clock()
    bucket = Limiter(3, clock)
    clock.now += 3600
    assert [bucket.take() > 0 for _ in range(4)] == [False, False, False, True]


def test_waiting_for_as_long_as_told_is_enough() -> None:
    clock = Clock()
    bucket = Limiter(7, clock)
    taken = 0
    for _ in range(50):
        while not (wait := bucket.take()):
            taken += 1
        clock.now += wait * 1.000001
    assert taken == pytest.approx(7 + 49, abs=1)


def test_each_key_has_its_own_limit() -> None:
    clock = Clock()
    one, two, free = key("one", "1", requests_per_minute=1), key("two", "2", requests_per_minute=2), key("free", "3")
    keys = Keys([one, two, free], clock)
    keys.spend(one)
    with pytest.raises(RateLimited, match="the key one may send 1 requests a minute") as caught:
        keys.spend(one)
    assert caught.value.retry_after == pytest.approx(60)
    keys.spend(two)
    keys.spend(two)
    for _ in range(1000):
        keys.spend(free)
    clock.now += 60
    keys.spend(one)


def test_pictures_of_one_request() -> None:
    some, none = key("some", "1", images=2, pixels=1000), key("none", "2", images=0, pixels=0)
    check_pictures(some, 2, 1000)
    check_pictures(none, 0, 0)
    with pytest.raises(BadRequest, match=r"3 pictures\. The key some may send 2") as caught:
        check_pictures(some, 3)
    assert not isinstance(caught.value, ImageTooLarge)
    with pytest.raises(BadRequest, match="1 pictures"):
        check_pictures(none, 1)
    with pytest.raises(ImageTooLarge, match=r"1,001 pixels together\. The key some may send 1,000"):
        check_pictures(some, 1, 1001)


def test_routes_of_a_key() -> None:
    bound = key("bound", "1", routes=["/v1/messages"])
    assert may_call(bound, "/v1/messages")
    assert not may_call(bound, "/v1/responses")
    assert not may_call(key("nowhere", "2", routes=[]), "/v1/messages")
    assert may_call(key("free", "3"), "/v1/responses")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        ([(b"authorization", b"Bearer vg-1")], "vg-1"),
        ([(b"authorization", b"bearer  vg-1 ")], "vg-1"),
        ([(b"x-api-key", b"vg-1")], "vg-1"),
        ([(b"api-key", b" vg-1")], "vg-1"),
        ([(b"api-key", b"c"), (b"x-api-key", b"b"), (b"authorization", b"Bearer a")], "a"),
        ([(b"api-key", b"c"), (b"x-api-key", b"b")], "b"),
        ([(b"authorization", b"Basic dTpw"), (b"api-key", b"c")], "c"),
        ([(b"authorization", b"Basic dTpw")], None),
        ([(b"authorization", b"Bearer"), (b"x-api-key", b"")], None),
        ([(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")], "a"),
        ([(b"accept", b"*/*"), (b"cookie", b"api-key=x")], None),
    ],
)
def test_the_key_in_a_requests_headers(headers: list[tuple[bytes, bytes]], expected: str | None) -> None:
    assert presented(headers) == expected


def test_a_header_that_is_not_utf8_is_nobodys_key() -> None:
    keys = Keys([key("first", "vg-one"), key("second", "vg-zwö")])
    assert keys.find(presented([(b"authorization", b"Bearer \xff\xfe")])) is None
    assert keys.find(presented([(b"x-api-key", "vg-zwö".encode())])) is not None
