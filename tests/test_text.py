"""The flight log as text: the lines, their tokens, and the score that a reader understands."""

import doctest
import re
import shutil
import time
from sys import getsizeof

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import DataError, files, load_flights, load_table, text
from helpers.datasets.text import (
    ALPHABET,
    ARRIVAL_DELAYS,
    DEPARTURE_DELAYS,
    END,
    IGNORE,
    LENGTH,
    Score,
    decode,
    encode,
    explain,
    inputs_and_targets,
    load_lines,
    load_log,
    routes,
    score,
)

GOOD = "UA1545 EWR IAH 0515 +2 +11"
CHARACTERS = ALPHABET.replace(END, "")


@pytest.fixture(scope="module")
def flights():
    return load_flights()


@pytest.fixture(scope="module")
def log():
    return load_log()


@pytest.fixture(scope="module")
def lines(log):
    return log.lines


def seconds(call, *arguments):
    """Time of the processor, the best of three: the machine may be busy with other work."""
    times = []
    for _ in range(3):
        start = time.process_time()
        call(*arguments)
        times.append(time.process_time() - start)
    return min(times)


# --- lines ---------------------------------------------------------------------------------------


def test_lines_by_hand(lines):
    assert lines[0] == GOOD
    for line in (
        "US1632 EWR LGA 0106 X",  # never left
        "UA1228 EWR SAN 1738 +29 X",  # left, but no arrival is known
        "MQ3695 EWR ORD 1635 +1126 +1109",  # the longest
        "B68 JFK BUF 1459 X",  # the shortest
    ):
        assert line in lines


def test_lines_say_what_the_flights_are(lines, flights):
    """Written once more, row by row, in another way."""
    for number in [*range(50), *range(0, len(flights), 997)]:
        row = flights.iloc[number]
        expected = f"{row.carrier}{row.flight} {row.origin} {row.dest} {row.hour:02d}"
        expected += f"{row.minute:02d}"
        for delay in (row.dep_delay, row.arr_delay):
            if np.isnan(delay):
                expected += " X"
                break
            expected += f" {'-' if delay < 0 else '+'}{abs(int(delay))}"
        assert lines[number] == expected


def test_counts(lines, log):
    assert len(lines) == len(log) == 336_776
    assert sum(map(len, lines)) == 8_593_549
    assert (min(map(len, lines)), max(map(len, lines))) == (18, LENGTH - 1)
    assert set("".join(lines)) == set(CHARACTERS)
    never_left = sum(re.fullmatch(r"\S+ \S+ \S+ \S+ X", line) is not None for line in lines)
    no_arrival = sum(re.search(r" [+-]\d+ X$", line) is not None for line in lines)
    assert (never_left, no_arrival) == (8_255, 1_175)
    assert never_left / len(lines) == pytest.approx(0.0245, abs=5e-5)


def test_delays_are_those_of_2013(flights):
    for column, ends in (("dep_delay", DEPARTURE_DELAYS), ("arr_delay", ARRIVAL_DELAYS)):
        assert (flights[column].min(), flights[column].max()) == ends


def test_months_add_up_to_the_whole(lines):
    months = [load_lines(month) for month in range(1, 13)]
    assert [line for part in months for line in part] == lines == load_lines()
    assert load_lines([3, 1]) == months[0] + months[2]
    assert load_log(month=2).lines == months[1]


def test_parts_by_origin_and_airline(flights):
    part = load_log(month=[5, 6], origin="JFK", airline=["DL", "B6"])
    chosen = flights["month"].isin([5, 6]) & (flights["origin"] == "JFK")
    assert len(part) == (chosen & flights["carrier"].isin(["DL", "B6"])).sum()
    assert all(line[:2] in ("DL", "B6") and " JFK " in line for line in part.lines)
    empty = load_log(month=1, origin="LGA", airline="HA")
    assert (len(empty), empty.lines, empty.codes.shape) == (0, [], (0, LENGTH))


