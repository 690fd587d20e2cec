"""The loss on next tokens, of training, of scoring and of the global phase. Letters: see model/__init__.py."""

from jaxtyping import Array, Float, Int

from pgolf_jax.kernels.softcapped_xent import api as xent
from pgolf_jax.model.context import Context, packed
from pgolf_jax.model.gpt import GPT


def nll(
  model: GPT,
  tokens_BxT: Int[Array, "B T"],
  target_BxT: Int[Array, "B T"],
  context: Context,
  *,
  evaluation: bool = False,
) -> Float[Array, "B T"]:
  """Returns the negative log-likelihood of every target, in nats.

  Args:
    evaluation: use the evaluation softcaps rather than the symmetric one of training.
  """
  hidden_BxTxD = model(tokens_BxT, context).hidden
  cap_pos, cap_neg = model.caps(evaluation=evaluation)
  nll_N = xent.linear_softcapped_xent(
    hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1]),
    model.tok_emb.weight[...].astype(context.dtype),
    target_BxT.reshape(-1),
    cap_pos=cap_pos,
    cap_neg=cap_neg,
  )
  return nll_N.reshape(target_BxT.shape)


def packed_nll(
  model: GPT, tokens_BxT1: Int[Array, "B T1"], *, seq_len: int, looping: bool, dtype, evaluation: bool = False
) -> Float[Array, "B T"]:
  """Returns the negative log-likelihood, in nats, of every target of rows of documents end to end.

  Args:
    tokens_BxT1: rows of T + 1 tokens: inputs are the first T, targets the last T.
    seq_len: longest segment; see `context.packed`.
    looping, dtype: see `Context`.
    evaluation: use the evaluation softcaps rather than the symmetric one of training.
  """
  inputs, targets = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
  context = packed(inputs, bos_id=model.config.bos_id, seq_len=seq_len, looping=looping, dtype=dtype)
  return nll(model, inputs, targets, context, evaluation=evaluation)
