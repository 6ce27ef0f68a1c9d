"""Trains a Keras SimSiam with the head, by `fit`, and prints whether the weight is the oracle's."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parents[1])]
import keras  # noqa: E402
from keras import ops  # noqa: E402

import oracle  # noqa: E402
from directpred.adapters.keras import DirectPredHead, replace_predictor, restore  # noqa: E402

ROWS, STEPS, EPOCHS = 16, 3, 2


def mlp(hidden, outputs):
    dense = keras.layers.Dense
    return keras.Sequential([dense(hidden, activation="relu"), dense(outputs)])


class SimSiam(keras.Model):
    def __init__(self):
        super().__init__()
        self.encoder, self.predictor = mlp(16, 4), mlp(9, 4)

    def call(self, x, training=False):
        z1, z2 = self.encoder(x), self.encoder(x + 1.0)
        p1, p2 = (self.predictor(z, training=training) for z in (z1, z2))
        return ops.stack([z1, z2, p1, p2], axis=1)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        z1, z2, p1, p2 = (y_pred[:, i] for i in range(4))
        z1, z2 = ops.stop_gradient(z1), ops.stop_gradient(z2)
        cos = keras.losses.cosine_similarity
        return ops.mean(cos(z2, p1) + cos(z1, p2))


def expected(batches, rho=0.3):
    return oracle.weight(batches, rho, lambda s: oracle.eq18(s, 0.1))


def numpy(variable):
    return ops.convert_to_numpy(variable)


keras.utils.set_random_seed(0)
data = np.random.default_rng(0).normal(size=(STEPS * ROWS, 6)).astype("float32")
batches = np.split(data, STEPS)

model = SimSiam()
learned = model.predictor
head = replace_predictor(model)
assert restore(model) is learned is model.predictor
head = replace_predictor(model)
assert model.predictor is head
model.compile(keras.optimizers.SGD(0.05), run_eagerly=keras.config.backend() == "torch")

seen = []
model(batches[0])
for step in range(EPOCHS * STEPS):
    x = batches[step % STEPS]
    out = numpy(model(x)).astype(float)
    seen.append([out[:, 0], out[:, 1]])
    before = numpy(head.weight).copy()
    np.testing.assert_allclose(out[:, 2], out[:, 0] @ before, atol=1e-5)
    model.train_on_batch(x)
np.testing.assert_allclose(numpy(head.weight), expected(seen), atol=2e-3)
assert int(head.step_count) == EPOCHS * STEPS, int(head.step_count)
assert len(model.trainable_variables) == 4

count = int(head.step_count)
model.fit(data, batch_size=ROWS, epochs=EPOCHS, verbose=0, shuffle=False)
assert int(head.step_count) == count + EPOCHS * STEPS
model.evaluate(data, batch_size=ROWS, verbose=0)
assert int(head.step_count) == count + EPOCHS * STEPS
weight = numpy(head.weight)
np.testing.assert_allclose(weight, weight.T)
assert not np.allclose(weight, np.eye(4), atol=1e-2)

model.save_weights("model.weights.h5")
other = SimSiam()
replace_predictor(other)
other(batches[0])
other.load_weights("model.weights.h5")
np.testing.assert_array_equal(numpy(other.predictor.weight), weight)

config = DirectPredHead(rho=0.5, calls=1, name="p").get_config()
again = DirectPredHead.from_config(config)
assert again.options == DirectPredHead(rho=0.5).options
assert (again.calls, again.name) == (1, "p")

# One call a step, and features that are not finite.
single = DirectPredHead(calls=1)
z = np.random.default_rng(1).normal(size=(3, 8, 4)).astype("float32")
for part in z:
    single(part, training=True)
np.testing.assert_allclose(
    numpy(single.weight), expected([[p] for p in z.astype(float)]), atol=2e-3
)
single(np.full((8, 4), np.nan, "float32"), training=True)
assert (int(single.step_count), int(single.skipped), int(single.closings)) == (3, 1, 4)

# The gradient is that of z @ W with the W of the step before, which the call has replaced.
before = numpy(single.weight).copy()
if keras.config.backend() == "torch":
    import torch

    z = torch.from_numpy(z[0]).requires_grad_()
    single(z, training=True).square().sum().backward()
    gradient = z.grad.numpy()
    z = z.detach().numpy()
else:
    import jax

    state = [x.value for x in single.non_trainable_variables]
    z = z[0]
    gradient = jax.grad(
        lambda z: (single.stateless_call([], state, z, training=True)[0] ** 2).sum()
    )(z)
    single(z, training=True)
np.testing.assert_allclose(gradient, 2 * z @ before @ before.T, atol=1e-3)
assert not np.array_equal(numpy(single.weight), before)


def raises(error, text, call):
    with pytest.raises(error, match=text):
        call()


raises(ValueError, "built already", lambda: replace_predictor(model))
raises(TypeError, "got str", lambda: replace_predictor("model"))
raises(ValueError, "encoder, predictor", lambda: replace_predictor(SimSiam(), "head"))
raises(ValueError, "calls", lambda: DirectPredHead(calls=0))
raises(ValueError, "rho", lambda: DirectPredHead(rho=2.0))


def narrow():
    odd = SimSiam()
    odd.predictor = mlp(9, 5)
    replace_predictor(odd)
    odd(batches[0])


raises(ValueError, "width 4 to 5", narrow)
print("right")
