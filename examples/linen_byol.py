"""SimSiam in Flax Linen on scikit-learn's digits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits


class MLP(nn.Module):
    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.hidden)(x))
        return nn.Dense(self.outputs)(nn.relu(x))


class SimSiam(nn.Module):
    def setup(self):
        self.encoder = MLP(128, 32)
        self.predictor = MLP(64, 32)

    def __call__(self, views, train=True):
        z = [self.encoder(view, train) for view in views]
        return z, [self.predictor(each, train) for each in z]


class State(TrainState):
    batch_stats: dict


images = jnp.asarray(load_digits().data / 16, jnp.float32)
key = jax.random.key(0)
model = SimSiam()
variables = model.init(key, [images, images])
state = State.create(apply_fn=model.apply, tx=optax.adam(1e-3), **variables)


def similarity(prediction, aim):
    aim = jax.lax.stop_gradient(aim)
    return jnp.mean(optax.losses.cosine_similarity(prediction, aim, epsilon=1e-6))


@jax.jit
def train_step(state, views):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        ((z1, z2), (p1, p2)), new = state.apply_fn(variables, views, mutable=["batch_stats"])
        return -similarity(p1, z2) - similarity(p2, z1), new["batch_stats"]

    (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradient, batch_stats=batch_stats)
    return state, value


for step in range(60):
    key, *keys = jax.random.split(key, 4)
    batch = images[jax.random.choice(keys[0], len(images), (128,))]
    views = [batch + 0.2 * jax.random.normal(k, batch.shape) for k in keys[1:]]
    state, value = train_step(state, views)
    if step % 20 == 19:
        print(f"step {step}, loss {value:.4f}")
