"""The distribution: object storage, shards, data sets, the stage scheduler, training and the index, on Ray. Knows no job."""
