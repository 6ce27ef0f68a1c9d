"""BYOL in haiku on scikit-learn's digits."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits


class MLP(hk.Module):
    def __init__(self, hidden, outputs, name):
        super().__init__(name=name)
        self.hidden, self.outputs = hidden, outputs

    def __call__(self, x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(self.hidden)(x), is_training)
        return hk.Linear(self.outputs)(jax.nn.relu(x))


def byol(views, is_training):
    """The projection and the prediction of every view."""
    projector, predictor = MLP(128, 32, "projector"), MLP(64, 32, "predictor")
    projections = [projector(view, is_training) for view in views]
    return [(z, predictor(z, is_training)) for z in projections]


def similarity(prediction, aim):
    aim = jax.lax.stop_gradient(aim)
    return jnp.mean(optax.losses.cosine_similarity(prediction, aim, epsilon=1e-6))


model = hk.without_apply_rng(hk.transform_with_state(byol))
optimizer = optax.adam(1e-3)


@jax.jit
def train_step(params, target_params, state, opt_state, views):
    def loss(params):
        ((_, p1), (_, p2)), new_state = model.apply(params, state, views, True)
        ((z1, _), (z2, _)), _ = model.apply(target_params, state, views, True)
        return -similarity(p1, z2) - similarity(p2, z1), new_state

    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    params = optax.apply_updates(params, updates)
    target_params = optax.incremental_update(params, target_params, 0.02)
    return params, target_params, state, opt_state, value


images = jnp.asarray(load_digits().data / 16, jnp.float32)
key = jax.random.key(0)
params, state = model.init(key, [images, images], True)
target_params, opt_state = params, optimizer.init(params)
for step in range(60):
    key, *keys = jax.random.split(key, 4)
    batch = images[jax.random.choice(keys[0], len(images), (128,))]
    views = [batch + 0.2 * jax.random.normal(k, batch.shape) for k in keys[1:]]
    *carry, value = train_step(params, target_params, state, opt_state, views)
    params, target_params, state, opt_state = carry
    if step % 20 == 19:
        print(f"step {step}, loss {value:.4f}")
