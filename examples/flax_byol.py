"""BYOL in Flax NNX on scikit-learn's digits."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits


class MLP(nnx.Sequential):
    def __init__(self, inputs, hidden, outputs, rngs):
        first, last = nnx.Linear(inputs, hidden, rngs=rngs), nnx.Linear(hidden, outputs, rngs=rngs)
        super().__init__(first, nnx.BatchNorm(hidden, rngs=rngs), nnx.relu, last)


class Online(nnx.Module):
    def __init__(self, rngs):
        self.projector = MLP(64, 128, 32, rngs)
        self.predictor = MLP(32, 64, 32, rngs)

    def __call__(self, x):
        return self.predictor(self.projector(x))


model = Online(nnx.Rngs(0))
target = MLP(64, 128, 32, nnx.Rngs(1))
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def similarity(prediction, aim):
    aim = jax.lax.stop_gradient(aim)
    return jnp.mean(optax.losses.cosine_similarity(prediction, aim, epsilon=1e-6))


@nnx.jit
def train_step(model, target, optimizer, view1, view2):
    aim1, aim2 = target(view2), target(view1)

    def loss(model):
        return -similarity(model(view1), aim1) - similarity(model(view2), aim2)

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    slow, fast = nnx.state(target, nnx.Param), nnx.state(model.projector, nnx.Param)
    nnx.update(target, optax.incremental_update(fast, slow, 0.02))
    return value


images = jnp.asarray(load_digits().data / 16, jnp.float32)
key = jax.random.key(0)
for step in range(60):
    key, *keys = jax.random.split(key, 4)
    batch = images[jax.random.choice(keys[0], len(images), (128,))]
    views = [batch + 0.2 * jax.random.normal(k, batch.shape) for k in keys[1:]]
    value = train_step(model, target, optimizer, *views)
    if step % 20 == 19:
        print(f"step {step}, loss {value:.4f}")
