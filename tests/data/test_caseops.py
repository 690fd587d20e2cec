"""CaseOps: the recipe's rules one by one, the inverse on any text, and what the inverse refuses."""

import contextlib
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgolf_jax.data.caseops import ALLCAPS, CAPNEXT, ESC, MARKERS, TITLE, decode, encode, original_bytes
from pgolf_jax.errors import UserError

RULES = [
  ("", ""),
  ("word", "word"),
  ("WORD", ALLCAPS + "word"),
  ("AB", ALLCAPS + "ab"),
  ("Word", TITLE + "word"),
  ("A", TITLE + "a"),
  ("ABc", f"{TITLE}a{CAPNEXT}bc"),
  ("iPhone", f"i{CAPNEXT}phone"),
  ("aB", f"a{CAPNEXT}b"),
  ("McDonALD", f"{TITLE}mc{CAPNEXT}don{CAPNEXT}a{CAPNEXT}l{CAPNEXT}d"),
  ("I'M", f"{TITLE}i'{TITLE}m"),
  ("A1B", f"{TITLE}a1{TITLE}b"),
  ("ÉCOLE Straße", f"É{ALLCAPS}cole {TITLE}straße"),  # É is no ASCII letter: it ends a run
  (f"{TITLE}Ab", f"{ESC}{TITLE}{TITLE}ab"),
  (f"a{CAPNEXT}B", f"a{ESC}{CAPNEXT}{TITLE}b"),
  (ESC + ESC, ESC * 4),
]

BEFORE_SPACE = [
  (" Word", f"{TITLE} word"),
  ("The NASA's  iPhone,\n B", f"{TITLE}the{ALLCAPS} nasa's  i{CAPNEXT}phone,\n{TITLE} b"),
  ("a  B", f"a {TITLE} b"),  # the last of two spaces
  ("\tAB\u00a0Cd", f"\t{ALLCAPS}ab\u00a0{TITLE}cd"),  # other white space stays
  (f"{TITLE} A", f"{ESC}{TITLE}{TITLE} a"),
  (f" {TITLE}A", f" {ESC}{TITLE}{TITLE}a"),
  (f" {ESC} {CAPNEXT}", f" {ESC}{ESC} {ESC}{CAPNEXT}"),
]
FORMS = ("published", "before-space")
both_forms = pytest.mark.parametrize("form", FORMS)

relaxed = settings(deadline=None)

# Dense in what the rules are about: short runs of mixed case, markers, neighbours of the ASCII letters.
busy_text = st.text(st.sampled_from([*"abYZ@[`{  é\n", *MARKERS, "\U0001f600"]), max_size=30)
any_text = st.text(st.characters(), max_size=60)  # lone surrogates included


@pytest.mark.parametrize("text, coded", RULES)
def test_rules(text, coded):
  assert encode(text) == coded
  assert decode(coded) == text


@pytest.mark.parametrize("text, coded", [rule for rule in RULES if " " not in rule[0]] + BEFORE_SPACE)
def test_rules_of_markers_before_spaces(text, coded):
  assert encode(text, "before-space") == coded
  assert decode(coded, "before-space") == text


@both_forms
@relaxed
@given(text=st.one_of(busy_text, any_text))
@example(text="aBC" * 10)
@example(text="  The  NASA ")
def test_decode_inverts_encode(form, text):
  assert decode(encode(text, form), form) == text


@relaxed
@given(busy_text)
def test_no_markers_leave_text_as_it_is(text):
  assert encode(text, "none") == decode(text, "none") == text


