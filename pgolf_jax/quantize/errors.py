"""The one error that reading an artifact can raise."""

from pgolf_jax.errors import UserError


class ArtifactError(UserError):
  """The file is not an artifact of this program, or is damaged, truncated or over-large. The message says which."""
