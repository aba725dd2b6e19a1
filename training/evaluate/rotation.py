"""How well a linear regression reads the rotation angle from features."""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

RIDGE = 1.0


def angle_r2(
    train_features: NDArray[np.float32],
    train_degrees: NDArray[np.float32],
    test_features: NDArray[np.float32],
    test_degrees: NDArray[np.float32],
) -> float:
    """R^2 of ridge regression from standardised features to (sin, cos), mean of the two.

    Shapes: features (N, D), degrees (N,). 1 is perfect, 0 no better than the mean.
    """
    regression = make_pipeline(StandardScaler(), Ridge(alpha=RIDGE))
    # Features are nearly collinear: single precision is not enough to solve for them.
    regression.fit(train_features.astype(np.float64), _sin_cos(train_degrees))
    predicted = regression.predict(test_features.astype(np.float64))
    return float(r2_score(_sin_cos(test_degrees), predicted))


def _sin_cos(degrees: NDArray[np.float32]) -> NDArray[np.float32]:
    radians = np.deg2rad(degrees)
    return np.stack([np.sin(radians), np.cos(radians)], axis=1)
