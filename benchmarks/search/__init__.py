"""The search for a FaceMAE: many settings trained and measured by one process on a bare machine that has torch and timm alone."""