@relaxed
@given(busy_text)
def test_markers_before_spaces_differ_in_one_space_a_word(text):
  published, before = encode(text), encode(text, "before-space")
  assert sorted(before) == sorted(published)
  places = [i for i in range(len(before)) if published[i] != before[i]]
  assert [published[i] for i in places[::2]] == [before[i] for i in places[1::2]] == [" "] * (len(places) // 2)
  without_literals = re.sub(f"{ESC}.", "x", before)
  assert not re.search(f" [{TITLE}{ALLCAPS}][a-z]", without_literals)


@both_forms
@relaxed
@given(text=busy_text)
def test_only_capitals_and_markers_change(form, text):
  unchanged = "".join(c for c in text if not ("A" <= c <= "Z") and c not in MARKERS)
  coded = encode(text, form)
  assert not any("A" <= c <= "Z" for c in coded)
  if not any(marker in text for marker in MARKERS):
    assert "".join(c for c in coded if c not in MARKERS).lower() == text.lower()
  assert all(c in coded for c in unchanged)


MALFORMED = [
  (f"a{TITLE}b", "TITLE at character 1.*inside a run"),
  (f"a{ALLCAPS}bc", "ALLCAPS.*inside a run"),
  (f"{TITLE}{TITLE}a", "TITLE.*twice"),
  (f"{ALLCAPS}{ALLCAPS}ab", "ALLCAPS.*twice"),
  (f"{TITLE}{ALLCAPS}ab", "TITLE.*not an ASCII letter"),
  (f"{TITLE}1", "TITLE.*not an ASCII letter"),
  (f"{TITLE}é", "TITLE.*not an ASCII letter"),
  (f"{ALLCAPS} ab", "ALLCAPS.*not an ASCII letter"),
  (f"{TITLE}{ESC}{TITLE}a", "TITLE.*not an ASCII letter"),
  (f"{TITLE}{CAPNEXT}a", "TITLE.*not an ASCII letter"),
  (f"x{TITLE}", "TITLE.*at the end"),
  (ALLCAPS, "ALLCAPS.*at the end"),
  (f"a{CAPNEXT}{CAPNEXT}b", "CAPNEXT.*twice"),
  (f"a{CAPNEXT} b", "CAPNEXT.*not an ASCII letter"),
  (f"a{CAPNEXT}", "CAPNEXT.*at the end"),
  (f"a{ESC}", "ESC.*at the end"),
  (f"{ESC}{ESC}{ESC}", "ESC at character 2.*at the end"),
]
MALFORMED_BEFORE_SPACE = [
  (f" {TITLE}a", "TITLE at character 1.*behind a space"),
  (f"x {ALLCAPS}ab", "ALLCAPS.*behind a space"),
  (f"{TITLE}  a", "TITLE.*not an ASCII letter"),
  (f"{TITLE} ", "TITLE.*not an ASCII letter"),
  (f"{TITLE} 1", "TITLE.*not an ASCII letter"),
  (f"a{CAPNEXT} b", "CAPNEXT.*not an ASCII letter"),
]
EVERY_MALFORMED = [
  *(("published", *case) for case in [*MALFORMED, (f"{TITLE} a", "TITLE.*not an ASCII letter")]),
  *(("before-space", *case) for case in MALFORMED if case[0] != f"{ALLCAPS} ab"),
  *(("before-space", *case) for case in MALFORMED_BEFORE_SPACE),
]


@pytest.mark.parametrize("form, coded, message", EVERY_MALFORMED)
def test_malformed_text_is_refused_with_the_place(form, coded, message):
  with pytest.raises(UserError, match=message):
    decode(coded, form)


@pytest.mark.parametrize("form, coded", [case[:2] for case in EVERY_MALFORMED])
def test_lenient_decoding_drops_what_is_out_of_place(form, coded):
  assert "a" in decode(f"{coded} a", form, strict=False).lower()


sampled_text = st.text(st.sampled_from([*"ab ", *MARKERS]), max_size=12)


@both_forms
@relaxed
@given(coded=sampled_text)
def test_lenient_and_strict_agree_on_what_strict_accepts(form, coded):
  lenient = decode(coded, form, strict=False)
  with contextlib.suppress(UserError):
    assert decode(coded, form) == lenient


@both_forms
@relaxed
@given(coded=sampled_text)
@example(coded=f"a{TITLE} b")
def test_text_that_was_shown_stays_when_more_is_sampled(form, coded):
  whole = decode(coded, form, strict=False)
  for end in range(len(coded)):
    assert whole.startswith(decode(coded[:end], form, strict=False))


@both_forms
@relaxed
@given(text=st.one_of(busy_text, st.text(max_size=60)))
@example(text=ESC + ESC + TITLE + "A")
def test_original_bytes_add_up(form, text):
  coded = encode(text, form)
  bytes_C = original_bytes(coded)
  assert bytes_C.shape == (len(coded),)
  assert bytes_C.sum() == len(text.encode())


def test_original_bytes_by_character():
  assert original_bytes(f"{TITLE}aé日😀{ESC}{CAPNEXT}").tolist() == [0, 1, 2, 3, 4, 0, 3]
  assert original_bytes("").dtype == np.int64
