"""SimSiam in Keras, on any of its backends but TensorFlow, on scikit-learn's digits."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from keras import ops
from sklearn.datasets import load_digits


def mlp(hidden, outputs):
    return keras.Sequential([keras.layers.Dense(hidden, "relu"), keras.layers.Dense(outputs)])


class SimSiam(keras.Model):
    def __init__(self):
        super().__init__()
        self.noise = keras.layers.GaussianNoise(0.2)
        self.encoder = mlp(128, 32)
        self.predictor = mlp(64, 32)

    def call(self, images, training=False):
        z1, z2 = (self.encoder(self.noise(images, training=training)) for _ in range(2))
        p1, p2 = self.predictor(z1, training=training), self.predictor(z2, training=training)
        return ops.stack([p1, p2, ops.stop_gradient(z2), ops.stop_gradient(z1)], axis=1)

    def compute_loss(self, x=None, y=None, y_pred=None, *rest, **options):
        return ops.mean(keras.losses.cosine_similarity(y_pred[:, :2], y_pred[:, 2:]))


images = load_digits().data[:1792] / 16
model = SimSiam()
model.compile(keras.optimizers.Adam(1e-3))
model.fit(images, batch_size=64, epochs=3, verbose=2)
