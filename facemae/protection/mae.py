"""The vanilla masked autoencoder as a protection: FaceMAE's network, trained with the pixels' squared error alone (arXiv 2111.06377)."""

from __future__ import annotations

from facemae.protection.facemae import FaceMaeProtection


class MaeProtection(FaceMaeProtection):
    """FaceMAE with other weights: those of `facemae train --loss mse`. Options, dial and promises are FaceMAE's.

    A weights folder does not say by which loss it was trained, and this class cannot tell. `facemae protect` refuses a training run whose
    run.json says another loss; the lineage has the weights' sha256.
    """

    name = "mae"