def test_wrong_part():
    for month in (0, 13, "1", [], True):
        for load in (load_lines, load_log):
            with pytest.raises(ValueError, match="month must be a number from 1 to 12"):
                load(month)
    with pytest.raises(ValueError, match="origin must be one of"):
        load_log(origin="BOS")
    with pytest.raises(ValueError, match="airline must be one of"):
        load_log(airline="XX")


def test_held_out_days_are_those_of_the_tables(log):
    table = load_table("late")
    train, test = log.train, log.test
    assert (len(train), len(test)) == (269_446, 67_330)
    assert set(train.day) == set(table.train.day)
    assert set(test.day) == set(table.test.day) == set(range(5, 366, 5))
    assert not set(train.day) & set(test.day)
    whole_days = np.bincount(log.day) - np.bincount(train.day, minlength=366)
    assert np.array_equal(whole_days, np.bincount(test.day))
    train.codes[:] = 0
    assert log.codes.any(axis=1).all()  # a copy was given
    assert (np.diff(log.day) >= 0).all()
    assert test.lines[0] == load_log(month=1).lines[np.flatnonzero(log.day == 5)[0]]


def test_altered_file_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "data", folder)
    monkeypatch.setattr(files, "data_folder", lambda: folder)
    path = folder / "flights" / "2013-05.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    for call in (load_lines, load_log, routes, lambda: score([GOOD]), lambda: explain(GOOD)):
        with pytest.raises(DataError, match=r"flights/2013-05.parquet is not complete"):
            call()
    assert len(load_lines(month=6)) == 28_243


# --- tokens --------------------------------------------------------------------------------------


def test_alphabet():
    assert len(ALPHABET) == len(set(ALPHABET)) == 40
    assert ALPHABET[0] == END == "\n"


def test_encode_by_hand():
    codes = encode(["A B", "", "+-09Z"], length=6)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [[2, 1, 3, 0, 0, 0], [0] * 6, [38, 39, 28, 37, 27, 0]]
    assert encode([]).shape == (0, LENGTH)
    assert encode([GOOD]).shape == (1, LENGTH)
    assert encode(np.array([GOOD])).tolist() == encode((GOOD,)).tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(CHARACTERS, max_size=LENGTH - 1), max_size=8), st.integers(0, 9))
def test_round_trip(lines, spare):
    codes = encode(lines, LENGTH + spare)
    assert codes.shape == (len(lines), LENGTH + spare)
    assert decode(codes) == lines
    one_by_one = [[ALPHABET.index(character) for character in line] for line in lines]
    assert [row[: len(line)].tolist() for row, line in zip(codes, lines)] == one_by_one
    assert all(not row[len(line) :].any() for row, line in zip(codes, lines))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 39), min_size=7, max_size=7), min_size=1, max_size=8))
def test_decode_reads_to_the_first_end(rows):
    plain = ["".join(ALPHABET[max(token, 0)] for token in row) for row in rows]
    assert decode(rows) == [line.split(END)[0] for line in plain]
    for row in rows:
        assert decode([row]) == decode(np.array([row], np.int8))


def test_round_trip_of_the_true_log(log, lines):
    again = encode(lines)
    assert np.array_equal(again, log.codes)
    assert again.dtype == log.codes.dtype == np.uint8
    assert not log.codes[:, -1].any()  # every line has its end mark
    written = END.join([*lines, ""])
    kept = log.codes[(np.cumsum(log.codes == 0, axis=1) - (log.codes == 0)) == 0]
    assert "".join(ALPHABET[token] for token in kept[:100_000]) == written[:100_000]


def test_lines_that_cannot_be_encoded():
    for character in ("é", "a", "?", "\n", "\0", "☃", "𝄞", "\udc80", "\t", "٣", "/"):
        with pytest.raises(ValueError, match="Line 1 cannot be encoded: a line has only") as caught:
            encode([GOOD, "UA" + character, "b"])
        assert str(caught.value).endswith(f"not {character!r}.")
    for line in ("A\nB", "A\n", "\n", "☃"):  # with no other fault
        with pytest.raises(ValueError, match="Line 0 cannot be encoded"):
            encode([line])
    with pytest.raises(ValueError, match=r"Line 1 and its end mark are 6 tokens: give length=6\."):
        encode(["A", "ABCDE"], length=5)
    assert encode(["A", "ABCDE"], length=6).shape == (2, 6)
    for length in (0, -1):
        for some in ([], [""]):
            with pytest.raises(ValueError, match="length"):
                encode(some, length)
    with pytest.raises(TypeError):
        encode([GOOD], 32.5)


