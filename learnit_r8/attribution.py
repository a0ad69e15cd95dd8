"""stub until the branch lands"""

import numpy as np

PRIOR_ESTIMATE = 1.0
PRIOR_VARIANCE = 1.0


class BatchAttribution:
    def __init__(self, n):
        self.level = 0.0
        self.n = 0

    def start(self, level):
        self.level = level
        self.n = 1

    def update(self, est, var, idx, loss):
        self.n += 1
        self.level += (loss - self.level) / min(self.n, 50)
        y = loss / self.level if self.level else 1.0
        est[idx] += 0.1 * (y - est[idx].mean())

    def to_loss(self, e):
        return np.asarray(e * self.level) if not isinstance(e, float) else e * self.level

    def from_loss(self, l):
        return np.asarray(l / self.level, dtype=np.float32)

    def refine(self, e, v):
        return False

    def confidence(self, v):
        return 0.5

    def state_dict(self):
        return {"level": self.level, "n": self.n}

    def load_state_dict(self, s):
        self.level = s["level"]
        self.n = s["n"]
