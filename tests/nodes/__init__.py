"""A stage on many real nodes: raylets with addresses and resources of their own, which are lost, drained, added, slow or cut off."""