def test_other_things_than_lines():
    for call in (encode, score):
        with pytest.raises(TypeError, match=r"Give a list of lines, for example \['UA"):
            call(GOOD)
        with pytest.raises(TypeError, match="Give a list of lines"):
            call(3)
        with pytest.raises(TypeError, match="must be a str, not int"):
            call([GOOD, 3])
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        explain(GOOD.encode())
    with pytest.raises(ValueError, match="give at least one"):
        score([])


def test_other_things_than_tokens():
    for call in (decode, inputs_and_targets):
        for wrong in ([[40]], [[3, -2]], np.array([[255]], np.uint8)):
            with pytest.raises(ValueError, match="is no token: they are 0 to 39"):
                call(wrong)
        for wrong in ([1, 2], 3, np.zeros((2, 0), int), np.zeros((1, 2, 3), int)):
            with pytest.raises(ValueError, match="shape"):
                call(wrong)
        for wrong in ([[1.0]], [[True]], [["A"]], []):
            with pytest.raises(TypeError, match="whole numbers"):
                call(wrong)


# --- what a model learns from --------------------------------------------------------------------


def test_targets_are_the_tokens_moved_by_one(log):
    codes = log.codes[:2_000]
    tokens, targets = inputs_and_targets(codes)
    assert (tokens.dtype, targets.dtype) == (np.uint8, np.int8)
    assert tokens.shape == targets.shape == codes.shape
    assert not tokens[:, 0].any()
    learnt = targets != IGNORE
    assert np.array_equal(targets[learnt], codes[learnt])
    # What is to be foretold stands one place later among the inputs.
    assert np.array_equal(tokens[:, 1:][learnt[:, :-1]], targets[:, :-1][learnt[:, :-1]])
    # Of each line its characters and one end mark are learnt.
    assert learnt.sum(axis=1).tolist() == [len(line) + 1 for line in decode(codes)]
    assert (targets == 0).sum(axis=1).tolist() == [1] * len(codes)
    assert decode(targets) == decode(tokens[:, 1:]) == decode(codes)


def test_whole_year_has_as_many_targets_as_characters_and_ends(log):
    targets = inputs_and_targets(log.codes)[1]
    assert (targets >= 0).sum() == 8_593_549 + 336_776


def test_rubbish_behind_the_end_is_not_learnt():
    tokens, targets = inputs_and_targets([[5, 0, 7, 0, 8], [5, 6, 7, 8, 9]])
    assert targets.tolist() == [[5, 0, -1, -1, -1], [5, 6, 7, 8, 9]]
    assert tokens.tolist() == [[0, 5, 0, 7, 0], [0, 5, 6, 7, 8]]


def test_batches_do_not_depend_on_the_number_of_ranks(log):
    from helpers.engine import spmd
    from helpers.engine.mesh import Mesh
    from helpers.parallel.training import Batches

    batches = Batches(*inputs_and_targets(log.codes[:300]), rows=64)

    def program(rank):
        return batches(5, rank.data)[:2]

    (whole,) = spmd.run(None, Mesh(data=1), program).results
    parts = spmd.run(None, Mesh(data=3), program).results
    for one, several in zip(whole, zip(*parts)):
        assert np.array_equal(one, np.concatenate(several))
    assert whole[0].shape == (64, LENGTH)
    assert set(decode(whole[1])) <= set(decode(log.codes[:300]))


def test_loss_of_an_even_guess(log):
    """The loss of helpers.nn takes the targets that count, and refuses padding."""
    from helpers.nn.losses import softmax_loss

    targets = inputs_and_targets(log.codes[:10])[1]
    kept = targets[targets >= 0]
    even = np.zeros((len(kept), len(ALPHABET)))
    assert softmax_loss(even, kept)[0] == pytest.approx(np.log(40))
    with pytest.raises(ValueError, match="labels go from -1"):
        softmax_loss(np.zeros((targets.size, len(ALPHABET))), targets.ravel())


