"""Types of the public names, each of which is imported when it is first used."""

from pgolf_jax.api import DocumentScore as DocumentScore
from pgolf_jax.api import Model as Model
from pgolf_jax.api import Score as Score
from pgolf_jax.api import evaluate as evaluate
from pgolf_jax.api import load as load
from pgolf_jax.api import prepare as prepare
from pgolf_jax.api import train as train
from pgolf_jax.errors import ArtifactError as ArtifactError
from pgolf_jax.errors import UserError as UserError
from pgolf_jax.settings import Settings as Settings
from pgolf_jax.settings.builtin import settings as settings

__version__: str
__all__: list[str]
