"""CaseOps: the recipe's rules one by one, the inverse on any text, and what the inverse refuses."""

import contextlib

import numpy as np
import pytest
from hypothesis import example, given
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

# Dense in what the rules are about: short runs of mixed case, markers, neighbours of the ASCII letters.
busy_text = st.text(st.sampled_from([*"abYZ@[`{ é\n", *MARKERS, "\U0001f600"]), max_size=30)
any_text = st.text(st.characters(), max_size=60)  # lone surrogates included


@pytest.mark.parametrize("text, coded", RULES)
def test_rules(text, coded):
  assert encode(text) == coded
  assert decode(coded) == text


@given(st.one_of(busy_text, any_text))
@example("aBC" * 10)
def test_decode_inverts_encode(text):
  assert decode(encode(text)) == text


@given(busy_text)
def test_only_capitals_and_markers_change(text):
  unchanged = "".join(c for c in text if not ("A" <= c <= "Z") and c not in MARKERS)
  coded = encode(text)
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


@pytest.mark.parametrize("coded, message", MALFORMED)
def test_malformed_text_is_refused_with_the_place(coded, message):
  with pytest.raises(UserError, match=message):
    decode(coded)


@pytest.mark.parametrize("coded", [coded for coded, _ in MALFORMED])
def test_lenient_decoding_drops_what_is_out_of_place(coded):
  assert "a" in decode(f"{coded} a", strict=False).lower()


@given(st.text(st.sampled_from([*"ab ", *MARKERS]), max_size=12))
def test_lenient_and_strict_agree_on_what_strict_accepts(coded):
  lenient = decode(coded, strict=False)
  with contextlib.suppress(UserError):
    assert decode(coded) == lenient


@given(st.one_of(busy_text, st.text(max_size=60)))
@example(ESC + ESC + TITLE + "A")
def test_original_bytes_add_up(text):
  coded = encode(text)
  bytes_C = original_bytes(coded)
  assert bytes_C.shape == (len(coded),)
  assert bytes_C.sum() == len(text.encode())


def test_original_bytes_by_character():
  assert original_bytes(f"{TITLE}aé日😀{ESC}{CAPNEXT}").tolist() == [0, 1, 2, 3, 4, 0, 3]
  assert original_bytes("").dtype == np.int64