# --- score ---------------------------------------------------------------------------------------

WRONG = {
    "": "airline and number must be two characters and a number",
    "UA1545": "origin is missing: the line ends too early",
    "UA1545 EWR IAH": "time is missing",
    "UA1545 EWR IAH 0515": "departure delay is missing",
    "UA1545 EWR IAH 0515 +2": "arrival delay is missing",
    "UA1545 EWR IAH 0515 +2 ": "arrival delay must be whole minutes with a sign",
    "UA1545 EWR IAH 0515 +2 +11 ": "Nothing may follow the arrival delay",
    "UA1545 EWR IAH 0515 +2 +11 +3": "Nothing may follow the arrival delay",
    "UA1545 EWR IAH 0515 X X": "Nothing may follow an X",
    "UA1545 EWR IAH 0515 X ": "Nothing may follow an X",
    "UA1545  EWR IAH 0515 +2 +11": "origin must be an airport's three letters, such as EWR, not ''",
    " UA1545 EWR IAH 0515 +2 +11": "airline and number must be",
    "UA0 EWR IAH 0515 +2 +11": "from 1 to 9999, such as UA1545, not 'UA0'",
    "UA015 EWR IAH 0515 +2 +11": "not 'UA015'",
    "UA15451 EWR IAH 0515 +2 +11": "not 'UA15451'",
    "UA EWR IAH 0515 +2 +11": "not 'UA'",
    "UA1545 EW IAH 0515 +2 +11": "origin must be an airport's three letters",
    "UA1545 EWR IA1 0515 +2 +11": "destination must be an airport's three letters",
    "UA1545 EWR IAH 515 +2 +11": "time must be hour and minute",
    "UA1545 EWR IAH 2400 +2 +11": "time must be hour and minute, from 0000 to 2359, not '2400'",
    "UA1545 EWR IAH 0560 +2 +11": "not '0560'",
    "UA1545 EWR IAH 0515 2 +11": "departure delay must be whole minutes with a sign",
    "UA1545 EWR IAH 0515 +02 +11": "not '+02'",
    "UA1545 EWR IAH 0515 -0 +11": "not '-0'",
    "UA1545 EWR IAH 0515 +2 +-1": "arrival delay must be whole minutes with a sign",
    "UA1545 EWR IAH 0515 -44 +11": "departure delay must be from -43 to +1301 minutes, not -44",
    "UA1545 EWR IAH 0515 +1302 X": "departure delay must be from -43 to +1301 minutes, not +1302",
    "UA1545 EWR IAH 0515 +2 -87": "arrival delay must be from -86 to +1272 minutes, not -87",
    "UA1545 EWR IAH 0515 +2 +1273": "not +1273",
    "ua1545 EWR IAH 0515 +2 +11": "airline and number cannot be read: a line has only capital",
    "UA1545 EWR IAH 0515 +2 +1\n": r"not '\n'",
    "UA1545 EWR IAH ٠٥١٥ +2 +11": "time cannot be read: a line has only",
    "UA1545 EWR IAH 0515 +2 +11☃": "not '☃'",
}
UNREAL = {
    "UA1545 BOS IAH 0515 +2 +11": "leave from EWR, JFK, LGA, not from BOS",
    "UA1545 EWR JFK 0515 +2 +11": "Nobody flew from EWR to JFK in 2013",
    "UA1545 EWR ZZZ 0515 X": "Nobody flew from EWR to ZZZ in 2013",
    "HA1545 EWR IAH 0515 +2 +11": "HA did not fly from EWR to IAH in 2013",
    "ZZ1545 EWR IAH 0515 +2 X": "There is no airline ZZ",
}


@pytest.mark.parametrize("line", WRONG)
def test_malformed_line_gets_its_sentence(line):
    sentence = explain(line)
    assert WRONG[line] in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert score([line]) == (1, 0, 0, 0)


