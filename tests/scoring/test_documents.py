"""Which row of which device holds which document of a batch: the rule, its inverse, and what a step relies on."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgolf_jax.scoring.documents import Layout


@st.composite
def layouts(draw):
  """(layout, a number of documents that it has rows for)."""
  layout = Layout(draw(st.integers(1, 9)), draw(st.integers(1, 7)))
  return layout, draw(st.integers(1, layout.rows))


@given(layouts())
def test_every_document_has_a_row_and_every_row_knows_its_document(case):
  layout, documents = case
  place_n = np.arange(documents)[::-1]
  rows = layout.rows_of(place_n)
  assert len(set(rows.tolist())) == documents
  held = layout.documents_in(place_n)
  np.testing.assert_array_equal(held[rows], np.arange(documents))
  np.testing.assert_array_equal(layout.place_of_rows()[rows], place_n)
  assert (np.delete(held, rows) == -1).all()


@given(layouts(), st.integers(0, 2))
def test_rows_and_batch_order_are_inverse_along_any_axis(case, axis):
  layout, documents = case
  shape = [2, 2, 2]
  shape[axis] = documents
  x = 1 + np.arange(np.prod(shape)).reshape(shape)
  place_n = np.arange(documents)[::-1]
  in_rows = layout.to_rows(x, place_n, axis)
  assert in_rows.shape[axis] == layout.rows and np.count_nonzero(in_rows) == x.size
  np.testing.assert_array_equal(np.take(in_rows, layout.rows_of(place_n), axis), x)


@given(layouts(), st.data())
def test_the_longest_documents_are_in_the_first_slots_of_all_devices(case, data):
  """A call for the `active` longest has the fewest slots that hold them, and finds them by the same rule."""
  layout, documents = case
  active = data.draw(st.integers(1, documents))
  slots, place_n = -(-active // layout.devices), np.arange(documents)[::-1]
  still_at_work = np.arange(documents - active, documents)  # from shorter to longer
  assert (layout.slot_of_rows()[layout.rows_of(place_n)[still_at_work]] < slots).all()
  in_call = Layout(layout.devices, slots).documents_in(place_n)
  np.testing.assert_array_equal(in_call, layout.documents_in(place_n)[layout.slot_of_rows() < slots])
