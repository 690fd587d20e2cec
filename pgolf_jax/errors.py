"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
  """Something the user can put right. The message is one sentence: what was wrong, and what to do."""


class ArtifactError(UserError):
  """An artifact that cannot be read or made; the message says what is wrong with it."""
