"""AdamW with warm-up, cosine and clipping. Called by `step`."""

import jax
import optax

from bsa.train import settings


def learning_rate(train: settings.TrainSettings) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to its final share at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=train.learning_rate,
        warmup_steps=train.warmup_steps,
        decay_steps=train.steps,
        end_value=train.learning_rate * train.final_learning_rate_share,
    )


def make_optimizer(train: settings.TrainSettings) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; only arrays named as matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            learning_rate(train),
            b1=train.b1,
            b2=train.b2,
            weight_decay=train.weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params):
    """Which leaves have two axes or more in their names (a scanned layer's array has one more than its name)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: len(path[-1].key.rpartition("_")[2]) > 1, params
    )
