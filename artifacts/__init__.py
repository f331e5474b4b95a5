"""Files on disk: the trajectory record, stage directories, packed rows, scores and reports. Imports no JAX."""
