import io
import random
import sys
import time
import tracemalloc

import pytest
from PIL import Image, ImageDraw

from vlmguard.errors import ConfigError, ImageUnreadable, MissingExtra
from vlmguard.synthesis.duplicates import (
    Duplicates,
    NearPictures,
    NearTexts,
    distance,
    frames_of,
    picture_hash,
    words_of,
)

TEN = "one two three four five six seven eight nine ten"


def encoded(*frames: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=len(frames) > 1, append_images=frames[1:], **options)
    return file.getvalue()


def scene(seed: int = 0, size: int = 160) -> Image.Image:
    chance = random.Random(seed)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = chance.randrange(size), chance.randrange(size)
        box = (left, top, left + chance.randrange(10, 70), top + chance.randrange(10, 70))
        draw.ellipse(box, fill=tuple(chance.randrange(256) for _ in range(3)))
    return image


# Texts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Is THIS safe? is it?", {"is", "this", "safe", "it"}),
        ("Ｆｕｌｌ width", {"full", "width"}),
        ("这是刀", {"这是", "是刀"}),
        ("刀 ok", {"刀", "ok"}),
        ("🔪!", {"🔪!"}),
        ("", {""}),
    ],
)
def test_words(text: str, words: set[str]) -> None:
    assert words_of(text) == words


def test_a_text_that_shares_four_fifths_is_near() -> None:
    seen = Duplicates()
    assert seen.add("a", TEN) is None
    assert seen.add("b", "ten NINE eight seven six five four three two one") == "a"
    assert seen.add("c", TEN.replace("one", "")) == "a"  # 9 of 10
    assert seen.add("d", TEN + " eleven twelve") == "a"  # 10 of 12
    assert seen.add("e", TEN + " eleven twelve thirteen") is None  # 10 of 13
    assert seen.add("f", TEN.replace("one", "1")) == "a"  # 9 of 11
    assert seen.add("g", TEN.replace("one", "1").replace("two", "2")) is None  # 8 of 12


def test_four_of_five_words_are_enough() -> None:
    """0.2 * 5 is a little less than 1 in floating point: the lookup must not miss for it."""
    for missing in range(5):
        words = TEN.split()[:5]
        seen = Duplicates()
        seen.add("a", " ".join(words[:missing] + words[missing + 1 :]))
        assert seen.add("b", " ".join(words)) == "a"


def test_a_share_that_is_met_exactly_is_enough() -> None:
    """0.28 * 25 is a little more than 7."""
    words = [f"w{at}" for at in range(25)]
    seen = Duplicates(least_share=0.28)
    seen.add("a", " ".join(words[:7]))
    assert seen.add("b", " ".join(words)) == "a"


def test_words_that_no_text_has_spare_looking_others_up() -> None:
    index = NearTexts(0.8)
    index.add(frozenset(TEN.split()))
    assert len(index.candidates(frozenset(TEN.split()))) == 3
    assert len(index.candidates(frozenset([*TEN.split()[:8], "x", "y"]))) == 1
    assert index.candidates(frozenset([*TEN.split()[:7], "x", "y", "z"])) == []


def test_the_index_finds_just_what_comparing_all_pairs_finds() -> None:
    chance = random.Random(1)
    for share in (0.5, 0.8, 0.95, 1.0):
        index = NearTexts(share)
        sets: list[frozenset[str]] = []
        for _ in range(300):
            words = frozenset(chance.sample("abcdefghij", chance.randrange(1, 9)))
            expected = {
                number for number, other in enumerate(sets) if len(words & other) / len(words | other) >= share - 1e-9
            }
            candidates: set[int] = set().union(*index.candidates(words))
            is_near = index.nearness(words)
            assert {number for number in candidates if is_near(number)} == expected
            index.add(words)
            sets.append(words)


def test_the_earliest_is_named_and_what_repeats_it_is_not_compared_with() -> None:
    seen = Duplicates()
    assert seen.add("a", TEN) is None
    assert seen.add("b", TEN + " eleven twelve thirteen") is None
    assert seen.add("c", TEN + " eleven twelve") == "a"
    # near to c, which is no row, and to b alone
    assert seen.add("d", TEN + " eleven twelve thirteen fourteen") == "b"


def test_texts_without_words_are_the_same_only_when_equal() -> None:
    seen = Duplicates()
    assert [seen.add(str(at), text) for at, text in enumerate(("", "🔪", "", "🔫", "🔪"))] == [
        None,
        None,
        "0",
        None,
        "1",
    ]


# Pictures


def test_a_picture_looks_the_same_when_saved_anew_and_smaller() -> None:
    original = scene()
    copies = [
        encoded(original, kind="JPEG", quality=40),
        encoded(original.resize((80, 80))),
        encoded(original.convert("L")),
        encoded(original, kind="WEBP"),
    ]
    (first,) = frames_of([picture_hash(encoded(original))])
    assert all(distance(first, frames_of([picture_hash(copy)])[0]) <= 16 for copy in copies)
    others = [frames_of([picture_hash(encoded(scene(seed)))])[0] for seed in range(1, 20)]
    assert min(distance(first, other) for other in others) > 40


