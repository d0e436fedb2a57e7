"""What every test runs under: checked shapes, no silent promotion, no network."""

import os

# Before anything imports JAX or a Hugging Face library; subprocesses inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
from hypothesis import settings
from jaxtyping import install_import_hook

# Every jaxtyping signature in minilm is checked at every call. Must come before minilm is imported.
install_import_hook("minilm", "beartype.beartype")

# (3,) and (3, 1) must not broadcast, nor float32 and int32 mix, in silence.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# No deadline: the first example of a shape compiles. Derandomised: a red build means a change.
settings.register_profile("minilm", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("minilm")
