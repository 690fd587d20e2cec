"""Mistakes that are easily made in this arithmetic, each planted by a small patch of our own code.

Each names the golden case that catches it and the tensor that it shows at first. docs/parity.md lists them all.
"""

import dataclasses
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pgolf_jax.model as contexts
from pgolf_jax import training
from pgolf_jax.kernels import leaky_relu2_mlp as mlp
from pgolf_jax.kernels import numerics
from pgolf_jax.kernels.gated_xsa import xla as xsa_xla
from pgolf_jax.kernels.leaky_relu2_mlp import xla as mlp_xla
from pgolf_jax.kernels.polar_express import xla as polar_xla
from pgolf_jax.kernels.rotary_heads import xla as rotary_xla
from pgolf_jax.model import block, gpt
from pgolf_jax.parity import Case
from pgolf_jax.parity import run as parity_run
from pgolf_jax.quantize import make
from pgolf_jax.quantize.gptq import gptq as jitted_gptq
from pgolf_jax.scoring import adapter_sets, global_phase
from pgolf_jax.settings.load import changed
from pgolf_jax.training import optimizer as optimizers
from pgolf_jax.training import step as steps

gptq = __import__("pgolf_jax.quantize.gptq", fromlist=["gptq"])


@dataclasses.dataclass(frozen=True)
class Mistake:
  """A planted mistake.

  Attributes:
    case: the golden case that catches it.
    first: the tensor that diverges first.
    plant: patches our code, given pytest's monkeypatch and the case, whose settings it may change.
    gradients: whether it shows in gradients alone, so that the whole case has to run.
  """

  name: str
  case: str
  first: str
  plant: Callable
  gradients: bool = False


MISTAKES: list[Mistake] = []


def mistake(case: str, first: str, gradients: bool = False):
  def add(plant):
    MISTAKES.append(Mistake(plant.__name__.replace("_", " ").strip(), case, first, plant, gradients))
    return plant

  return add


def change(case: Case, **settings) -> None:
  """Gives a case other settings: `model__rope_base=10` changes model.rope_base."""
  dotted = {name.replace("__", "."): value for name, value in settings.items()}
  case.__dict__["settings"] = changed(case.settings, dotted)


def around(patch, owner, name: str, wrapper) -> None:
  """Replaces `owner.name` by `wrapper(original, …)`."""
  original = getattr(owner, name)
  patch.setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


# The forward pass.


@mistake("forward", "embedding")
def norms_with_an_epsilon_of_1e_5(patch, case):
  patch.setattr(numerics, "EPS", 1e-5)


@mistake("forward", "embedding")
def the_smear_gate_runs_across_bos(patch, case):
  def embed(original, self, tokens, context):
    config, self.config = self.config, dataclasses.replace(self.config, bos_id=-1)
    x = original(self, tokens, context)
    self.config = config
    return x

  original = gpt.GPT._embed
  patch.setattr(gpt.GPT, "_embed", lambda self, tokens, context: embed(original, self, tokens, context))