def test_pictures_of_one_colour_are_told_apart_by_it() -> None:
    def hashed(colour: str | tuple[int, int, int], kind: str = "PNG") -> int:
        return frames_of([picture_hash(encoded(Image.new("RGB", (40, 30), colour), kind=kind))])[0]

    colours = ("black", "white", "red", "lime", "blue", "teal", "olive", "gray")
    hashes = [hashed(colour) for colour in colours]
    apart = [distance(one, other) for at, one in enumerate(hashes) for other in hashes[:at]]
    assert min(apart) > 16
    assert all(distance(one, hashed(colour, "JPEG")) <= 16 for one, colour in zip(hashes, colours, strict=True))
    assert distance(hashed((100, 100, 100)), hashed((104, 97, 103))) <= 16
    assert max(hashes) < 1 << 256


def test_an_animation_has_all_its_frames() -> None:
    moving = picture_hash(encoded(scene(0), scene(1), kind="GIF"))
    still = picture_hash(encoded(scene(0), kind="GIF"))
    assert len(frames_of([moving])) == 2
    assert frames_of([moving])[0] == frames_of([still])[0]
    seen = Duplicates()
    assert [seen.add(name, TEN, [one]) for name, one in (("a", still), ("b", moving), ("c", moving))] == [
        None,
        None,
        "b",
    ]


def test_a_broken_picture_is_an_error() -> None:
    with pytest.raises(ImageUnreadable):
        picture_hash(b"none")


def test_the_parts_find_every_hash_within_the_distance() -> None:
    chance = random.Random(2)
    near = NearPictures(16)
    hashes = [chance.getrandbits(256) for _ in range(50)]
    for one in hashes:
        near.add(one)
    for number, one in enumerate(hashes):
        for bits in (0, 1, 8, 16, 17):
            other = one
            for bit in chance.sample(range(256), bits):
                other ^= 1 << bit
            candidates: set[int] = set().union(*near.candidates(other))
            assert (number in candidates and near.is_near(number, other)) is (bits <= 16)


# Rows


def test_the_same_words_with_another_picture_are_no_duplicate() -> None:
    one, other = picture_hash(encoded(scene(0))), picture_hash(encoded(scene(1)))
    copy = picture_hash(encoded(scene(0).resize((100, 100))))
    seen = Duplicates()
    assert seen.add("a", TEN, [one]) is None
    assert seen.add("b", TEN, [other]) is None
    assert seen.add("c", TEN) is None
    assert seen.add("d", "What is in this picture?", [one]) is None
    assert seen.add("e", TEN, [one, other]) is None
    assert seen.add("f", TEN, [other, one]) is None
    assert seen.add("g", TEN, [copy]) == "a"
    assert seen.add("h", TEN) == "c"
    assert seen.add("i", TEN, [copy, other]) == "e"


def test_what_was_found_depends_on_the_order_alone() -> None:
    rows = [(str(at), " ".join(random.Random(at % 40).choices(TEN.split(), k=7))) for at in range(200)]

    def found() -> list[str | None]:
        seen = Duplicates()
        return [seen.add(name, text) for name, text in rows]

    assert found() == found()
    assert found()[40:80] != [None] * 40


def test_the_bounds_are_options() -> None:
    strict = Duplicates(least_share=1.0)
    assert [strict.add("a", TEN), strict.add("b", TEN.replace("one", "1")), strict.add("c", TEN)] == [None, None, "a"]
    exact = Duplicates(most_distance=0)
    first = f"{1 << 200:064x}"
    assert [exact.add("a", TEN, [first]), exact.add("b", TEN, [f"{(1 << 200) + 1:064x}"])] == [None, None]
    assert exact.add("c", TEN, [first]) == "a"


@pytest.mark.parametrize(
    "bounds", [{"least_share": 0.0}, {"least_share": 1.1}, {"most_distance": 64}, {"most_distance": -1}]
)
def test_a_bound_out_of_range_is_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected a"):
        Duplicates(**bounds)  # type: ignore[arg-type]


def test_many_rows_with_one_text_or_one_picture_stay_fast_and_small() -> None:
    """Compared pair by pair, these 2 x 3,000 would take a minute."""
    chance = random.Random(3)
    words = [f"w{at}" for at in range(5000)]
    seen = Duplicates()
    tracemalloc.start()
    begun = time.process_time()
    for at in range(3000):
        assert seen.add(f"p{at}", "Describe this picture in one sentence.", [f"{chance.getrandbits(256):064x}"]) is None
        assert seen.add(f"t{at}", " ".join(chance.sample(words, 12)), ["0" * 64]) is None
    seconds = time.process_time() - begun
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 10
    assert most < 30 * 2**20


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(MissingExtra, match=r"vlmguard-r1\[synthesis\]"):
        picture_hash(encoded(scene()))