@pytest.mark.parametrize("line", UNREAL)
def test_unreal_line_gets_its_sentence(line):
    assert UNREAL[line] in explain(line)
    somebody_flew = line[7:14] == "EWR IAH"
    assert score([line]) == (1, 1, somebody_flew, 0)


def test_edges_that_are_well_formed():
    for line in (
        "UA1 EWR IAH 0000 +0 +0",
        "UA9999 EWR IAH 2359 -43 -86",
        "UA1545 EWR IAH 1959 +1301 +1272",
        "UA1545 EWR IAH 0515 X",
        "UA1545 EWR IAH 0515 -1 X",
    ):
        assert explain(line) is None
        assert score([line]) == (1, 1, 1, 1)


def test_every_true_line_is_real(lines):
    assert score(lines) == Score(336_776, 1.0, 1.0, 1.0)
    assert {explain(line) for line in lines[::100]} == {None}


def test_score_counts_each_line(lines):
    some = [*lines[:50], *WRONG, *UNREAL]
    n, pair = len(some), sum(line[7:14] == "EWR IAH" for line in UNREAL)
    expected = (n, (50 + len(UNREAL)) / n, (50 + pair) / n, 50 / n)
    assert score(some) == pytest.approx(expected)
    assert score(iter(some)) == score(some)


def test_routes_are_those_of_the_data(flights):
    expected = flights[["carrier", "origin", "dest"]].drop_duplicates()
    assert routes() == set(map(tuple, expected.to_numpy()))
    assert len(routes()) == 439
    assert len({triple[1:] for triple in routes()}) == 224


def test_no_character_may_be_struck_or_changed_unnoticed():
    """An oracle in one expression: a changed line is well formed if and only if it matches."""
    number = r"(\+0|[+-][1-9]\d{0,3})"
    whole = re.compile(
        rf"[A-Z\d]{{2}}[1-9]\d{{0,3}}( [A-Z]{{3}}){{2}} (\d{{4}}) (X|{number} (X|{number}))", re.A
    )
    for line in (GOOD, "B68 JFK BUF 1459 X", "UA1228 EWR SAN 1738 +29 X"):
        changed = [line[:i] + line[i + 1 :] for i in range(len(line))]
        changed += [line[:i] + c + line[i + 1 :] for i in range(len(line)) for c in ALPHABET]
        changed += [line[:i] + c + line[i:] for i in range(len(line) + 1) for c in ALPHABET]
        for other in changed:
            match = whole.fullmatch(other)
            formed = match and int(match[2][:2]) < 24 and int(match[2][2:]) < 60
            limits = zip((match[4], match[6]) if match else (), (DEPARTURE_DELAYS, ARRIVAL_DELAYS))
            formed = formed and all(d is None or a <= int(d) <= b for d, (a, b) in limits)
            assert bool(formed) == (score([other]).well_formed == 1), other


@settings(max_examples=200, deadline=None)
@given(st.text(CHARACTERS, max_size=LENGTH) | st.text(max_size=LENGTH))
def test_any_text_is_judged(line):
    sentence = explain(line)
    assert (sentence is None) == (score([line]).real == 1)
    if sentence:
        assert sentence.endswith(".") and "\n" not in sentence


def test_chance_does_not_score():
    """Characters drawn at random, each as often as in the log, make no well-formed line."""
    random = np.random.default_rng(0)
    codes = load_log(month=1).codes
    drawn = random.permutation(codes[codes != 0])[: 1_000 * 26].reshape(1_000, 26)
    assert score(decode(drawn)).well_formed == 0


# --- time and memory -----------------------------------------------------------------------------


def test_quick_and_small(log, lines):
    assert seconds(load_log) < 4
    assert seconds(load_log, 1) < 0.5
    assert seconds(encode, lines) < 1
    assert seconds(decode, log.codes) < 1
    assert seconds(inputs_and_targets, log.codes) < 1
    assert seconds(score, lines[:10_000]) < 0.5
    assert log.codes.nbytes == 336_776 * 32
    assert 13e6 < getsizeof(log) < 14e6
    assert repr(log) == "Log of 336,776 flights"


def test_examples_in_the_documentation():
    result = doctest.testmod(text)
    assert result.attempted >= 15
    assert result.failed == 0