@mistake("forward", "00.blocks.0.q")
def half_the_rotary_width(patch, case):
  around(patch, block, "angles", lambda original, position, dims, base: original(position, dims // 2, base))


@mistake("forward", "00.blocks.0.q")
def rotary_base_of_1000(patch, case):
  change(case, model__rope_base=1000.0)


@mistake("forward", "00.blocks.0.q")
def rotary_pairs_of_neighbours(patch, case):
  def rotate(x, angles):
    cos, sin = (a[:, None] for a in angles)
    width = 2 * cos.shape[-1]
    a, b = x[..., 0:width:2], x[..., 1:width:2]
    turned = jnp.stack([a * cos + b * sin, b * cos - a * sin], axis=-1).reshape(*x.shape[:-1], width)
    return jnp.concatenate([turned, x[..., width:]], axis=-1)

  patch.setattr(rotary_xla, "_rotate", rotate)


@mistake("forward", "00.blocks.0.q")
def rotary_turns_the_other_way(patch, case):
  around(patch, rotary_xla, "_rotate", lambda original, x, angles: original(x, (angles[0], -angles[1])))


@mistake("forward_long", "hidden")
def rotary_frequencies_rescaled_in_long_rows(patch, case):
  def angles(original, position, dims, base):
    return original(position, dims, base * max(1.0, position.shape[0] / 256) ** (dims / (dims - 2)))

  around(patch, block, "angles", angles)


@mistake("forward", "00.blocks.0.k")
def keys_and_values_swapped_in_their_bank(patch, case):
  around(patch, gpt.GPT, "_weights", lambda original, self, layer: _swapped(original(self, layer)))


def _swapped(weights):
  return weights._replace(k=weights.v, v=weights.k)


@mistake("forward", "00.blocks.0.q")
def no_gain_on_queries(patch, case):
  def scaled(original, x, factor):
    return x if factor.ndim == 2 and factor.shape[1] == 1 else original(x, factor)

  around(patch, rotary_xla, "scaled", scaled)


@mistake("forward", "00.blocks.0.attend")
def query_heads_permuted(patch, case):
  def attention(original, q, k, v, **options):
    H, K = q.shape[2], k.shape[2]
    order = np.arange(H).reshape(H // K, K).T.reshape(-1)
    return original(q[:, :, order], k, v, **options)[:, :, np.argsort(order)]

  around(patch, contexts, "segment_attention", attention)


@mistake("forward", "00.blocks.0.attend")
def attention_scaled_by_the_model_width(patch, case):
  def attention(original, q, k, v, **options):
    return original(q * (q.shape[2] ** -0.5), k, v, **options)

  around(patch, contexts, "segment_attention", attention)


@mistake("forward", "00.blocks.0.attend")
def segments_that_begin_one_token_late(patch, case):
  around(patch, contexts, "segment_starts", lambda original, tokens, **o: original(jnp.roll(tokens, 1, axis=1), **o))


@mistake("forward", "00.blocks.0.attend")
def documents_not_kept_apart(patch, case):
  around(patch, contexts, "segment_starts", lambda original, tokens, **o: original(0 * tokens, **o))


@mistake("forward", "00.blocks.0.attend")
def long_documents_not_cut(patch, case):
  def starts(original, tokens, *, bos_id, seq_len):
    return original(tokens, bos_id=bos_id, seq_len=tokens.shape[1])

  around(patch, contexts, "segment_starts", starts)


@mistake("forward", "00.blocks.0.attn")
def the_sparse_gate_without_its_scale(patch, case):
  change(case, model__sparse_attn_gate_scale=1.0)


@mistake("forward", "00.blocks.0.attn")
def XSA_in_one_layer_too_many(patch, case):
  change(case, model__xsa_last_n=3)


@mistake("forward", "01.blocks.1.attn")
def XSA_with_the_wrong_sign(patch, case):
  around(patch, xsa_xla, "without_own_value", lambda original, y, v: 2 * y - original(y, v))


@mistake("forward", "00.blocks.0.mlp")
def another_slope_below_zero(patch, case):
  change(case, model__leaky_relu_sq_slope=0.5)


@mistake("forward", "00.blocks.0.mlp")
def the_slope_is_not_squared(patch, case):
  def unsquared(x, up, down, *, slope):
    u = x @ up.T
    return jnp.where(u > 0, u * u, slope * u * u) @ down.T

  patch.setattr(mlp, "leaky_relu2_mlp", unsquared)


@mistake("forward", "01.blocks.1.attend")
def no_scale_by_depth(patch, case):
  change(case, model__ln_scale=False)


@mistake("forward", "01.blocks.1.q")
def residual_and_embedding_mixed_the_other_way_round(patch, case):
  def mixed(self, x, use):
    factor = self.resid_mix[...]
    return block.residual_norm(x, use.x0, factor[0], factor[1], scale=self.norm_scale)

  patch.setattr(block.Block, "_mixed", mixed)


@mistake("forward", "01.blocks.1.q")
def every_looped_layer_repeated_in_place(patch, case):
  around(patch, gpt, "layer_order", lambda original, config, looping: ((0, 0), (1, 1, 2)))


@mistake("forward", "02.blocks.0.q")
def skip_gates_the_wrong_way_round(patch, case):
  def join(self, x, skip, j):
    skip = numerics.scaled(skip, self.skip_weights[j])
    return x + numerics.scaled(skip - x, jax.nn.sigmoid(self.skip_gates[j]))

  patch.setattr(gpt.GPT, "_join_skip", join)


@mistake("forward", "04.blocks.2.lane0")
def the_factors_between_lanes_transposed(patch, case):
  original = block.Block.parallel
  patch.setattr(
    block.Block, "parallel", lambda self, lanes, use, resid, post: original(self, lanes, use, resid, post.T)
  )


@mistake("forward", "hidden")
def the_attention_lane_alone_at_the_end(patch, case):
  change(case, model__parallel_final_lane="attn")


@mistake("forward", "logits")
def the_training_softcap_in_evaluation(patch, case):
  original = gpt.GPT.caps
  patch.setattr(gpt.GPT, "caps", lambda self, *, evaluation: original(self, evaluation=False))


@mistake("forward", "loop0/grads/blocks.1.attn.attn_gate_w", gradients=True)
def the_slope_of_the_activation_s_derivative(patch, case):
  def gradient(dy, down, u, *, slope):
    return (dy @ down) * 2 * jnp.where(u > 0, u, slope * u)

  patch.setattr(mlp_xla, "leaky_relu2_mlp", mlp.with_gradient(mlp_xla.up, gradient))


# The optimizer.


@mistake("optimizer", "params/0/kv_bank")
def rows_not_normalised_in_Muon(patch, case):
  change(case, optimizer__muon_row_normalize=False)


@mistake("optimizer", "params/0/kv_bank")
def the_coefficients_of_Newton_Schulz(patch, case):
  patch.setattr(polar_xla, "COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)


@mistake("optimizer", "params/0/mlp_down_bank")
def the_factor_for_tall_matrices_on_wide_ones(patch, case):
  def express(original, u, *, steps):
    m, n = u.shape[-2:]
    return original(u, steps=steps) * (max(1, n / m) / max(1, m / n)) ** 0.5

  around(patch, optimizers.polar, "polar_express", express)


@mistake("optimizer", "params/1/kv_bank")
def momentum_lost_between_steps(patch, case):
  def forgetful(original, **options):
    inner = original(**options)

    def update(grads, state, params=None, **extra):
      updates, state = inner.update(grads, state, params, **extra)
      return updates, jax.tree.map(jnp.zeros_like, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)

  around(patch, optimizers, "scale_by_muon", forgetful)


@mistake("optimizer", "params/0/blocks.0.attn.attn_gate_w")
def weight_decay_coupled_to_the_gradient(patch, case):
  def adam(original):
    inner = original()

    def update(grads, state, params, *, hyper, **extra):
      grads = jax.tree.map(lambda g, w: g + hyper.adam_wd * w, grads, params)
      return inner.update(grads, state, params, hyper=hyper, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)

  def step(original, lr, decay):
    inner = original(lr, decay)

    def update(directions, state, params, *, hyper, **extra):
      return inner.update(directions, state, params, hyper=hyper._replace(adam_wd=np.float32(0)), **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)

  around(patch, optimizers, "scale_by_adam", adam)
  around(patch, optimizers, "_decayed_step", step)


@mistake("optimizer", "params/1/kv_bank")
def weight_decay_without_the_schedule(patch, case):
  def step(original, lr, decay):
    def update(directions, state, params, *, lr_scale, hyper, **extra):
      rate, fade = getattr(hyper, lr), getattr(hyper, lr) * getattr(hyper, decay)
      return jax.tree.map(lambda d, w: -fade * w - rate * lr_scale * d, directions, params), state

    return optax.GradientTransformationExtraArgs(original(lr, decay).init, update)

  around(patch, optimizers, "_decayed_step", step)


@mistake("optimizer", "params/0/blocks.0.attn.attn_gate_w")
def no_bias_correction_in_Adam(patch, case):
  patch.setattr(optax.tree, "bias_correction", lambda moment, decay, count: moment)


# Training.


@mistake("train_schedule", "train_loss")
def the_momentum_schedule_begins_at_its_end(patch, case):
  patch.setattr(training, "muon_momentum", lambda config, step: config.muon_momentum)


@mistake("train_schedule", "train_loss")
def the_learning_rate_of_the_step_after(patch, case):
  def factor(original, config, progress, step):
    return original(config, min(progress + 1 / config.iterations, 1.0), step)

  around(patch, training, "lr_factor", factor)


@mistake("train_schedule", "train_loss")
def momentum_not_reset_after_the_warm_up(patch, case):
  def init(original, self, params):
    state = original(self, params)
    left = jax.tree.map(lambda m: m + 0.01 if m.ndim == 3 else m, state.opt_state)
    return state._replace(opt_state=left)

  original = steps.TrainStep.init
  patch.setattr(steps.TrainStep, "init", lambda self, params: init(original, self, params))


@mistake("train_schedule", "params_ema/blocks.0.attn.attn_gate_w")
def the_average_takes_the_weights_before_the_step(patch, case):
  original = steps.TrainStep._step

  def step(self, mean_loss, state, inputs):
    after, metrics = original(self, mean_loss, state, inputs)
    return after._replace(average=optax.incremental_update(state.params, state.average, inputs.ema_rest)), metrics

  patch.setattr(steps.TrainStep, "_step", step)


# Quantising.


@mistake("quantize", "dequantized/blocks.0.attn.c_q.weight")
def GPTQ_takes_columns_from_left_to_right(patch, case):
  _rebuild_gptq(patch, argsort=lambda x, **_: jnp.arange(len(x)))


@mistake("quantize", "dequantized/blocks.0.attn.c_q.weight")
def GPTQ_passes_no_error_on(patch, case):
  def alone(original, weight, hessian, grids, **options):
    return original(weight, hessian * jnp.eye(hessian.shape[-1]), grids, **options)

  around(patch, make, "gptq", alone)


@mistake("quantize", "dequantized/blocks.0.attn.c_q.weight")
def ten_times_the_damping(patch, case):
  def damped(original, *arguments, damping, **options):
    return original(*arguments, damping=10 * damping, **options)

  around(patch, make, "gptq", damped)


@mistake("quantize", "dequantized/blocks.0.attn.c_q.weight")
def no_low_rank_correction(patch, case):
  case.about["settings"]["LQER_ENABLED"] = "0"


def _rebuild_gptq(patch, **replaced) -> None:
  """Traces GPTQ again with some functions of jax.numpy replaced."""

  class Numpy(types.ModuleType):
    def __getattr__(self, name):
      return replaced.get(name, getattr(jnp, name))

  patch.setattr(gptq, "jnp", Numpy("jnp"))
  jitted_gptq.clear_cache()


# Hints.


@mistake("ngram", "gate_mask")
def hints_not_shifted(patch, case):
  def late(original, targets, config):
    hints = original(targets, config)
    return dataclasses.replace(hints, ids=np.roll(hints.ids, 1), gate=np.roll(hints.gate, 1))

  around(patch, parity_run, "build_hints", late)


@mistake("ngram", "gate_mask")
def a_context_one_token_too_short(patch, case):
  change(case, hints__order=case.settings.hints.order - 1)


@mistake("ngram", "gate_mask")
def the_true_first_token_as_seed(patch, case):
  def seeded(original, targets, config):
    return original(targets, config, seed_token=int(case.inputs["tokens"][0]))

  around(patch, parity_run, "build_hints", seeded)


@mistake("ngram", "gate_mask")
def a_target_counted_before_its_hint(patch, case):
  def leaking(original, targets, config):
    twice = original(np.concatenate([targets, targets]), config)
    half = slice(len(targets), None)
    return dataclasses.replace(twice, **{name: x[half] for name, x in vars(twice).items()})

  around(patch, parity_run, "build_hints", leaking)


@mistake("ngram", "boost")
def another_boost(patch, case):
  change(case, hints__boost=case.settings.hints.boost + 0.125)


# Test-time training.


@mistake("ttt_small", "nll")
def the_adapters_scale_without_alpha(patch, case):
  change(case, ttt__lora__alpha=float(case.settings.ttt.lora.rank))


@mistake("ttt_small", "nll")
def A_not_kept_from_batch_to_batch(patch, case):
  def finish(self, round_, start, adapters):
    short = round_.is_short
    for at, used in start.goes_on.items():  # the case has one chain
      drawn = self._place(short, self._draw(int(used.label), self._programs[short].spec.rule.rank), round_.place_n)
      self._carried[short, round_.group] = adapter_sets.Carried(drawn, {at: used})

  patch.setattr(adapter_sets.AdapterSets, "finish", finish)


@mistake("ttt_small", "nll")
def the_cosine_of_the_global_phase_one_chunk_too_long(patch, case):
  around(patch, global_phase, "learning_rate", lambda original, phase, i, chunks: original(phase, i, chunks + 1))
